//! What was added to which network, kept so that it can be deleted: one file a pod.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use stasis_sys::file::{sync_dir, write_atomic};
use stasis_sys::path::read_limited;

use crate::config::{Network, is_name};
use crate::{Error, PodNetwork, Result};

/// Version of the file's form.
const VERSION: u32 = 1;

const SUFFIX: &str = ".json";

/// A configuration, a result and little more: both are limited.
const FILE_MAX: u64 = 8 << 20;

/// One pod in its network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Attachment {
    version: u32,
    /// The configuration at the time of the ADD.
    pub(crate) network: Network,
    /// Name of the interface.
    pub(crate) interface: String,
    /// The arguments of the ADD.
    pub(crate) pod: PodNetwork,
    /// The last plugin's result; none: the ADD did not get to its end.
    pub(crate) result: Option<Value>,
}

impl Attachment {
    pub(crate) fn new(network: Network, interface: &str, pod: PodNetwork) -> Self {
        Self { version: VERSION, network, interface: interface.into(), pod, result: None }
    }
}

/// The directory of the files.
#[derive(Clone, Debug)]
pub(crate) struct Cache(pub(crate) PathBuf);

impl Cache {
    fn path(&self, id: &str) -> Result<PathBuf> {
        if is_name(id) { Ok(self.0.join(format!("{id}{SUFFIX}"))) } else { Err(bad_id(id)) }
    }

    /// Keeps it, past a crash of the machine.
    pub(crate) fn put(&self, attachment: &Attachment) -> Result<()> {
        let path = self.path(&attachment.pod.id)?;
        make_dir(&self.0).map_err(|error| Error::cache("cannot make", &self.0, error))?;
        let json = serde_json::to_vec(attachment).map_err(|error| Error::cache("cannot write", &path, error))?;
        write_atomic(&path, &json, 0o600).map_err(|error| Error::write(&path, &error))
    }

    /// What was kept of a pod, if anything.
    pub(crate) fn get(&self, id: &str) -> Result<Option<Attachment>> {
        let path = self.path(id)?;
        let bytes = match read_limited(&path, FILE_MAX) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|error| Error::cache("cannot read", &path, error))?,
        };
        let attachment: Attachment =
            serde_json::from_slice(&bytes).map_err(|error| Error::cache("cannot understand", &path, error))?;
        if attachment.version != VERSION || attachment.pod.id != id {
            return Err(Error::cache("cannot understand", &path, "it is of another version, or of another pod"));
        }
        Ok(Some(attachment))
    }

    /// Forgets a pod. That nothing was kept is no error.
    pub(crate) fn remove(&self, id: &str) -> Result<()> {
        let path = self.path(id)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            removed => {
                removed.and_then(|()| sync_dir(&self.0)).map_err(|error| Error::cache("cannot remove", &path, error))
            }
        }
    }

    /// The pods of which something is kept.
    pub(crate) fn ids(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let ids = entries.filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(SUFFIX)?.to_owned()));
        let mut ids: Vec<String> = ids.filter(|id| is_name(id)).collect();
        ids.sort();
        ids
    }
}

pub(crate) fn bad_id(id: &str) -> Error {
    Error::InvalidArgument(format!("{id:?} is no pod ID: letters, digits, '.', '_' and '-' are needed"))
}

fn make_dir(dir: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}
