//! What a restore takes out of an unpacked checkpoint: which base image, which mounts must be there, the writable layer,
//! the log. Nothing here is obeyed: callers compare and decide.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;
use stasis_sys::path::Root;

use crate::error::{Doing, Error, Result};
use crate::limits;
use crate::member::{IMAGE_DIR, Member};
use crate::metadata::{ArchiveMetadata, IDENTITY, Survey, open_in};

/// Mounts that every Kubernetes runtime makes by itself, so a request need not have them.
const PROVIDED: [&str; 8] = [
    "/dev/shm",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
    // CRI-O's and podman's own.
    "/run/.containerenv",
    "/run/secrets",
    "/proc",
    "/sys/fs/cgroup",
];

/// A directory that holds the members of a checkpoint: an extracted archive, or the layer of a checkpoint image.
#[derive(Clone, Debug)]
pub struct RestoreSource {
    dir: PathBuf,
    metadata: ArchiveMetadata,
}

impl RestoreSource {
    /// Looks through `dir` with the rules of an archive (known names, regular files, no links) and reads who the
    /// container was. The directory is ours; nobody else writes into it.
    ///
    /// # Errors
    /// [`Error::Refused`] for a directory that holds anything else, [`Error::Missing`] without CRIU's images.
    pub fn open(dir: &Path) -> Result<Self> {
        let survey = Survey::of_dir(dir, &IDENTITY)?;
        if survey.size(&Member::Image("inventory.img".to_owned())).is_none() {
            return Err(Error::Missing("checkpoint/inventory.img"));
        }
        Ok(Self { dir: dir.to_owned(), metadata: survey.metadata()? })
    }

    /// Who the container was, as the archive claims.
    pub fn metadata(&self) -> &ArchiveMetadata {
        &self.metadata
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Directory of CRIU's images.
    pub fn images_dir(&self) -> PathBuf {
        self.dir.join(IMAGE_DIR)
    }

    /// Destinations of the mounts that came from outside the container, which a restore needs again; those that every
    /// runtime makes by itself are left out.
    pub fn external_mounts(&self) -> Vec<String> {
        let mounts = self.metadata.spec.get("mounts").and_then(Value::as_array);
        let external = mounts.into_iter().flatten().filter(|mount| is_bind(mount));
        let destinations = external.filter_map(|mount| mount.get("destination").and_then(Value::as_str));
        destinations.map(normalized).filter(|path| !PROVIDED.contains(&path.as_str())).collect()
    }

    /// Those of [`RestoreSource::external_mounts`] that are not among `destinations`.
    pub fn missing_mounts(&self, destinations: &[&str]) -> Vec<String> {
        let granted: Vec<String> = destinations.iter().map(|path| normalized(path)).collect();
        self.external_mounts().into_iter().filter(|needed| !granted.contains(needed)).collect()
    }

    /// The container's log so far, under the name of any dialect.
    ///
    /// # Errors
    /// If it cannot be opened; that there is none is no error.
    pub fn open_log(&self) -> Result<Option<File>> {
        match &self.metadata.log {
            Some(log) => open_in(&self.root()?, log),
            None => Ok(None),
        }
    }

    /// Files of the base image that the container deleted (`deleted.files`, CRI-O and podman); ours are in the layer.
    ///
    /// # Errors
    /// If the member is malformed.
    pub fn deleted_files(&self) -> Result<Vec<String>> {
        let Some(mut file) = open_in(&self.root()?, &Member::DeletedFiles)? else { return Ok(Vec::new()) };
        let mut content = Vec::new();
        let limit = limits::DELETED_FILES_MAX;
        Read::by_ref(&mut file).take(limit).read_to_end(&mut content).doing("read deleted.files")?;
        // Names alone: no key can occur twice.
        serde_json::from_slice(&content).map_err(|error| Error::malformed("deleted.files", error))
    }

    /// The writable layer: a tar, plain, gzip or zstd, with `.wh.` entries in it if the dialect has them.
    ///
    /// # Errors
    /// If it cannot be opened; that there is none is no error.
    pub fn open_layer(&self) -> Result<Option<File>> {
        open_in(&self.root()?, &Member::RootfsDiff)
    }

    /// What was in the pod's `/dev/shm`: a tar, plain, gzip or zstd.
    ///
    /// # Errors
    /// If it cannot be opened; that there is none is no error.
    pub fn open_dev_shm(&self) -> Result<Option<File>> {
        open_in(&self.root()?, &Member::DevShm)
    }

    fn root(&self) -> Result<Root> {
        Root::open(&self.dir).doing_to("open", &self.dir)
    }
}

fn is_bind(mount: &Value) -> bool {
    let is_bind = |word: &Value| matches!(word.as_str(), Some("bind" | "rbind"));
    let options = mount.get("options").and_then(Value::as_array);
    mount.get("type").is_some_and(is_bind) || options.is_some_and(|options| options.iter().any(is_bind))
}

/// An absolute path without empty or `.` components; `..` stays, and so matches nothing.
fn normalized(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    format!("/{}", parts.join("/"))
}
