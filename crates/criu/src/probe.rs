//! Is this `criu` good enough, and what can it do here?

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use crate::{Error, Result, command, kdat};

/// The oldest CRIU that is used. Before it, the dumped process can attack the dumper (CVE-2026-18107), and `criu swrk`
/// crashes as soon as a configuration file is not empty (4.1.1).
pub const MIN_VERSION: Version = Version { major: 4, minor: 2, patch: 1 };

/// Time for one question to the binary; probing the kernel takes 50 ms.
const LIMIT: Duration = Duration::from_secs(20);

/// Features that Stasis acts on, by CRIU's names (`criu check --feature`).
const FEATURES: [&str; 6] =
    ["mem_dirty_track", "uffd-noncoop", "network_lock_nftables", "external_net_ns", "seccomp_filters", "pagemap_scan"];

/// Version of CRIU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number; 0 if absent.
    pub patch: u32,
}

impl Version {
    /// As one number in CRIU's and podman's manner: 4.2.1 is 40201.
    pub fn number(self) -> u64 {
        u64::from(self.major) * 10_000 + u64::from(self.minor) * 100 + u64::from(self.patch)
    }

    /// Reads `4.2.1`, `4.2` and forms with something behind, such as `4.2.1-dirty`.
    pub fn parse(text: &str) -> Option<Self> {
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let mut numbers = text[..end].split('.').map(str::parse);
        let major = numbers.next()?.ok()?;
        let minor = numbers.next()?.ok()?;
        let patch = numbers.next().transpose().ok()?.unwrap_or(0);
        Some(Self { major, minor, patch })
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.major, self.minor, self.patch).cmp(&(other.major, other.minor, other.patch))
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl Serialize for Version {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What was found out about a `criu` binary on this host.
#[derive(Clone, Debug, Serialize)]
pub struct Probe {
    /// The binary.
    pub binary: PathBuf,
    /// Its version.
    pub version: Version,
    /// Why it must not be used, in a sentence; none: it can be used.
    pub refusal: Option<String>,
    /// Whether `/run` is a tmpfs, so that CRIU keeps its kernel probe cache by itself (30 ms a call).
    pub run_is_tmpfs: bool,
    /// Features by CRIU's names.
    pub features: BTreeMap<&'static str, bool>,
}

impl Probe {
    /// Whether checkpoints and restores can use this binary.
    pub fn is_usable(&self) -> bool {
        self.refusal.is_none()
    }
}

/// Asks `binary` for its version and, if that is new enough, what works on this kernel. Takes up to half a second;
/// must run in a network namespace whose `lo` is up, or CRIU's own probe fails.
///
/// # Errors
/// If the binary cannot be run or is not CRIU. One that is too old, or that fails `criu check`, is an answer.
pub fn probe(binary: &Path) -> Result<Probe> {
    let version = version(binary)?;
    let mut probe = Probe {
        binary: binary.to_owned(),
        version,
        refusal: None,
        run_is_tmpfs: kdat::run_is_tmpfs(),
        features: BTreeMap::new(),
    };
    if version < MIN_VERSION {
        probe.refusal = Some(format!(
            "{} is version {version}; at least {MIN_VERSION} is needed: older ones can be attacked by the container \
             that they dump (CVE-2026-18107) and crash on a private configuration file",
            binary.display()
        ));
        return Ok(probe);
    }
    let check = command::run(binary, &["check"], LIMIT)?;
    if !check.status.success() {
        probe.refusal = Some(format!("{} check failed: {}", binary.display(), check.last_line()));
        return Ok(probe);
    }
    for feature in FEATURES {
        let answer = command::run(binary, &["check", "--feature", feature], LIMIT)?;
        probe.features.insert(feature, answer.status.success());
    }
    Ok(probe)
}

fn version(binary: &Path) -> Result<Version> {
    let output = command::run(binary, &["--version"], LIMIT)?;
    let line = output.stdout.lines().find_map(|line| line.strip_prefix("Version:"));
    line.and_then(|version| Version::parse(version.trim())).ok_or_else(|| {
        let answer = if output.stdout.is_empty() { &output.stderr } else { &output.stdout };
        Error::NotCriu { binary: binary.to_owned(), answer: answer.chars().take(80).collect() }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn engine(name: &str) -> PathBuf {
        let prefix = std::env::var_os("STASIS_ENGINES")
            .expect("STASIS_ENGINES must name the prefix with bin/criu (cargo xtask test sets it)");
        PathBuf::from(prefix).join("bin").join(name)
    }

    fn fake(dir: &Path, script: &str) -> PathBuf {
        let path = dir.join("criu");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn versions_are_read_and_ordered() {
        let read = |text| Version::parse(text).unwrap();
        assert_eq!(read("4.2.1").number(), 40201);
        assert_eq!(read("4.2"), Version { major: 4, minor: 2, patch: 0 });
        assert_eq!(read("4.3.0-dirty").to_string(), "4.3.0");
        assert!(read("4.2") < MIN_VERSION && read("4.10") > MIN_VERSION && read("5.0") > MIN_VERSION);
        assert_eq!(Version::parse("four"), None);
        assert_eq!(Version::parse("4"), None);
    }

    #[test]
    fn the_real_binary_is_usable() {
        let probe = probe(&engine("criu")).unwrap();
        assert!(probe.is_usable(), "{probe:?}");
        assert!(probe.version >= MIN_VERSION);
        assert_eq!(probe.features.len(), FEATURES.len());
    }

    #[test]
    fn an_old_binary_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let probe = probe(&fake(dir.path(), "echo Version: 4.1.1")).unwrap();
        let refusal = probe.refusal.unwrap();
        assert!(
            refusal.contains("4.1.1") && refusal.contains("4.2.1") && refusal.contains("CVE-2026-18107"),
            "{refusal}"
        );
    }

    #[test]
    fn a_failing_check_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let script =
            "[ \"$1\" = --version ] && echo Version: 4.2.1 && exit; echo 'no CONFIG_CHECKPOINT_RESTORE' >&2; exit 1";
        let refusal = probe(&fake(dir.path(), script)).unwrap().refusal.unwrap();
        assert!(refusal.contains("no CONFIG_CHECKPOINT_RESTORE"), "{refusal}");
    }

    #[test]
    fn another_program_is_not_taken_for_criu() {
        let dir = tempfile::tempdir().unwrap();
        let error = probe(&fake(dir.path(), "echo something else")).unwrap_err();
        assert!(matches!(error, Error::NotCriu { .. }), "{error}");
    }
}
