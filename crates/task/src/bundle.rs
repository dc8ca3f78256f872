//! A task's directory: what it holds to find the task again, and how it goes away.
//!
//! The functions block; they touch a few small files.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stasis_shim_api::layout;
use stasis_sys::file::write_volatile;
use stasis_sys::mount::{mounts_below, unmount_all_below};
use stasis_sys::path::read_limited;

use crate::connection::Endpoint;
use crate::{Error, Result};

const CONFIG: &str = "config.json";
const ROOTFS: &str = "rootfs";
const BOOTSTRAP: &str = "bootstrap.json";
const BINARY: &str = "shim-binary-path";
const SANDBOX: &str = "sandbox";
const LOG: &str = "log";

/// More than the small files here ever hold.
const SMALL_FILE_MAX: u64 = 64 * 1024;

/// containerd's bound for identifiers.
const ID_MAX: usize = 76;

/// Where the shim of a task or pod listens, in containerd's form.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Bootstrap {
    pub(crate) version: u32,
    pub(crate) address: String,
    pub(crate) protocol: String,
}

/// The directory of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bundle {
    pub(crate) dir: PathBuf,
}

/// What the directory says about the task's shim.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) endpoint: Endpoint,
    pub(crate) binary: PathBuf,
    /// The pod whose shim it is; none: the shim was started for this task.
    pub(crate) sandbox_id: Option<String>,
}

/// Refuses an ID that could not be a directory's name, by containerd's rule.
pub(crate) fn check_id(id: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let starts_well = id.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
    if starts_well && id.len() <= ID_MAX && id.bytes().all(plain) {
        return Ok(());
    }
    Err(Error::InvalidArgument(format!(
        "{id:?} is no ID: up to {ID_MAX} letters, digits, '.', '_' and '-', the first a letter or digit"
    )))
}

impl Bundle {
    /// Where the bundle of a task is by default: below its pod's directory, or one of its own.
    pub(crate) fn default_dir(state_dir: &Path, sandbox_id: Option<&str>, task_id: &str) -> PathBuf {
        state_dir.join(sandbox_id.unwrap_or(task_id)).join(layout::BUNDLES).join(task_id)
    }

    /// Makes the directory, what the shim expects in it, and a first record: a task whose creation is cut short from
    /// here on can be found and deleted.
    pub(crate) fn create(dir: PathBuf, spec: &[u8], binary: &Path, sandbox_id: Option<&str>) -> Result<Self> {
        if dir.join(BINARY).exists() {
            return Err(Error::AlreadyExists(format!("a task has its bundle in {} already", dir.display())));
        }
        make_dir(&dir)?;
        // The container's root user may be another than ours (user namespaces), and must get through.
        DirBuilder::new()
            .mode(0o711)
            .create(dir.join(ROOTFS))
            .or_else(|error| if error.kind() == ErrorKind::AlreadyExists { Ok(()) } else { Err(error) })
            .map_err(|error| Error::io("cannot make", dir.join(ROOTFS).display(), error))?;
        write_new(&dir.join(CONFIG), spec)?;
        match sandbox_id {
            Some(sandbox_id) => write_small(&dir.join(SANDBOX), sandbox_id.as_bytes())?,
            // containerd makes this a FIFO and reads it. A file needs no reader: the shim outlives us.
            None => write_new(&dir.join(LOG), b"")?,
        }
        write_binary(&dir, binary)?;
        Ok(Self { dir })
    }

    /// The bundles below the state directory that belong to a task.
    pub(crate) fn list(state_dir: &Path) -> Result<Vec<(String, Self)>> {
        let mut found = Vec::new();
        for pod in read_dir(state_dir)? {
            for dir in read_dir(&pod.join(layout::BUNDLES))? {
                let id = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
                if check_id(&id).is_ok() && dir.join(BINARY).exists() {
                    found.push((id, Self { dir }));
                }
            }
        }
        Ok(found)
    }

    /// What the directory says about the task's shim.
    ///
    /// # Errors
    /// [`Error::NotFound`] where the creation was cut short before there was an endpoint.
    pub(crate) fn read_record(&self) -> Result<Record> {
        let (endpoint, binary) = (read_endpoint(&self.dir)?, read_binary(&self.dir)?);
        let sandbox_id = match read_small(&self.dir.join(SANDBOX)) {
            Ok(id) => Some(String::from_utf8_lossy(&id).into_owned()),
            Err(Error::NotFound(_)) => None,
            Err(error) => return Err(error),
        };
        Ok(Record { endpoint, binary, sandbox_id })
    }

    /// Removes it, and what the shim may have left mounted; never through a mount.
    pub(crate) fn remove(&self) -> Result<()> {
        let failed = |error: std::io::Error| Error::io("cannot remove the bundle", self.dir.display(), error);
        unmount_all_below(&self.dir.join(ROOTFS)).map_err(failed)?;
        if let Some(mount) = mounts_below(&self.dir).map_err(failed)?.first() {
            return Err(failed(std::io::Error::other(format!("{} is still a mount", mount.display()))));
        }
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        // Of a task without a pod the directories above are ours, too; in a pod they are not empty, or not ours.
        if let Some(bundles) = self.dir.parent().filter(|dir| dir.ends_with(layout::BUNDLES))
            && let Some(own) = bundles.parent().filter(|own| own.file_name() == self.dir.file_name())
        {
            let _ = fs::remove_dir(bundles).and_then(|()| fs::remove_dir(own));
        }
        Ok(())
    }
}

/// Writes what the program of a shim is, into a bundle or a pod's directory; before the shim is started.
pub(crate) fn write_binary(dir: &Path, binary: &Path) -> Result<()> {
    write_small(&dir.join(BINARY), binary.as_os_str().as_encoded_bytes())
}

/// What [`write_binary`] wrote.
pub(crate) fn read_binary(dir: &Path) -> Result<PathBuf> {
    use std::os::unix::ffi::OsStringExt as _;
    Ok(std::ffi::OsString::from_vec(read_small(&dir.join(BINARY))?).into())
}

/// Writes where a shim listens.
pub(crate) fn write_endpoint(dir: &Path, endpoint: &Endpoint) -> Result<()> {
    let bootstrap =
        Bootstrap { version: endpoint.version, address: endpoint.address.clone(), protocol: "ttrpc".to_owned() };
    let json = serde_json::to_vec(&bootstrap).map_err(|error| Error::io("cannot write", dir.display(), error))?;
    write_small(&dir.join(BOOTSTRAP), &json)
}

/// What [`write_endpoint`] wrote.
pub(crate) fn read_endpoint(dir: &Path) -> Result<Endpoint> {
    let path = dir.join(BOOTSTRAP);
    let bootstrap: Bootstrap = serde_json::from_slice(&read_small(&path)?)
        .map_err(|error| Error::io("cannot understand", path.display(), error))?;
    Endpoint::new(&bootstrap.address, bootstrap.version, &bootstrap.protocol)
}

/// Where the shim of the pod listens to which the task in `bundle` belongs, if it belongs to one.
pub(crate) fn pod_endpoint(bundle: &Path) -> Result<Option<Endpoint>> {
    if !bundle.join(SANDBOX).exists() {
        return Ok(None);
    }
    let pod = bundle.parent().and_then(Path::parent).unwrap_or(bundle);
    read_endpoint(pod).map(Some)
}

/// Forgets a shim that is gone.
pub(crate) fn remove_shim(dir: &Path) -> Result<()> {
    for name in [BOOTSTRAP, BINARY] {
        match fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Error::io("cannot remove", dir.join(name).display(), error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Runs file work off the asynchronous threads.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Other(format!("a piece of file work ended early: {error}"))),
    }
}

fn make_dir(dir: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o711).create(dir);
    made.map_err(|error| Error::io("cannot make", dir.display(), error))
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(bytes)).map_err(|error| Error::io("cannot write", path.display(), error))
}

/// The directories are of this run of the machine, as the shims are.
fn write_small(path: &Path, bytes: &[u8]) -> Result<()> {
    write_volatile(path, bytes, 0o600).map_err(|error| Error::io("cannot write", path.display(), error))
}

fn read_small(path: &Path) -> Result<Vec<u8>> {
    match read_limited(path, SMALL_FILE_MAX) {
        // What a crash of the machine can leave, where the state directory is on a disk. None of these files is ever empty.
        Ok(bytes) if bytes.is_empty() => Err(Error::NotFound(format!("{} is empty", path.display()))),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(Error::NotFound(format!("{} does not exist", path.display())))
        }
        read => read.map_err(|error| Error::io("cannot read", path.display(), error)),
    }
}

/// The paths in a directory; none if it does not exist or is none.
fn read_dir(dir: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<std::io::Result<_>>()
            .map_err(|error| Error::io("cannot read", dir.display(), error)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(error) => Err(Error::io("cannot read", dir.display(), error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_of_files_and_nothing_more() {
        for good in ["a", "0", "web-1_a.b", &"f".repeat(64)] {
            check_id(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "-a", "_a", "a b", "a\0", "ä", &"f".repeat(77)] {
            assert!(matches!(check_id(bad), Err(Error::InvalidArgument(_))), "{bad:?}");
        }
    }

    #[test]
    fn what_is_written_is_found_again_and_removed() {
        let state = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::new("unix:///run/x.sock", 2, "ttrpc").unwrap();
        let binary = Path::new("/opt/containerd-shim-x-v1");
        let dir = Bundle::default_dir(state.path(), None, "t1");
        let bundle = Bundle::create(dir.clone(), b"{}", binary, None).unwrap();
        assert_eq!(Bundle::list(state.path()).unwrap(), [("t1".to_owned(), bundle.clone())]);
        assert!(matches!(bundle.read_record(), Err(Error::NotFound(_))), "not before it has a shim");
        write_endpoint(&dir, &endpoint).unwrap();
        let read = bundle.read_record().unwrap();
        assert_eq!((read.endpoint, read.binary.as_path(), read.sandbox_id), (endpoint, binary, None));
        assert!(matches!(Bundle::create(dir, b"{}", binary, None), Err(Error::AlreadyExists(_))));
        bundle.remove().unwrap();
        assert_eq!(fs::read_dir(state.path()).unwrap().count(), 0, "nothing stays");
    }

    #[test]
    fn a_pods_directory_stays_when_its_task_goes() {
        let state = tempfile::tempdir().unwrap();
        let dir = Bundle::default_dir(state.path(), Some("pod"), "t1");
        let bundle = Bundle::create(dir, b"{}", Path::new("/x"), Some("pod")).unwrap();
        bundle.remove().unwrap();
        assert!(state.path().join("pod").is_dir());
        assert!(!bundle.dir.exists());
    }
}
