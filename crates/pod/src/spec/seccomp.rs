//! Seccomp: which profile a container gets, and how a profile file becomes an OCI filter.
//!
//! Two formats are read: OCI's own (`architectures`), and the one of containers/common and Docker, in which rules
//! apply only to some architectures, capabilities and kernels. The default profile is compiled in.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::OnceLock;

use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSyscall,
};
use serde::Deserialize;
use stasis_cri_api::runtime::security_profile::ProfileType;
use stasis_cri_api::runtime::{LinuxContainerSecurityContext, SecurityProfile};
use tracing::warn;

use super::HostFacts;
use super::error::{Result, SpecError};

/// The profile for `RuntimeDefault`, of containers/common; see `data/README.md`.
const DEFAULT_PROFILE: &str = include_str!("../../data/seccomp.json");

/// Largest profile file that is read, in bytes. The default one has 18 KB.
const PROFILE_MAX: u64 = 1 << 20;

/// A seccomp profile file of either format.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: LinuxSeccompAction,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<Arch>,
    #[serde(default)]
    arch_map: Vec<ArchMap>,
    #[serde(default)]
    flags: Vec<LinuxSeccompFilterFlag>,
    listener_path: Option<String>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchMap {
    architecture: Arch,
    #[serde(default)]
    sub_architectures: Option<Vec<Arch>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    /// The old form of a rule for one system call.
    name: Option<String>,
    #[serde(default)]
    names: Vec<String>,
    action: LinuxSeccompAction,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<LinuxSeccompArg>>,
    #[serde(default)]
    includes: Option<Condition>,
    #[serde(default)]
    excludes: Option<Condition>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    #[serde(default)]
    caps: Vec<Capability>,
    #[serde(default)]
    arches: Vec<String>,
    min_kernel: Option<String>,
}

/// The filter of a container; none if it runs unconfined. `bounding` is its capability bounding set.
///
/// A container whose request says nothing gets the default profile: a request has to say `Unconfined` to go without.
pub(super) fn filter(
    context: &LinuxContainerSecurityContext,
    bounding: &HashSet<Capability>,
    host: &HostFacts,
) -> Result<Option<LinuxSeccomp>> {
    if context.privileged {
        return Ok(None);
    }
    let (kind, path) = wanted(context)?;
    if kind == ProfileType::Unconfined {
        return Ok(None);
    }
    if !host.seccomp {
        if kind == ProfileType::Localhost {
            return Err(SpecError::host("seccomp", "the kernel has no seccomp, and the request asks for a profile"));
        }
        warn!("the kernel has no seccomp: the container runs without the default profile");
        return Ok(None);
    }
    match kind {
        ProfileType::Localhost => resolve(&from_file(Path::new(&path))?, bounding, host).map(Some),
        _ => resolve(default_profile(), bounding, host).map(Some),
    }
}

#[allow(deprecated, reason = "old kubelets and crictl files still set seccomp_profile_path")]
fn wanted(context: &LinuxContainerSecurityContext) -> Result<(ProfileType, String)> {
    if let Some(SecurityProfile { profile_type, localhost_ref }) = &context.seccomp {
        let kind = ProfileType::try_from(*profile_type)
            .map_err(|_| SpecError::invalid("seccomp.profile_type", format!("{profile_type} is unknown")))?;
        return match (kind, localhost_ref.is_empty()) {
            (ProfileType::Localhost, true) => {
                Err(SpecError::invalid("seccomp.localhost_ref", "is empty, with a Localhost profile"))
            }
            (ProfileType::Localhost, false) => Ok((kind, localhost_ref.clone())),
            (_, false) => Err(SpecError::invalid("seccomp.localhost_ref", "is only for a Localhost profile")),
            (_, true) => Ok((kind, String::new())),
        };
    }
    match context.seccomp_profile_path.as_str() {
        "" | "runtime/default" | "docker/default" => Ok((ProfileType::RuntimeDefault, String::new())),
        "unconfined" => Ok((ProfileType::Unconfined, String::new())),
        other => match other.strip_prefix("localhost/") {
            Some(path) => Ok((ProfileType::Localhost, path.to_owned())),
            None => Err(SpecError::invalid("seccomp_profile_path", format!("{other:?} is unknown"))),
        },
    }
}

fn default_profile() -> &'static Profile {
    static PROFILE: OnceLock<Profile> = OnceLock::new();
    PROFILE
        .get_or_init(|| serde_json::from_str(DEFAULT_PROFILE).expect("a test parses the profile that is compiled in"))
}

/// Reads a profile of the node. It must be a regular file: opening a FIFO would hang.
fn from_file(path: &Path) -> Result<Profile> {
    let field = "seccomp.localhost_ref";
    if !path.is_absolute() {
        return Err(SpecError::invalid(field, format!("{} must be an absolute path", path.display())));
    }
    let io = |e| SpecError::io(field, path, e);
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(SpecError::invalid(field, format!("{} is not a regular file", path.display())));
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|f| f.take(PROFILE_MAX + 1).read_to_end(&mut bytes)).map_err(io)?;
    if bytes.len() as u64 > PROFILE_MAX {
        return Err(SpecError::invalid(field, format!("{} is larger than {PROFILE_MAX} bytes", path.display())));
    }
    let profile: Profile = serde_json::from_slice(&bytes)
        .map_err(|e| SpecError::invalid(field, format!("{} is not a seccomp profile: {e}", path.display())))?;
    // The listener would hand the container's system calls to a socket that the profile names.
    if profile.listener_path.as_deref().is_some_and(|p| !p.is_empty()) {
        return Err(SpecError::unsupported(field, "profiles with listenerPath (seccomp notify); remove it"));
    }
    Ok(profile)
}

/// This machine in the words of profiles: Go's name and libseccomp's.
fn native() -> Option<(&'static str, Arch)> {
    match std::env::consts::ARCH {
        "x86_64" => Some(("amd64", Arch::ScmpArchX86_64)),
        "aarch64" => Some(("arm64", Arch::ScmpArchAarch64)),
        "riscv64" => Some(("riscv64", Arch::ScmpArchRiscv64)),
        "powerpc64" if cfg!(target_endian = "little") => Some(("ppc64le", Arch::ScmpArchPpc64le)),
        "s390x" => Some(("s390x", Arch::ScmpArchS390x)),
        "loongarch64" => Some(("loong64", Arch::ScmpArchLoongarch64)),
        _ => None,
    }
}

fn resolve(profile: &Profile, bounding: &HashSet<Capability>, host: &HostFacts) -> Result<LinuxSeccomp> {
    let native = native();
    let mut filter = LinuxSeccomp::default();
    filter.set_default_action(profile.default_action);
    filter.set_default_errno_ret(profile.default_errno_ret);
    filter.set_architectures(architectures(profile, native.map(|(_, arch)| arch)));
    filter.set_flags((!profile.flags.is_empty()).then(|| profile.flags.clone()));
    let arch = native.map_or("", |(name, _)| name);
    let mut syscalls = Vec::with_capacity(profile.syscalls.len());
    for rule in &profile.syscalls {
        if applies(rule, arch, bounding, host)? {
            syscalls.push(syscall(rule));
        }
    }
    filter.set_syscalls(Some(syscalls));
    Ok(filter)
}

/// The native architecture and those whose system calls its kernel takes as well.
fn architectures(profile: &Profile, native: Option<Arch>) -> Option<Vec<Arch>> {
    if !profile.architectures.is_empty() {
        return Some(profile.architectures.clone());
    }
    let map = profile.arch_map.iter().find(|m| Some(m.architecture) == native)?;
    let mut all = vec![map.architecture];
    all.extend(map.sub_architectures.iter().flatten());
    Some(all)
}

/// Whether a rule is for this container: none of its exclusions holds, and all of its inclusions do.
fn applies(rule: &Rule, arch: &str, bounding: &HashSet<Capability>, host: &HostFacts) -> Result<bool> {
    if let Some(not) = &rule.excludes {
        let excluded = not.arches.iter().any(|a| a == arch)
            || not.caps.iter().any(|c| bounding.contains(c))
            || matches!(&not.min_kernel, Some(release) if host.kernel >= kernel(release)?);
        if excluded {
            return Ok(false);
        }
    }
    let Some(only) = &rule.includes else {
        return Ok(true);
    };
    Ok((only.arches.is_empty() || only.arches.iter().any(|a| a == arch))
        && only.caps.iter().all(|c| bounding.contains(c))
        && match &only.min_kernel {
            Some(release) => host.kernel >= kernel(release)?,
            None => true,
        })
}

fn kernel(release: &str) -> Result<(u32, u32)> {
    release
        .split_once('.')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
        .ok_or_else(|| SpecError::invalid("seccomp.localhost_ref", format!("minKernel {release:?} is not major.minor")))
}

fn syscall(rule: &Rule) -> LinuxSyscall {
    let mut syscall = LinuxSyscall::default();
    syscall.set_names(rule.name.iter().chain(&rule.names).cloned().collect());
    syscall.set_action(rule.action);
    syscall.set_errno_ret(rule.errno_ret);
    syscall.set_args(rule.args.clone().filter(|args| !args.is_empty()));
    syscall
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostFacts {
        super::super::tests::host()
    }

    fn action_of(filter: &LinuxSeccomp, name: &str) -> Vec<LinuxSeccompAction> {
        let rules = filter.syscalls().iter().flatten();
        rules.filter(|r| r.names().iter().any(|n| n == name)).map(LinuxSyscall::action).collect()
    }

    #[test]
    fn default_profile_depends_on_capabilities() {
        let plain = resolve(default_profile(), &HashSet::new(), &host()).unwrap();
        assert_eq!(plain.default_action(), LinuxSeccompAction::ScmpActErrno);
        assert_eq!(action_of(&plain, "read"), [LinuxSeccompAction::ScmpActAllow]);
        assert_eq!(action_of(&plain, "open_by_handle_at"), [LinuxSeccompAction::ScmpActErrno]);
        assert_eq!(action_of(&plain, "kexec_load"), [LinuxSeccompAction::ScmpActErrno]);
        let able = HashSet::from([Capability::DacReadSearch]);
        let able = resolve(default_profile(), &able, &host()).unwrap();
        assert_eq!(action_of(&able, "open_by_handle_at"), [LinuxSeccompAction::ScmpActAllow]);
    }

    #[test]
    fn only_unconfined_and_privileged_go_without() {
        let profile =
            |kind: ProfileType| Some(SecurityProfile { profile_type: kind.into(), localhost_ref: String::new() });
        let check = |context: &LinuxContainerSecurityContext| filter(context, &HashSet::new(), &host()).unwrap();
        let mut context = LinuxContainerSecurityContext::default();
        assert!(check(&context).is_some(), "nothing said");
        context.seccomp = profile(ProfileType::RuntimeDefault);
        assert!(check(&context).is_some());
        context.seccomp = profile(ProfileType::Unconfined);
        assert!(check(&context).is_none());
        context.seccomp = profile(ProfileType::RuntimeDefault);
        context.privileged = true;
        assert!(check(&context).is_none());
        context.privileged = false;
        assert!(filter(&context, &HashSet::new(), &HostFacts { seccomp: false, ..host() }).unwrap().is_none());
    }

    fn localhost(json: &str) -> Result<Option<LinuxSeccomp>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("profile.json");
        std::fs::write(&path, json).unwrap();
        let context = LinuxContainerSecurityContext {
            seccomp: Some(SecurityProfile {
                profile_type: ProfileType::Localhost.into(),
                localhost_ref: path.to_str().unwrap().into(),
            }),
            ..Default::default()
        };
        filter(&context, &HashSet::new(), &host())
    }

    #[test]
    fn profiles_of_the_node() {
        let oci = r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],
            "syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO","errnoRet":1}]}"#;
        let filter = localhost(oci).unwrap().unwrap();
        assert_eq!(filter.architectures().as_deref(), Some(&[Arch::ScmpArchX86_64][..]));
        assert_eq!(action_of(&filter, "mkdir"), [LinuxSeccompAction::ScmpActErrno]);
        let docker = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"name":"mkdir","action":"SCMP_ACT_ERRNO","includes":{"minKernel":"99.0"}},
            {"name":"rmdir","action":"SCMP_ACT_ERRNO","includes":{"minKernel":"4.8"},"args":null}]}"#;
        let filter = localhost(docker).unwrap().unwrap();
        assert!(action_of(&filter, "mkdir").is_empty());
        assert_eq!(action_of(&filter, "rmdir"), [LinuxSeccompAction::ScmpActErrno]);
    }

    #[test]
    fn bad_profiles_are_refused() {
        assert!(localhost("{").is_err());
        assert!(localhost(r#"{"defaultAction":"SCMP_ACT_NOPE"}"#).is_err());
        assert!(localhost(r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/x.sock"}"#).is_err());
        assert!(from_file(Path::new("relative.json")).is_err());
        assert!(from_file(Path::new("/dev/zero")).is_err());
        assert!(from_file(Path::new("/none/such.json")).is_err());
    }
}
