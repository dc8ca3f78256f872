//! Where the programs are that the daemon and its shims run, and what an OCI runtime says that it can do.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use stasis_oci_runtime::Features;
use stasis_sys::capture::{Limits, capture};

use crate::config::{Config, Runtime};

/// Program of our shim: containerd's naming rule applied to the runtime type `io.containerd.stasis.v1`.
pub(crate) const SHIM: &str = "containerd-shim-stasis-v1";
/// Where programs are looked for if the daemon was started without a PATH.
const PATH_FALLBACK: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// For `runc features`, which answers in milliseconds with a few KiB.
const FEATURES_LIMITS: Limits = Limits { time: Duration::from_secs(10), stdout: 256 * 1024, stderr_tail: 1024 };

/// The programs, each as an absolute path; none where there is no such file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Engines {
    pub(crate) runc: Option<PathBuf>,
    pub(crate) criu: Option<PathBuf>,
    pub(crate) shim: Option<PathBuf>,
    /// Directories to search, in order.
    dirs: Vec<PathBuf>,
}

impl Engines {
    /// Looks for everything that `config` names.
    pub(crate) fn locate(config: &Config) -> Self {
        let path = std::env::var_os("PATH").unwrap_or_else(|| PATH_FALLBACK.into());
        let beside = std::env::current_exe().ok().and_then(|program| program.parent().map(Path::to_owned));
        Self::locate_in(config, beside, std::env::split_paths(&path).collect())
    }

    fn locate_in(config: &Config, beside: Option<PathBuf>, path: Vec<PathBuf>) -> Self {
        let dirs: Vec<_> = config.engines.path.iter().cloned().chain(path).filter(|dir| dir.is_absolute()).collect();
        let for_shim: Vec<_> = beside.into_iter().chain(dirs.iter().cloned()).collect();
        Self {
            runc: find(&config.engines.runc, &dirs),
            criu: find(&config.engines.criu, &dirs),
            shim: find(config.shim.path.as_deref().unwrap_or(Path::new(SHIM)), &for_shim),
            dirs,
        }
    }

    /// The OCI runtime of a handler: its own, else that of `[engines]`. A program that was not found keeps its name,
    /// which then stands in the error of whoever runs it.
    pub(crate) fn binary_of(&self, runtime: &Runtime, config: &Config) -> PathBuf {
        let name = runtime.binary.as_ref().unwrap_or(&config.engines.runc);
        find(name, &self.dirs).unwrap_or_else(|| name.clone())
    }

    /// `PATH` for what the daemon starts: the directories of CRIU and runc, then those that were searched.
    pub(crate) fn path(&self) -> OsString {
        let of_engines = [&self.criu, &self.runc].into_iter().flatten().filter_map(|program| program.parent());
        let mut dirs: Vec<&Path> = Vec::new();
        for dir in of_engines.chain(self.dirs.iter().map(PathBuf::as_path)) {
            if !dirs.contains(&dir) {
                dirs.push(dir);
            }
        }
        // A directory with a colon in its name cannot stand in a PATH; the others still can.
        dirs.retain(|dir| !dir.as_os_str().as_encoded_bytes().contains(&b':'));
        std::env::join_paths(dirs).unwrap_or_else(|_| PATH_FALLBACK.into())
    }
}

/// What an OCI runtime says that it can do; nothing if it does not know the question.
pub(crate) fn features(runtime: &Path) -> Option<Features> {
    let answer = capture(Command::new(runtime).arg("features"), &[], &FEATURES_LIMITS).ok()?;
    answer.status.success().then(|| serde_json::from_slice(&answer.stdout).ok()).flatten()
}

/// An absolute path if it is a program, else the first program of that name in `dirs`.
fn find(program: &Path, dirs: &[PathBuf]) -> Option<PathBuf> {
    if program.is_absolute() {
        return is_program(program).then(|| program.to_owned());
    }
    dirs.iter().map(|dir| dir.join(program)).find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn program(dir: &Path, name: &str) -> PathBuf {
        std::fs::create_dir_all(dir).unwrap();
        let path = dir.join(name);
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn configured_directories_come_before_path_and_the_shim_beside_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let runc = program(&at("own"), "runc");
        program(&at("path"), "runc");
        let criu = program(&at("path"), "criu");
        program(&at("path"), SHIM);
        let shim = program(&at("beside"), SHIM);
        std::fs::write(at("own").join("criu"), "not executable").unwrap();

        let mut config = Config::default();
        config.engines.path = vec![at("own")];
        let engines = Engines::locate_in(&config, Some(at("beside")), vec![at("path"), "relative".into()]);
        assert_eq!((&engines.runc, &engines.criu, &engines.shim), (&Some(runc.clone()), &Some(criu), &Some(shim)));
        assert_eq!(engines.path(), *format!("{0}/path:{0}/own", dir.path().display()));

        assert_eq!(engines.binary_of(&Runtime::default(), &config), runc);
        let missing = Runtime { binary: Some("crun".into()), ..Runtime::default() };
        assert_eq!(engines.binary_of(&missing, &config), Path::new("crun"));
    }
}
