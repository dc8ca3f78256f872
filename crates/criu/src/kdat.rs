//! CRIU's kernel probe cache on hosts where CRIU cannot keep it.
//!
//! CRIU probes the kernel for about 30 ms and saves the result in `/run/criu.kdat`, but only if `/run` is a tmpfs, so
//! that a reboot removes it. Elsewhere every call pays for the probe. There, one file a boot (its name holds the boot ID)
//! keeps the result, and whoever runs CRIU binds it over `/run/criu.kdat` in a mount namespace of its own. A file of
//! another CRIU build is harmless: CRIU compares the build's mark and probes again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::{Error, Result, command};

/// Where CRIU looks for its cache.
const CACHE: &str = "/run/criu.kdat";
/// Magic of a tmpfs in `statfs(2)`.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// Room for the cache while it is made; it is smaller than 1 KiB.
const SCRATCH_BYTES: u64 = 1 << 20;
/// Time for the probe; it takes 50 ms.
const LIMIT: Duration = Duration::from_secs(20);

/// Whether `/run` is a tmpfs: CRIU then keeps its cache itself.
pub fn run_is_tmpfs() -> bool {
    rustix::fs::statfs("/run").is_ok_and(|stat| stat.f_type as u64 == TMPFS_MAGIC)
}

/// The cache file of this boot in `dir`, made now if it is missing. None if CRIU keeps its own, or if the file cannot
/// be bound because the host has no `/run` to bind it in.
///
/// # Errors
/// [`Error::ProbeCache`], [`Error::Spawn`], [`Error::TimedOut`]. A caller can go on without: it is only slower.
pub fn ensure(criu: &Path, dir: &Path) -> Result<Option<PathBuf>> {
    if run_is_tmpfs() {
        return Ok(None);
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let cache = dir.join(format!("criu-{}.kdat", boot.trim()));
    if cache.exists() {
        return Ok(Some(cache));
    }
    let bytes = thread::scope(|scope| scope.spawn(|| make(criu)).join())
        .unwrap_or_else(|_| Err(Error::ProbeCache { path: cache.clone(), why: "the thread panicked".to_owned() }))?;
    stasis_sys::file::write_atomic(&cache, &bytes, 0o600)
        .map_err(|error| Error::ProbeCache { path: cache.clone(), why: error.to_string() })?;
    Ok(Some(cache))
}

/// Shows `cache` as `/run/criu.kdat`. The caller is in a mount namespace of its own.
///
/// # Errors
/// If `/run/criu.kdat` cannot be made or bound over.
pub fn bind(cache: &Path) -> io::Result<()> {
    match fs::OpenOptions::new().write(true).create_new(true).open(CACHE) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    stasis_sys::mount::bind(cache, Path::new(CACHE))
}

/// Runs on a thread of its own, which leaves the process's mount namespace for a private one with a tmpfs on `/run`.
fn make(criu: &Path) -> Result<Vec<u8>> {
    let failed =
        |what: &str, error: io::Error| Error::ProbeCache { path: CACHE.into(), why: format!("{what}: {error}") };
    stasis_sys::thread::private_mounts().map_err(|error| failed("mount namespace", error))?;
    stasis_sys::mount::tmpfs(Path::new("/run"), SCRATCH_BYTES, 0o755, &[]).map_err(|error| failed("/run", error))?;
    let check = command::run(criu, &["check"], LIMIT)?;
    fs::read(CACHE).map_err(|error| failed(&check.last_line(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_made_once_and_kept() {
        let engines = std::env::var_os("STASIS_ENGINES").expect("STASIS_ENGINES must name the prefix with bin/criu");
        let criu = PathBuf::from(engines).join("bin/criu");
        let dir = tempfile::tempdir().unwrap();
        let cache = ensure(&criu, dir.path()).unwrap();
        assert_eq!(cache.is_none(), run_is_tmpfs());
        if let Some(cache) = cache {
            assert!(fs::metadata(&cache).unwrap().len() > 0);
            // Not made again: the binary is not needed any more.
            assert_eq!(ensure(Path::new("/no/criu"), dir.path()).unwrap(), Some(cache));
        }
        assert!(!Path::new(CACHE).exists() || run_is_tmpfs() || fs::metadata(CACHE).unwrap().len() == 0);
    }
}
