//! The private configuration file of one CRIU operation.
//!
//! An OCI runtime hands CRIU the file named by the annotation `org.criu.config`; its settings win over what the runtime
//! asks by RPC, and naming one shuts out the host's own (`/etc/criu/runc.conf`). The file is parsed as root and can
//! name programs to run, so nothing in it is copied from a pod, an image or an archive: callers set the fields of
//! [`OperationConfig`], and values that would mean something else in the file are refused.

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
    /// Allow a session, or a terminal, whose other end is outside.
    pub shell_job: bool,
    /// Allow connections to unix sockets outside.
    pub external_unix_sockets: bool,
    /// Mounts that are left out of a dump, by their place in the container.
    pub skip_mounts: Vec<String>,
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

impl OperationConfig {
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
            ("shell-job", self.shell_job),
            ("ext-unix-sk", self.external_unix_sockets),
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
        for mount in &self.skip_mounts {
            writeln!(text, "skip-mnt {}", plain("skip-mnt", mount)?).expect("a string takes everything");
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
            external_unix_sockets: true,
            skip_mounts: vec!["/data".to_owned()],
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
                "ext-unix-sk",
                "ghost-limit 4096",
                "skip-mnt /data",
                "lsm-profile apparmor:stasis-default",
                "action-script /usr/libexec/hold",
            ]
        );
    }

    #[test]
    fn a_value_cannot_bring_a_second_option() {
        let mount = OperationConfig { skip_mounts: vec!["/a /b".to_owned()], ..OperationConfig::default() };
        assert!(matches!(mount.text(), Err(Error::Value { name: "skip-mnt", .. })));
        for value in ["apparmor:x\naction-script /bin/sh", "a b", "a#b", "\"x", ""] {
            let config = OperationConfig { lsm_profile: Some(value.to_owned()), ..OperationConfig::default() };
            assert!(matches!(config.text(), Err(Error::Value { name: "lsm-profile", .. })), "{value:?}");
        }
    }
}
