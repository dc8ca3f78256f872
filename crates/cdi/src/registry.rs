//! The specifications on the host: found, read once, read again when they changed.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize as _;
use stasis_sys::path::read_limited;

use crate::error::{Error, Result};
use crate::spec::{Edits, Spec};
use crate::{validate, yaml};

/// Largest file: one of a node with many partitioned devices has some hundred KiB.
const FILE_MAX: u64 = 4 << 20;
/// Most files of a directory. Vendors have one each, drivers of dynamic resources one a claim.
const FILES_MAX: usize = 16 * 1024;

/// The devices of this host. Cheap to clone; clones share what was read.
#[derive(Clone, Debug)]
pub struct Registry {
    /// The later overrides the earlier.
    dirs: Vec<PathBuf>,
    read: Arc<Mutex<HashMap<PathBuf, Read>>>,
}

/// A file as it was read, and what tells that it is still the same.
#[derive(Clone, Debug)]
struct Read {
    version: Version,
    spec: std::result::Result<Arc<Spec>, String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    inode: (u64, u64),
    size: u64,
    changed: (i64, i64),
}

/// What is there, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overview {
    /// Qualified names of all devices that can be had, sorted.
    pub devices: Vec<String>,
    /// Files that cannot be used, and names that two files have, and why.
    pub errors: Vec<String>,
}

/// Where a device is: the place of its directory, its file, its specification.
struct Found {
    dir: usize,
    file: PathBuf,
    spec: Arc<Spec>,
    conflict: Option<PathBuf>,
}

impl Registry {
    /// Looks into `dirs`; where two of them have one device, the later one is taken.
    pub fn new(dirs: Vec<PathBuf>) -> Registry {
        Registry { dirs, read: Arc::default() }
    }

    /// What the named devices need together, in the order of the names; what each file asks for all of its devices comes
    /// once, before the first of them. Blocks for the time that reading takes.
    ///
    /// # Errors
    /// For the first device that cannot be had.
    pub fn edits<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<Edits> {
        let mut names = names.into_iter().peekable();
        let mut edits = Edits::default();
        if names.peek().is_none() {
            return Ok(edits);
        }
        let (found, unusable) = self.find();
        let mut files = Vec::new();
        for name in names {
            let Some((_, device)) = validate::qualified(name) else {
                return Err(Error::Name { name: name.to_owned() });
            };
            let Some(at) = found.get(name) else {
                return Err(Error::NotFound { name: name.to_owned(), dirs: self.dirs.clone(), unusable });
            };
            if let Some(other) = &at.conflict {
                return Err(Error::Conflict { name: name.to_owned(), one: at.file.clone(), other: other.clone() });
            }
            if !files.contains(&&at.file) {
                files.push(&at.file);
                edits.append(&at.spec.container_edits);
            }
            if let Some(device) = at.spec.devices.iter().find(|d| d.name == device) {
                edits.append(&device.container_edits);
            }
        }
        Ok(edits)
    }

    /// All devices, and what is wrong. Blocks for the time that reading takes.
    pub fn overview(&self) -> Overview {
        let (found, mut errors) = self.find();
        let mut devices = Vec::new();
        for (name, at) in found {
            match at.conflict {
                Some(other) => errors.push(Error::Conflict { name, one: at.file, other }.to_string()),
                None => devices.push(name),
            }
        }
        devices.sort_unstable();
        errors.sort_unstable();
        Overview { devices, errors }
    }

    /// Devices by qualified name, and files that cannot be used.
    fn find(&self) -> (HashMap<String, Found>, Vec<String>) {
        let (mut devices, mut unusable, mut all) = (HashMap::<String, Found>::new(), Vec::new(), Vec::new());
        for (dir, path) in self.dirs.iter().enumerate() {
            let files = files(path).unwrap_or_else(|error| {
                // That the directory is not there is how most nodes are.
                unusable.extend(error);
                Vec::new()
            });
            for file in files {
                all.push(file.clone());
                let spec = match self.spec(&file) {
                    Ok(spec) => spec,
                    Err(error) => {
                        unusable.push(format!("{}: {error}", file.display()));
                        continue;
                    }
                };
                for device in &spec.devices {
                    let name = format!("{}={}", spec.kind, device.name);
                    let found = Found { dir, file: file.clone(), spec: Arc::clone(&spec), conflict: None };
                    match devices.get_mut(&name) {
                        Some(other) if other.dir == dir => other.conflict = Some(file.clone()),
                        _ => drop(devices.insert(name, found)),
                    }
                }
            }
        }
        self.lock().retain(|file, _| all.contains(file));
        (devices, unusable)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, Read>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The specification in a file, as it is now.
    fn spec(&self, file: &Path) -> std::result::Result<Arc<Spec>, String> {
        let version = version(file)?;
        if let Some(read) = self.lock().get(file).filter(|read| read.version == version) {
            return read.spec.clone();
        }
        let spec = parse(file).map(Arc::new);
        // If it changed while it was read, the next look finds another version than this one.
        self.lock().insert(file.to_owned(), Read { version, spec: spec.clone() });
        spec
    }
}

fn version(file: &Path) -> std::result::Result<Version, String> {
    let facts = std::fs::metadata(file).map_err(|error| error.to_string())?;
    Ok(Version { inode: (facts.dev(), facts.ino()), size: facts.size(), changed: (facts.ctime(), facts.ctime_nsec()) })
}

fn parse(file: &Path) -> std::result::Result<Spec, String> {
    let bytes = read_limited(file, FILE_MAX).map_err(|error| error.to_string())?;
    let text = String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
    let spec = if file.extension().is_some_and(|extension| extension == "json") {
        serde_json::from_str(&text).map_err(|error| error.to_string())
    } else {
        Spec::deserialize(yaml::parse(&text)?).map_err(|error| error.to_string())
    };
    let spec = spec?;
    validate::spec(&spec)?;
    Ok(spec)
}

/// The specifications of a directory, sorted; others' files are left alone. No error text if it is not there.
fn files(dir: &Path) -> std::result::Result<Vec<PathBuf>, Option<String>> {
    let failed = |error: std::io::Error| {
        (error.kind() != std::io::ErrorKind::NotFound).then(|| format!("{}: {error}", dir.display()))
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "json" || extension == "yaml") {
            files.push(path);
        }
        if files.len() > FILES_MAX {
            return Err(Some(format!("{}: more than {FILES_MAX} files", dir.display())));
        }
    }
    files.sort_unstable();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const JSON: &str = r#"{"cdiVersion":"0.6.0","kind":"v.com/gpu","containerEdits":{"env":["ALL=1"]},
        "devices":[{"name":"0","containerEdits":{"env":["GPU=0"]}},{"name":"1","containerEdits":{"env":["GPU=1"]}}]}"#;

    fn yaml(value: &str) -> String {
        format!(
            "cdiVersion: 0.5.0\nkind: v.com/net\ndevices:\n- name: eth\n  containerEdits:\n    env: [\"NET={value}\"]\n"
        )
    }

    #[test]
    fn devices_are_found_and_files_read_again_when_they_change() {
        let dir = tempfile::tempdir().expect("a directory");
        let (etc, run) = (dir.path().join("etc"), dir.path().join("run"));
        let registry = Registry::new(vec![etc.clone(), run.clone()]);
        assert_eq!(registry.overview(), Overview::default(), "no directory, no device, no error");
        fs::create_dir(&etc).expect("etc");
        fs::write(etc.join("gpu.json"), JSON).expect("JSON");
        fs::write(etc.join("net.yaml"), yaml("old")).expect("YAML");
        fs::write(etc.join("README"), "not ours").expect("text");
        let env = |names: &[&str]| registry.edits(names.iter().copied()).map(|edits| edits.env);
        assert_eq!(
            env(&["v.com/gpu=1", "v.com/net=eth", "v.com/gpu=0"]),
            Ok(["ALL=1", "GPU=1", "NET=old", "GPU=0"].map(str::to_owned).to_vec())
        );
        fs::write(etc.join("net.yaml"), yaml("new")).expect("YAML");
        assert_eq!(env(&["v.com/net=eth"]), Ok(vec!["NET=new".to_owned()]));
        fs::create_dir(&run).expect("run");
        fs::write(run.join("net.yaml"), yaml("run")).expect("YAML");
        assert_eq!(env(&["v.com/net=eth"]), Ok(vec!["NET=run".to_owned()]), "the later directory");
        fs::write(run.join("net2.yaml"), yaml("two")).expect("YAML");
        assert!(matches!(env(&["v.com/net=eth"]), Err(Error::Conflict { .. })));
        let overview = registry.overview();
        assert_eq!(overview.devices, ["v.com/gpu=0", "v.com/gpu=1"]);
        assert!(overview.errors.len() == 1 && overview.errors[0].contains("v.com/net=eth"), "{overview:?}");
        fs::remove_file(run.join("net2.yaml")).expect("remove");
        assert_eq!(env(&["v.com/net=eth"]), Ok(vec!["NET=run".to_owned()]));
    }

    #[test]
    fn a_wrong_file_takes_away_its_own_devices_and_says_why() {
        let dir = tempfile::tempdir().expect("a directory");
        let registry = Registry::new(vec![dir.path().to_owned()]);
        fs::write(dir.path().join("gpu.json"), JSON).expect("JSON");
        fs::write(dir.path().join("bad.json"), JSON.replace("kind", "sort")).expect("JSON");
        fs::write(dir.path().join("tab.yaml"), "a:\t- b\n\tc").expect("YAML");
        assert!(registry.edits(["v.com/gpu=0"]).is_ok());
        let error = registry.edits(["v.com/gpu=2"]).expect_err("absent").to_string();
        for word in ["v.com/gpu=2", "bad.json", "sort", "tab.yaml"] {
            assert!(error.contains(word), "{error}");
        }
        assert!(matches!(registry.edits(["gpu"]), Err(Error::Name { .. })));
    }
}
