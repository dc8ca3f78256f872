//! The daemon's two directories: made with their modes, and held by one daemon at a time.

use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::{Context as _, bail};

use crate::config::Config;

/// Images, memory dumps and the state database: root's alone.
const ROOT_MODE: u32 = 0o700;
/// Others may pass through to what is opened to them by name, and list nothing.
const STATE_MODE: u32 = 0o711;
/// Name of the lock file in each directory. It stays; the lock is the kernel's and ends with the process.
const LOCK: &str = "lock";
/// Most that is read of a lock file: one process ID.
const LOCK_READ_MAX: u64 = 32;

/// Both directories, held against a second daemon for as long as this lives.
#[derive(Debug)]
pub(crate) struct Directories {
    _root: File,
    _state: File,
}

impl Directories {
    /// Makes what is missing, sets the modes and takes both locks.
    pub(crate) fn claim(config: &Config) -> anyhow::Result<Self> {
        Ok(Self {
            _root: claim(&config.root, ROOT_MODE, "--root")?,
            _state: claim(&config.state, STATE_MODE, "--state")?,
        })
    }
}

fn claim(dir: &Path, mode: u32, option: &str) -> anyhow::Result<File> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .and_then(|()| std::fs::set_permissions(dir, Permissions::from_mode(mode)))
        .with_context(|| format!("cannot make the directory {} with mode {mode:o}", dir.display()))?;
    lock(dir, option)
}

/// Locks `dir/lock` and leaves our process ID in it for the one who comes second.
fn lock(dir: &Path, option: &str) -> anyhow::Result<File> {
    let path = dir.join(LOCK);
    let describe = || format!("cannot lock {}", path.display());
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(describe)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            file.take(LOCK_READ_MAX).read_to_string(&mut holder).with_context(describe)?;
            bail!(
                "{} is in use by another stasisd (process {}); stop that one, or give this one another {option}",
                dir.display(),
                holder.trim(),
            );
        }
        Err(TryLockError::Error(error)) => return Err(error).with_context(describe),
    }
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .with_context(describe)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn config(dir: &Path) -> Config {
        Config { root: dir.join("lib/root"), state: dir.join("state"), ..Config::default() }
    }

    #[test]
    fn directories_get_their_modes_even_if_they_were_there() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        std::fs::create_dir(&config.state).unwrap();
        std::fs::set_permissions(&config.state, Permissions::from_mode(0o777)).unwrap();
        let _held = Directories::claim(&config).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&config.root), 0o700);
        assert_eq!(mode(&config.state), 0o711);
        assert_eq!(mode(&config.root.join(LOCK)), 0o600);
    }

    #[test]
    fn a_second_claim_is_refused_until_the_first_ends() {
        let dir = tempfile::tempdir().unwrap();
        let first = Directories::claim(&config(dir.path())).unwrap();
        let error = Directories::claim(&config(dir.path())).unwrap_err().to_string();
        let expected = format!(
            "{} is in use by another stasisd (process {}); stop that one, or give this one another --root",
            dir.path().join("lib/root").display(),
            std::process::id(),
        );
        assert_eq!(error, expected);

        let other_root = Config { root: dir.path().join("root2"), ..config(dir.path()) };
        let error = Directories::claim(&other_root).unwrap_err().to_string();
        assert!(error.ends_with("another --state"), "{error}");

        drop(first);
        // A child that another test forks just now holds the lock until its program begins.
        let begin = Instant::now();
        while let Err(error) = Directories::claim(&config(dir.path())) {
            assert!(begin.elapsed() < Duration::from_secs(60), "{error}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
