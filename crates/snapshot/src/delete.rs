//! Deletes files from an overlay that is not mounted, by a list of their paths: the `deleted.files` of a checkpoint.

use crate::apply::inside;
use crate::error::{Doing, Error, Result};
use crate::overlay;
use crate::tree;
use stasis_sys::mount::open_detached;
use stasis_sys::path::Root;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Deletes `paths`, each with all below it, from the overlay of `upper` over `lowers` (topmost first), which must not be
/// mounted. Paths start at the root of the overlay, with or without a slash; one that is absent is no error. The kernel
/// writes the whiteouts, through a mount that nobody else sees.
pub fn delete_paths(upper: &Path, lowers: &[PathBuf], paths: &[String]) -> Result<()> {
    let work = upper.with_file_name(format!(".work-{}", &stasis_sys::file::random_id()[..16]));
    fs::create_dir(&work).doing("making", &work)?;
    let lowers: Vec<&Path> = lowers.iter().map(PathBuf::as_path).collect();
    let deleted = open_detached(&overlay::mount(&lowers, Some((upper, &work))))
        .doing("mounting the layers below", upper)
        .and_then(|mount| delete(&Root::from_fd(mount), paths));
    let removed = fs::remove_dir_all(&work).doing("removing", &work);
    deleted.and(removed)
}

pub(crate) fn delete(root: &Root, paths: &[String]) -> Result<()> {
    for path in paths {
        let path = inside(Path::new(path))?;
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            return Err(Error::entry(&path, "the root cannot be deleted"));
        };
        match root.open_parent(&path) {
            Ok((parent, _)) => tree::remove(&parent, &name).doing("deleting", &path)?,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(error) => return Err(Error::io("deleting", &path, error)),
        }
    }
    Ok(())
}
