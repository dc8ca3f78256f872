//! The private configuration file of one CRIU operation.
//!
//! An OCI runtime hands CRIU the file named by the annotation `org.criu.config`; its settings win over what the runtime
//! asks by RPC, and naming one shuts out the host's own (`/etc/criu/runc.conf`). The file is parsed as root and can
//! name programs to run, so nothing in it is copied from a pod, an image or an archive: a pod may ask for the few
//! options of [`OperationConfig::set_for_pod`], by name.

use std::fmt::Write as _;
use std::path::PathBuf;

use crate::{Error, Result};

/// Annotation of a container whose value is the path of its CRIU configuration file (runc and crun).
pub const ANNOTATION: &str = "org.criu.config";

/// How the network is held still while sockets are dumped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetworkLock {
    /// Not at all: CRIU runs inside the network namespace, which it does not lock anyway.
    #[default]
    Skip,
    /// By rules of nftables, inside CRIU. The default, iptables, starts four processes while the container is frozen.
    Nftables,
}

/// What is asked of CRIU in one operation beyond what the OCI runtime asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OperationConfig {
    /// How the network is held still.
    pub network_lock: NetworkLock,
    /// Keep file locks.
    pub file_locks: bool,
    /// Keep established TCP connections.
    pub tcp_established: bool,
    /// Restore TCP sockets closed.
    pub tcp_close: bool,
    /// Leave out connections that are not yet accepted.
    pub skip_in_flight: bool,
    /// Link deleted but open files back into the file system.
    pub link_remap: bool,
    /// Largest deleted but open file whose content is kept, in bytes; CRIU's default is 1 MiB.
    pub ghost_limit: Option<u64>,
    /// Longest time that CRIU may take to stop all processes, in seconds; its default is 10.
    pub stop_seconds: Option<u32>,
    /// Security label of the restored tasks, in CRIU's form `apparmor:<profile>` or `selinux:<label>`; only ever from
    /// the live request.
    pub lsm_profile: Option<String>,
    /// SELinux label of the restored mounts; only ever from the live request.
    pub lsm_mount_context: Option<String>,
    /// Program that CRIU calls between its steps; ours.
    pub action_script: Option<PathBuf>,
}

/// Which options a pod may ask for; from the runtime handler's configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodPolicy {
    /// `tcp-established`, `tcp-close` and `skip-in-flight`.
    pub tcp: bool,
    /// Largest `ghost-limit` in bytes; none: not settable.
    pub ghost_limit_max: Option<u64>,
}

impl OperationConfig {
    /// Sets one option by CRIU's name, as a pod's annotation asked.
    ///
    /// # Errors
    /// [`Error::Option`] for a name that pods may not set, or that `policy` withholds; never ignored.
    pub fn set_for_pod(&mut self, name: &str, value: &str, policy: &PodPolicy) -> Result<()> {
        let refuse = |why: &str| Err(Error::Option { name: name.to_owned(), why: why.to_owned() });
        let allowed = policy.tcp;
        match name {
            "file-locks" => self.file_locks = switch(name, value)?,
            "tcp-established" | "tcp-close" | "skip-in-flight" if !allowed => {
                return refuse("the runtime handler does not allow TCP options");
            }
            "tcp-established" => self.tcp_established = switch(name, value)?,
            "tcp-close" => self.tcp_close = switch(name, value)?,
            "skip-in-flight" => self.skip_in_flight = switch(name, value)?,
            "ghost-limit" => match (policy.ghost_limit_max, value.parse::<u64>()) {
                (Some(max), Ok(bytes)) if bytes <= max => self.ghost_limit = Some(bytes),
                (Some(max), _) => return refuse(&format!("{value:?} is not a number of bytes up to {max}")),
                (None, _) => return refuse("the runtime handler does not allow it"),
            },
            _ => return refuse("pods may set file-locks, tcp-established, tcp-close, skip-in-flight and ghost-limit"),
        }
        Ok(())
    }

    /// The content of the configuration file.
    ///
    /// # Errors
    /// [`Error::Value`] if a value would be read as something else.
    pub fn text(&self) -> Result<String> {
        let mut text = String::from("# Written by Stasis for one operation; changes are lost.\n");
        text.push_str(match self.network_lock {
            NetworkLock::Skip => "network-lock skip\n",
            NetworkLock::Nftables => "network-lock nftables\n",
        });
        let switches = [
            ("file-locks", self.file_locks),
            ("tcp-established", self.tcp_established),
            ("tcp-close", self.tcp_close),
            ("skip-in-flight", self.skip_in_flight),
            ("link-remap", self.link_remap),
        ];
        for (name, _) in switches.iter().filter(|(_, on)| *on) {
            text.push_str(name);
            text.push('\n');
        }
        if let Some(limit) = self.ghost_limit {
            writeln!(text, "ghost-limit {limit}").expect("a string takes everything");
        }
        if let Some(seconds) = self.stop_seconds {
            writeln!(text, "timeout {seconds}").expect("a string takes everything");
        }
        let script = self.action_script.as_ref().map(|path| path.to_string_lossy().into_owned());
        let values = [
            ("lsm-profile", &self.lsm_profile),
            ("lsm-mount-context", &self.lsm_mount_context),
            ("action-script", &script),
        ];
        for (name, value) in values {
            if let Some(value) = value {
                writeln!(text, "{name} {}", plain(name, value)?).expect("a string takes everything");
            }
        }
        Ok(text)
    }
}

fn switch(name: &str, value: &str) -> Result<bool> {
    match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(Error::Option { name: name.to_owned(), why: format!("{value:?} is neither true nor false") }),
    }
}

/// CRIU splits lines at blanks, knows quotes and begins comments with `#`; a value with any of them would mean
/// something else.
fn plain<'a>(name: &'static str, value: &'a str) -> Result<&'a str> {
    let special = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '#' | '"' | '\'' | '\\' | '\u{fffd}');
    if value.is_empty() || value.contains(special) {
        return Err(Error::Value { name, value: value.to_owned() });
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_holds_what_is_set_and_nothing_else() {
        let plain = OperationConfig::default().text().unwrap();
        assert_eq!(plain.lines().skip(1).collect::<Vec<_>>(), ["network-lock skip"]);
        let config = OperationConfig {
            network_lock: NetworkLock::Nftables,
            file_locks: true,
            tcp_established: true,
            ghost_limit: Some(4096),
            lsm_profile: Some("apparmor:stasis-default".to_owned()),
            action_script: Some("/usr/libexec/hold".into()),
            ..OperationConfig::default()
        };
        let text = config.text().unwrap();
        assert_eq!(
            text.lines().skip(1).collect::<Vec<_>>(),
            [
                "network-lock nftables",
                "file-locks",
                "tcp-established",
                "ghost-limit 4096",
                "lsm-profile apparmor:stasis-default",
                "action-script /usr/libexec/hold",
            ]
        );
    }

    #[test]
    fn a_value_cannot_bring_a_second_option() {
        for value in ["apparmor:x\naction-script /bin/sh", "a b", "a#b", "\"x", ""] {
            let config = OperationConfig { lsm_profile: Some(value.to_owned()), ..OperationConfig::default() };
            assert!(matches!(config.text(), Err(Error::Value { name: "lsm-profile", .. })), "{value:?}");
        }
    }

    #[test]
    fn a_pod_sets_only_what_it_may() {
        let open = PodPolicy { tcp: true, ghost_limit_max: Some(1 << 20) };
        let mut config = OperationConfig { file_locks: true, ..OperationConfig::default() };
        config.set_for_pod("file-locks", "false", &PodPolicy::default()).unwrap();
        config.set_for_pod("tcp-established", "true", &open).unwrap();
        config.set_for_pod("ghost-limit", "1048576", &open).unwrap();
        assert!(!config.file_locks && config.tcp_established && config.ghost_limit == Some(1 << 20));
        let refused = [
            ("tcp-established", "true", PodPolicy::default()),
            ("ghost-limit", "1", PodPolicy::default()),
            ("ghost-limit", "1048577", open),
            ("ghost-limit", "1M", open),
            ("file-locks", "yes", open),
            ("action-script", "/bin/sh", open),
            ("link-remap", "true", open),
            ("no-such-option", "1", open),
        ];
        for (name, value, policy) in refused {
            let error = config.set_for_pod(name, value, &policy).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
