//! AppArmor profiles: our own one, which confines every container that asks for no other, and those that are loaded.
//!
//! What a profile forbids is a second line behind capabilities, seccomp and masked paths: it holds where a container was
//! given a capability or a mount that opens one of them. Knows nothing of containers.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use stasis_sys::capture::{Limits, capture};

use crate::error::{Error, Result};

/// Name of our profile in the kernel.
pub(crate) const DEFAULT_PROFILE: &str = "stasis-default";

/// The kernel's list of profiles, a line each: name and mode.
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";

/// More than any host's list.
const LOADED_BYTES_MAX: u64 = 8 << 20;

/// Where distributions have the program that compiles and loads AppArmor profiles.
pub const APPARMOR_PARSERS: [&str; 3] =
    ["/usr/sbin/apparmor_parser", "/sbin/apparmor_parser", "/usr/bin/apparmor_parser"];

/// It takes a tenth of a second; a slow disk or an emulated machine longer.
const PARSER_LIMITS: Limits = Limits { time: Duration::from_secs(30), stdout: 64 * 1024, stderr_tail: 4096 };

/// Allows what a container does and forbids what reaches the host. Self-contained, as a host may lack the files that
/// profiles usually include. What is not mediated in it (unix sockets, message queues, user namespaces) stays as it is.
const DEFAULT_TEXT: &str = "\
profile stasis-default flags=(attach_disconnected,mediate_deleted) {
  # Files, networks and capabilities are given by the other means; what follows is what is never given.
  file,
  network,
  capability,
  umount,

  # Containers signal and trace their own kind. The host signals them, by runtimes that may be confined, too.
  signal (receive),
  signal (send) peer=stasis-default,
  ptrace (trace,tracedby,read,readby) peer=stasis-default,

  deny mount,
  deny /proc/* wl,
  deny /proc/{acpi,asound,bus,driver,fs,irq,scsi,tty}/** wl,
  deny /proc/sys/{abi,crypto,debug,dev,fs,net,sunrpc,user,vm}/** wl,
  deny /proc/sys/kernel/* wl,
  deny /proc/sys/kernel/{keys,pty,random,seccomp,yama}/** wl,
  deny /proc/{kcore,sysrq-trigger} rwklx,
  deny /sys/{block,bus,class,dev,devices,firmware,hypervisor,kernel,module,power}/** wl,
  deny /sys/fs/{[^c],c[^g]}** wl,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/firmware/** rwklx,
  deny /sys/kernel/{debug,security,tracing}/** rwklx,
}
";

/// The program that loads profiles, if this host has it.
pub(crate) fn parser() -> Option<PathBuf> {
    APPARMOR_PARSERS.into_iter().map(PathBuf::from).find(|path| path.is_file())
}

/// One at a time: containers that are made together would each load the default profile.
static LOADING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Makes sure that `profile` can be applied: loads ours, and refuses another that is not loaded.
///
/// # Errors
/// `FailedPrecondition`, with what is missing and what to do.
pub(crate) async fn ensure(profile: String) -> Result<()> {
    let _one = LOADING.lock().await;
    let ensured = tokio::task::spawn_blocking(move || ensure_now(&profile)).await;
    ensured.unwrap_or_else(|error| Err(Error::internal(format!("loading a profile ended abnormally: {error}"))))
}

fn ensure_now(profile: &str) -> Result<()> {
    // Without that list the runtime is left to find out.
    let loaded = match stasis_sys::path::read_limited(Path::new(LOADED), LOADED_BYTES_MAX) {
        Ok(list) => has(&String::from_utf8_lossy(&list), profile),
        Err(_) => profile != DEFAULT_PROFILE,
    };
    match loaded {
        true => Ok(()),
        false if profile == DEFAULT_PROFILE => load_default(),
        false => Err(Error::precondition(format!(
            "the AppArmor profile {profile:?} is not loaded on this host: load it with apparmor_parser --replace FILE"
        ))),
    }
}

fn has(list: &str, profile: &str) -> bool {
    list.lines().filter_map(|line| line.rsplit_once(" (")).any(|(name, _mode)| name == profile)
}

fn load_default() -> Result<()> {
    let failed = |reason: String| {
        Error::precondition(format!(
            "cannot load the AppArmor profile {DEFAULT_PROFILE}: {reason}; a container runs without it if its security \
             context asks for the profile Unconfined"
        ))
    };
    let parser = parser().ok_or_else(|| failed("apparmor_parser is missing (package apparmor)".to_owned()))?;
    let mut command = Command::new(&parser);
    command.args(["--replace", "--skip-cache"]);
    let said = capture(&mut command, DEFAULT_TEXT.as_bytes(), &PARSER_LIMITS)
        .map_err(|failure| failed(format!("{} {failure}", parser.display())))?;
    if !said.status.success() {
        let words = String::from_utf8_lossy(&said.stderr);
        return Err(failed(format!("{} ended with {}: {}", parser.display(), said.status, words.trim())));
    }
    tracing::info!(profile = DEFAULT_PROFILE, "loaded the default AppArmor profile");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_found_by_its_whole_name() {
        let list = "/usr/bin/man (enforce)\nstasis-default (complain)\nlxc (odd) name (enforce)\n";
        for (profile, expected) in
            [("stasis-default", true), ("stasis", false), ("/usr/bin/man", true), ("lxc (odd) name", true), ("", false)]
        {
            assert_eq!(has(list, profile), expected, "{profile}");
        }
    }
}
