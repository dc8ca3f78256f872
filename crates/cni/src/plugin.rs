//! One run of one plugin (section 2): derived configuration in, result or error out.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::Command;

use rustix::process::Signal;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use stasis_sys::capture::{Captured, Failure, Limits, capture};
use stasis_sys::process::{Setup, prepare};

use crate::config::{Network, find_program, missing_program};
use crate::{Config, Error, PluginFailure, PodNetwork, Result};

/// A result with thousands of routes is smaller.
const STDOUT_MAX: usize = 1 << 20;

/// Of what a plugin writes to its error output, this much reaches the error.
const STDERR_TAIL: usize = 4 * 1024;

/// Where to look for `iptables` and the like if the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the runs of one operation have in common.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(crate) config: &'a Config,
    pub(crate) network: &'a Network,
    pub(crate) command: &'static str,
    /// The pod and its interface; none for operations on the network as a whole.
    pub(crate) target: Option<(&'a PodNetwork, &'a str)>,
    /// `CNI_NETNS`; empty where the namespace is gone.
    pub(crate) netns: &'a OsStr,
}

/// What a plugin says when it fails (section 5, "Error").
#[derive(Deserialize)]
struct Complaint {
    code: u64,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl Call<'_> {
    /// Runs a plugin of the chain. An ADD must give a result; what others print is not looked at.
    pub(crate) fn run(&self, plugin: &Map<String, Value>, more: &[(&str, Value)]) -> Result<Value> {
        let name = plugin.get("type").and_then(Value::as_str).unwrap_or_default();
        let Some(program) = find_program(name, &self.config.bin_dirs) else {
            return Err(self.failed(name, missing_program(name, &self.config.bin_dirs)));
        };
        let stdin = Value::Object(self.derive(plugin, more)).to_string();
        let limits = Limits { time: self.config.plugin_timeout, stdout: STDOUT_MAX, stderr_tail: STDERR_TAIL };
        let output = capture(&mut self.command_line(program), stdin.as_bytes(), &limits).map_err(|failure| {
            let stderr = match &failure {
                Failure::TimedOut(_, stderr) => text(stderr),
                _ => String::new(),
            };
            // The words of a time limit hold the error output already.
            let message = match failure {
                Failure::TimedOut(limit, _) => Failure::TimedOut(limit, Vec::new()),
                other => other,
            };
            self.failure(PluginFailure {
                plugin: name.into(),
                message: format!("it {message}"),
                stderr,
                ..Default::default()
            })
        })?;
        if !output.status.success() {
            return Err(self.complaint(name, &output));
        }
        if self.command != "ADD" {
            return Ok(Value::Null);
        }
        match serde_json::from_slice(&output.stdout) {
            Ok(result @ Value::Object(_)) => Ok(result),
            _ => Err(self.failed(name, format!("its result is not a JSON object: {}", shown(&output.stdout)))),
        }
    }

    /// Section 3, "Deriving request configuration from plugin configuration".
    fn derive(&self, plugin: &Map<String, Value>, more: &[(&str, Value)]) -> Map<String, Value> {
        let mut request = plugin.clone();
        request.insert("cniVersion".into(), json!(self.network.version));
        request.insert("name".into(), json!(self.network.name));
        let wanted = request.remove("capabilities");
        let wanted = wanted.as_ref().and_then(Value::as_object);
        let of_plugin = |name: &str| wanted.is_some_and(|wanted| wanted.get(name) == Some(&Value::Bool(true)));
        let pod = self.target.map(|(pod, _)| pod);
        let args: Map<String, Value> =
            pod.map(capability_args).into_iter().flatten().filter(|(name, _)| of_plugin(name)).collect();
        if args.is_empty() {
            request.remove("runtimeConfig");
        } else {
            request.insert("runtimeConfig".into(), Value::Object(args));
        }
        request.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        request
    }

    fn command_line(&self, program: PathBuf) -> Command {
        let mut command = Command::new(program);
        let path = self.config.path.clone().or_else(|| std::env::var_os("PATH"));
        // The separator cannot be part of a directory that is configured as one of several.
        let dirs = self.config.bin_dirs.iter().map(|dir| dir.as_os_str()).collect::<Vec<_>>().join(OsStr::new(":"));
        command.env_clear().env("PATH", path.unwrap_or_else(|| OsString::from(DEFAULT_PATH)));
        command.env("CNI_COMMAND", self.command).env("CNI_PATH", dirs).current_dir("/");
        if let Some((pod, interface)) = self.target {
            command.env("CNI_CONTAINERID", &pod.id).env("CNI_NETNS", self.netns).env("CNI_IFNAME", interface);
            command.env("CNI_ARGS", cni_args(pod));
        }
        // An ADD that outlived its daemon would still be at work while the next daemon takes it back.
        prepare(&mut command, Setup { parent_death_signal: Some(Signal::KILL), ..Setup::default() });
        command
    }

    fn complaint(&self, name: &str, output: &Captured) -> Error {
        let mut failure = PluginFailure { plugin: name.into(), stderr: text(&output.stderr), ..Default::default() };
        match serde_json::from_slice::<Complaint>(&output.stdout) {
            Ok(said) => {
                (failure.code, failure.message, failure.details) = (Some(said.code), said.msg, said.details);
            }
            Err(_) if output.stdout.is_empty() => failure.message = format!("it ended with {}", output.status),
            Err(_) => {
                let said = shown(&output.stdout);
                failure.message = format!("it ended with {}, and its error is not JSON: {said}", output.status);
            }
        }
        self.failure(failure)
    }

    pub(crate) fn failed(&self, plugin: &str, message: String) -> Error {
        self.failure(PluginFailure { plugin: plugin.into(), message, ..Default::default() })
    }

    fn failure(&self, failure: PluginFailure) -> Error {
        Error::Plugin(Box::new(PluginFailure {
            command: self.command.into(),
            network: self.network.name.clone(),
            id: self.target.map(|(pod, _)| pod.id.clone()).unwrap_or_default(),
            ..failure
        }))
    }
}

/// `CNI_ARGS` of Kubernetes. `IgnoreUnknown` lets plugins accept those that they do not know.
fn cni_args(pod: &PodNetwork) -> String {
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
        pod.namespace, pod.name, pod.id, pod.uid
    )
}

/// Refuses what would change the meaning of [`cni_args`], and what is no environment.
pub(crate) fn check_args(pod: &PodNetwork) -> Result<()> {
    for (what, value) in [("name", &pod.name), ("namespace", &pod.namespace), ("uid", &pod.uid)] {
        if value.contains([';', '=', '\0']) || value.contains(char::is_control) {
            return Err(Error::InvalidArgument(format!(
                "the {what} {value:?} of pod {} cannot be given to CNI plugins: no ';', '=' or control characters",
                pod.id
            )));
        }
    }
    Ok(())
}

/// What the pod brings along for plugins that want it, by capability. Empty arguments are none.
fn capability_args(pod: &PodNetwork) -> Map<String, Value> {
    let mut args: Map<String, Value> = pod.capability_args.clone().into_iter().collect();
    let mut add = |name: &str, wanted: bool, value: Value| {
        if wanted {
            args.insert(name.into(), value);
        }
    };
    add("portMappings", !pod.port_mappings.is_empty(), json!(pod.port_mappings));
    add("bandwidth", pod.bandwidth.is_some(), json!(pod.bandwidth));
    add("dns", pod.dns.is_some(), json!(pod.dns));
    add("ips", !pod.ips.is_empty(), json!(pod.ips));
    add("mac", pod.mac.is_some(), json!(pod.mac));
    add("cgroupPath", pod.cgroup_path.is_some(), json!(pod.cgroup_path));
    add("io.kubernetes.cri.pod-annotations", !pod.annotations.is_empty(), json!(pod.annotations));
    args
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

/// Enough of a garbled output to recognise it by.
fn shown(bytes: &[u8]) -> String {
    const SHOWN_MAX: usize = 200;
    let text = text(bytes);
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}
