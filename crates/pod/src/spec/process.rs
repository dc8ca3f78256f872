//! The first process of a container, and the processes that are run beside it.

use std::path::PathBuf;

use oci_spec::image::Config as ImageConfig;
use oci_spec::runtime::{LinuxCapabilities, Process, Spec, User};
use stasis_cri_api::runtime::{ContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext};

use super::error::{Result, SpecError};
use super::mounts::normalized;
use super::user::{self, AccountFiles};
use super::{ContainerInput, capabilities, confinement, resources};

/// Search path of a container whose image and request set none: that of containerd and Docker.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Terminal type of a container with a terminal whose image and request set none.
const DEFAULT_TERM: &str = "xterm";

pub(super) fn process(input: &ContainerInput<'_>, context: &LinuxContainerSecurityContext) -> Result<Process> {
    let none = ImageConfig::default();
    let image = input.image.config().as_ref().unwrap_or(&none);
    let no_resources = LinuxContainerResources::default();
    let limits = input.config.linux.as_ref().and_then(|l| l.resources.as_ref()).unwrap_or(&no_resources);
    let files = AccountFiles { passwd: input.passwd, group: input.group };
    let account = user::resolve(context, image.user().as_deref().unwrap_or_default(), files)?;
    let pod_selinux = input.pod_context().and_then(|c| c.selinux_options.as_ref());

    let mut process = bare();
    process.set_terminal(Some(input.config.tty));
    process.set_user(oci_user(&account));
    process.set_args(Some(args(input.config, image)?));
    process.set_env(Some(env(&input.pod.hostname, input.config, image)?));
    process.set_cwd(cwd(input.config, image)?);
    process.set_capabilities(Some(capabilities::sets(
        context.capabilities.as_ref(),
        context.privileged,
        input.host.capabilities,
    )?));
    process.set_no_new_privileges(Some(context.no_new_privs));
    process.set_apparmor_profile(confinement::apparmor(context, input.host)?);
    process.set_selinux_label(confinement::selinux(context, pod_selinux, input.host)?.map(|(label, _)| label));
    process.set_oom_score_adj(Some(resources::oom_score_adj(limits, input.host.oom_score_adj_floor)?));
    Ok(process)
}

/// A process with nothing of the type's own defaults, which are those of another engine.
fn bare() -> Process {
    let mut process = Process::default();
    process.set_rlimits(None);
    process.set_env(None);
    process.set_args(None);
    process
}

fn oci_user(account: &user::Account) -> User {
    let mut user = User::default();
    user.set_uid(account.uid);
    user.set_gid(account.gid);
    user.set_additional_gids(Some(account.groups.clone()));
    user
}

/// What is run. The request's command takes the place of the image's entrypoint and makes its arguments void; the
/// request's arguments take the place of the image's (the table of Kubernetes, "Define a Command and Arguments").
fn args(config: &ContainerConfig, image: &ImageConfig) -> Result<Vec<String>> {
    let entrypoint = image.entrypoint().as_deref().unwrap_or_default();
    let cmd = image.cmd().as_deref().unwrap_or_default();
    let (command, args) = match (&config.command[..], &config.args[..]) {
        ([], []) => (entrypoint, cmd),
        ([], args) => (entrypoint, args),
        (command, args) => (command, args),
    };
    let all = [command, args].concat();
    match all.first() {
        None => {
            Err(SpecError::invalid("command", "neither the request nor the image says what to run: give a command"))
        }
        Some(program) if program.is_empty() => Err(SpecError::invalid("command", "the program's name is empty")),
        Some(_) if all.iter().any(|a| a.contains('\0')) => Err(SpecError::invalid("command", "holds a NUL byte")),
        Some(_) => Ok(all),
    }
}

/// Variables in the order: defaults, image, request; a later one replaces an earlier one at its place.
fn env(hostname: &str, config: &ContainerConfig, image: &ImageConfig) -> Result<Vec<String>> {
    let mut env = Environment::default();
    env.set("PATH", DEFAULT_PATH);
    if !hostname.is_empty() {
        env.set("HOSTNAME", hostname);
    }
    if config.tty {
        env.set("TERM", DEFAULT_TERM);
    }
    for variable in image.env().iter().flatten() {
        // An image's variable without `=` has no meaning in a specification; Docker leaves it out, too.
        if let Some((name, value)) = variable.split_once('=').filter(|(name, _)| !name.is_empty()) {
            env.set(name, value);
        }
    }
    for variable in &config.envs {
        let value = std::str::from_utf8(&variable.value).map_err(|_| {
            SpecError::invalid(
                "envs",
                format!("the value of {:?} is not UTF-8, which a specification cannot hold", variable.key),
            )
        })?;
        env.set(&variable.key, value);
    }
    if env.0.iter().any(|(name, value)| name.contains('\0') || value.contains('\0')) {
        return Err(SpecError::invalid("envs", "a variable holds a NUL byte"));
    }
    Ok(env.0.into_iter().map(|(name, value)| format!("{name}={value}")).collect())
}

#[derive(Default)]
struct Environment(Vec<(String, String)>);

impl Environment {
    fn set(&mut self, name: &str, value: &str) {
        match self.0.iter_mut().find(|(n, _)| n == name) {
            Some((_, old)) => value.clone_into(old),
            None => self.0.push((name.to_owned(), value.to_owned())),
        }
    }
}

/// The working directory: the request's, the image's, else `/`.
fn cwd(config: &ContainerConfig, image: &ImageConfig) -> Result<PathBuf> {
    let of_image = image.working_dir().as_deref().unwrap_or_default();
    let (field, path) = match config.working_dir.as_str() {
        "" if of_image.is_empty() => return Ok(PathBuf::from("/")),
        "" => ("image config.WorkingDir", of_image),
        path => ("working_dir", path),
    };
    let clean = normalized(path)
        .filter(|_| !path.contains('\0'))
        .ok_or_else(|| SpecError::invalid(field, format!("{path:?} must be absolute and without `..`")))?;
    // A descriptor that the runtime left open would lead out of the container (CVE-2024-21626).
    let text = clean.to_string_lossy();
    if text.starts_with("/proc/") && text.split('/').any(|part| part == "fd") {
        return Err(SpecError::invalid(
            field,
            format!("{path:?} names an open file of a process, not a directory of the image"),
        ));
    }
    Ok(clean)
}

/// A process to run in a container beside its first one: the same user, environment, directory and confinement, with
/// other arguments. It has no inheritable and no ambient capabilities.
///
/// The specification must have a process, as those of [`super::container_spec`] do; one without yields a process that
/// holds nothing but `cmd`.
#[must_use]
pub fn exec_process(spec: &Spec, cmd: &[String], tty: bool) -> Process {
    let mut process = spec.process().clone().unwrap_or_else(bare);
    process.set_args(Some(cmd.to_vec()));
    process.set_terminal(Some(tty));
    process.set_console_size(None);
    let mut env = process.env().clone().unwrap_or_default();
    if tty && !env.iter().any(|v| v.starts_with("TERM=")) {
        env.push(format!("TERM={DEFAULT_TERM}"));
    }
    process.set_env(Some(env));
    let sets = process.capabilities().clone().map(|mut sets: LinuxCapabilities| {
        sets.set_inheritable(Some(Default::default()));
        sets.set_ambient(Some(Default::default()));
        sets
    });
    process.set_capabilities(sets);
    process
}

#[cfg(test)]
mod tests {
    use stasis_cri_api::runtime::KeyValue;

    use super::*;

    fn image(json: &str) -> ImageConfig {
        serde_json::from_str(json).unwrap()
    }

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    fn check_args(command: &[&str], args_: &[&str], image_json: &str) -> Result<Vec<String>> {
        let config = ContainerConfig { command: strings(command), args: strings(args_), ..Default::default() };
        args(&config, &image(image_json))
    }

    #[test]
    fn entrypoint_and_cmd() {
        let both = r#"{"Entrypoint":["/e"],"Cmd":["c"]}"#;
        assert_eq!(check_args(&[], &[], both).unwrap(), ["/e", "c"]);
        assert_eq!(check_args(&["/x"], &[], both).unwrap(), ["/x"]);
        assert_eq!(check_args(&[], &["a"], both).unwrap(), ["/e", "a"]);
        assert_eq!(check_args(&["/x"], &["a"], both).unwrap(), ["/x", "a"]);
        assert_eq!(check_args(&[], &[], r#"{"Cmd":["sh"]}"#).unwrap(), ["sh"]);
        assert!(check_args(&[], &[], "{}").is_err());
        assert!(check_args(&[""], &[], "{}").is_err());
        assert!(check_args(&["a\0b"], &[], "{}").is_err());
    }

    fn check_env(tty: bool, request: &[(&str, &[u8])], image_json: &str) -> Result<Vec<String>> {
        let envs = request.iter().map(|(k, v)| KeyValue { key: k.to_string(), value: v.to_vec() }).collect();
        env("pod-1", &ContainerConfig { envs, tty, ..Default::default() }, &image(image_json))
    }

    #[test]
    fn the_request_wins_and_nothing_comes_twice() {
        let env =
            check_env(true, &[("A", b"2"), ("PATH", b"/p"), ("A", b"3")], r#"{"Env":["A=1","B=x=y","odd","=z"]}"#);
        assert_eq!(env.unwrap(), ["PATH=/p", "HOSTNAME=pod-1", "TERM=xterm", "A=3", "B=x=y"]);
        assert_eq!(check_env(false, &[("HOSTNAME", b"")], "{}").unwrap()[1], "HOSTNAME=");
        assert!(check_env(false, &[("A", b"\xff")], "{}").is_err());
        assert!(check_env(false, &[("A", b"a\0b")], "{}").is_err());
    }

    #[test]
    fn working_directory() {
        let check = |request: &str, image_json: &str| {
            cwd(&ContainerConfig { working_dir: request.into(), ..Default::default() }, &image(image_json))
        };
        assert_eq!(check("", "{}").unwrap(), PathBuf::from("/"));
        assert_eq!(check("", r#"{"WorkingDir":"/srv/"}"#).unwrap(), PathBuf::from("/srv"));
        assert_eq!(check("/a", r#"{"WorkingDir":"/srv"}"#).unwrap(), PathBuf::from("/a"));
        for bad in ["rel", "/a/../b", "/proc/self/fd/7", "/proc/self/task/1/fd/3/x", "/a\0"] {
            assert!(check(bad, "{}").is_err(), "{bad:?}");
        }
    }
}
