//! A container's bundle: what the shim reads from and writes to its OCI configuration, and its root file system.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api;
use containerd_shim_protos::shim::oci;
use protobuf::Message as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use stasis_cgroup::{Cgroup, Cgroups, scope_path};
use stasis_criu::OperationConfig;
use stasis_oci_runtime::Runc;
use stasis_sys::mount::{self, Mount};
use stasis_sys::namespace::Kind;
use stasis_sys::path::read_limited;

use crate::error::Error;

/// Largest `config.json` that is read: a generous multiple of one with hundreds of mounts and a long seccomp profile.
const CONFIG_MAX: u64 = 16 << 20;

/// Name of the file that tells [`crate::cleanup`] which OCI runtime has the container.
const RUNTIME_FILE: &str = "runtime.json";

/// Name of CRIU's private configuration of the container. Naming one shuts the host's own out; one operation after the
/// other may write it anew.
pub(crate) const CRIU_CONFIG_FILE: &str = "criu.conf";

/// Where containerd's runc shim keeps runc's state if it is not told.
const DEFAULT_ROOT: &str = "/run/containerd/runc";

/// A bundle and what its configuration says about namespaces.
#[derive(Debug)]
pub(crate) struct Bundle {
    /// Its directory.
    pub(crate) dir: PathBuf,
    namespaces: Vec<(Kind, Option<PathBuf>)>,
    cgroups_path: Option<String>,
    apparmor: Option<String>,
}

/// Options of a task (`containerd.runc.v1.Options`), as far as this shim acts on them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RuntimeOptions {
    binary: PathBuf,
    root: PathBuf,
    /// Whether systemd makes the cgroups.
    pub(crate) systemd_cgroup: bool,
    /// As in [`stasis_oci_runtime::CreateOptions`].
    pub(crate) no_pivot: bool,
    /// As in [`stasis_oci_runtime::CreateOptions`].
    pub(crate) no_new_keyring: bool,
}

impl RuntimeOptions {
    /// Reads the options of a Create; none, or none of runc's, are the defaults. As in containerd's shim, the state
    /// directory is the one of the options, and in it the one of the namespace.
    pub(crate) fn parse(
        options: Option<&protobuf::well_known_types::any::Any>,
        namespace: &str,
    ) -> Result<Self, Error> {
        let message = match options.filter(|any| any.type_url.ends_with("runc.v1.Options")) {
            Some(any) => oci::Options::parse_from_bytes(&any.value)
                .map_err(|error| Error::Invalid(format!("the runtime options cannot be read: {error}")))?,
            None => oci::Options::new(),
        };
        let or = |value: String, default: &str| if value.is_empty() { default.to_owned() } else { value };
        Ok(RuntimeOptions {
            binary: or(message.binary_name, "runc").into(),
            root: Path::new(&or(message.root, DEFAULT_ROOT)).join(namespace),
            systemd_cgroup: message.systemd_cgroup,
            no_pivot: message.no_pivot_root,
            no_new_keyring: message.no_new_keyring,
        })
    }

    /// The runtime whose calls leave their logs in the bundle.
    pub(crate) fn runc(&self, bundle: &Path) -> Runc {
        Runc {
            binary: self.binary.clone(),
            root: self.root.clone(),
            log_dir: bundle.to_path_buf(),
            systemd_cgroup: self.systemd_cgroup,
        }
    }

    /// Leaves word of the runtime in the bundle.
    pub(crate) fn save(&self, bundle: &Path) -> Result<(), Error> {
        let path = bundle.join(RUNTIME_FILE);
        let text = serde_json::to_vec(self).map_err(|error| Error::Internal(error.to_string()))?;
        fs::write(&path, text).map_err(Error::io(format!("writing {}", path.display())))
    }

    /// What [`RuntimeOptions::save`] left; none if the bundle never got that far.
    pub(crate) fn load(bundle: &Path) -> Option<Self> {
        serde_json::from_slice(&read_limited(&bundle.join(RUNTIME_FILE), CONFIG_MAX).ok()?).ok()
    }
}

impl Bundle {
    /// Reads the bundle's configuration and puts CRIU's private configuration file into it, by the annotation that runc
    /// and crun go by. Whatever the annotation said before is overwritten: it names a file that is parsed as root.
    pub(crate) fn open(dir: &Path) -> Result<Bundle, Error> {
        let path = dir.join("config.json");
        let mut config = read_config(&path)?;
        let bundle = Bundle::describe(dir, &config);
        let criu = dir.join(CRIU_CONFIG_FILE);
        write_criu_config(dir, &OperationConfig::default())?;
        let annotations = config
            .as_object_mut()
            .map(|config| config.entry("annotations").or_insert_with(|| Value::Object(Default::default())))
            .ok_or_else(|| Error::Invalid(format!("{} is no JSON object", path.display())))?;
        if annotations.is_null() {
            *annotations = Value::Object(Default::default());
        }
        annotations
            .as_object_mut()
            .ok_or_else(|| Error::Invalid(format!("{}: the annotations are no JSON object", path.display())))?
            .insert(stasis_criu::config::ANNOTATION.to_owned(), criu.to_string_lossy().into());
        let text = serde_json::to_vec(&config).map_err(|error| Error::Internal(error.to_string()))?;
        fs::write(&path, text).map_err(Error::io(format!("writing {}", path.display())))?;
        Ok(bundle)
    }

    /// As [`Bundle::open`], but changes nothing.
    pub(crate) fn look_at(dir: &Path) -> Result<Bundle, Error> {
        Ok(Bundle::describe(dir, &read_config(&dir.join("config.json"))?))
    }

    fn describe(dir: &Path, config: &Value) -> Bundle {
        let cgroups_path = config.pointer("/linux/cgroupsPath").and_then(Value::as_str).map(str::to_owned);
        let profile = config.pointer("/process/apparmorProfile").and_then(Value::as_str);
        let apparmor = profile.filter(|profile| !profile.is_empty()).map(str::to_owned);
        Bundle { dir: dir.to_path_buf(), namespaces: namespaces(config), cgroups_path, apparmor }
    }

    /// The AppArmor profile that the configuration asks for.
    pub(crate) fn apparmor(&self) -> Option<&str> {
        self.apparmor.as_deref()
    }

    /// The cgroup that the OCI runtime will make, before it has; none where the configuration leaves it to the runtime.
    pub(crate) fn cgroup(&self, cgroups: &Cgroups, systemd: bool) -> Option<Cgroup> {
        let path = self.cgroups_path.as_deref()?;
        let path = if systemd {
            let (slice, rest) = path.split_once(':')?;
            let (prefix, name) = rest.split_once(':')?;
            scope_path(slice, prefix, name).ok()?
        } else {
            // A relative one is below the runtime's own.
            path.strip_prefix('/').filter(|rest| !rest.is_empty()).map(|_| path.to_owned())?
        };
        Some(cgroups.at(&path))
    }

    /// Where the root file system is mounted.
    pub(crate) fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// The path of the namespace that the container joins; none if it makes its own, or uses the host's.
    pub(crate) fn joined(&self, kind: Kind) -> Option<&Path> {
        self.namespaces.iter().find(|(of, _)| *of == kind).and_then(|(_, path)| path.as_deref())
    }

    /// Whether the container has its own namespace, which nothing else names.
    pub(crate) fn has_own(&self, kind: Kind) -> bool {
        self.namespaces.iter().any(|(of, path)| *of == kind && path.is_none())
    }

    /// Mounts the root file system. On an error nothing stays mounted.
    pub(crate) fn mount_rootfs(&self, mounts: &[api::Mount]) -> Result<(), Error> {
        let rootfs = self.rootfs();
        if mounts.is_empty() {
            return Ok(());
        }
        match fs::create_dir(&rootfs) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io(format!("creating {}", rootfs.display()))(error));
            }
            _ => {}
        }
        let mounted = mounts.iter().try_for_each(|m| {
            let m = Mount { fs_type: m.type_.clone(), source: m.source.clone(), options: m.options.clone() };
            mount::mount(&m, &rootfs)
        });
        mounted.map_err(|error| {
            // The first error says more than one of the way back would.
            let _ = self.unmount_rootfs();
            Error::io("the root file system")(error)
        })
    }

    /// Takes off everything mounted at and below the root file system.
    pub(crate) fn unmount_rootfs(&self) -> Result<(), Error> {
        mount::unmount_all_below(&self.rootfs()).map_err(Error::io("the root file system"))
    }
}

/// Writes the configuration of the next operation of CRIU on the container.
pub(crate) fn write_criu_config(bundle: &Path, config: &OperationConfig) -> Result<(), Error> {
    let path = bundle.join(CRIU_CONFIG_FILE);
    let text = config.text().map_err(|error| Error::Internal(error.to_string()))?;
    fs::write(&path, text).map_err(Error::io(format!("writing {}", path.display())))
}

fn read_config(path: &Path) -> Result<Value, Error> {
    let text = read_limited(path, CONFIG_MAX).map_err(Error::io(format!("reading {}", path.display())))?;
    serde_json::from_slice(&text).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))
}

fn namespaces(config: &Value) -> Vec<(Kind, Option<PathBuf>)> {
    let kind = |name: &str| match name {
        "network" => Some(Kind::Net),
        "ipc" => Some(Kind::Ipc),
        "uts" => Some(Kind::Uts),
        "pid" => Some(Kind::Pid),
        _ => None,
    };
    let list = config.pointer("/linux/namespaces").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    list.iter()
        .filter_map(|namespace| {
            let path = namespace.get("path").and_then(Value::as_str).filter(|path| !path.is_empty());
            Some((kind(namespace.get("type")?.as_str()?)?, path.map(PathBuf::from)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_names_our_criu_file_and_keeps_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let config = r#"{"ociVersion":"1.2.0","annotations":{"a":"b","org.criu.config":"/tmp/evil"},
            "linux":{"namespaces":[{"type":"network","path":"/n"},{"type":"pid"},{"type":"mount"}]}}"#;
        fs::write(dir.path().join("config.json"), config).unwrap();
        let bundle = Bundle::open(dir.path()).unwrap();
        assert_eq!(bundle.joined(Kind::Net), Some(Path::new("/n")));
        assert_eq!((bundle.joined(Kind::Pid), bundle.has_own(Kind::Pid)), (None, true));
        assert!(!bundle.has_own(Kind::Ipc));

        let written: Value = serde_json::from_slice(&fs::read(dir.path().join("config.json")).unwrap()).unwrap();
        let criu = dir.path().join(CRIU_CONFIG_FILE);
        assert_eq!(written["annotations"]["org.criu.config"], criu.to_str().unwrap());
        assert_eq!((&written["annotations"]["a"], &written["ociVersion"]), (&"b".into(), &"1.2.0".into()));
        assert!(fs::read_to_string(criu).unwrap().contains("network-lock skip"));
    }

    #[test]
    fn the_cgroup_is_where_the_runtime_will_make_it() {
        let cgroups = Cgroups::probe().unwrap();
        let check = |path: &str, systemd: bool, expected: Option<&str>| {
            let config = serde_json::json!({"linux": {"cgroupsPath": path}});
            let cgroup = Bundle::describe(Path::new("/b"), &config).cgroup(&cgroups, systemd);
            assert_eq!(cgroup.as_ref().map(Cgroup::path), expected, "{path}");
        };
        check("/pods/c1", false, Some("/pods/c1"));
        check("a-b.slice:cri:c1", true, Some("/a.slice/a-b.slice/cri-c1.scope"));
        check("relative", false, None);
        check("/", false, None);
    }

    #[test]
    fn a_broken_configuration_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Bundle::open(dir.path()).unwrap_err().to_string().contains("config.json"));
        fs::write(dir.path().join("config.json"), "[]").unwrap();
        assert!(Bundle::open(dir.path()).unwrap_err().to_string().contains("no JSON object"));
    }

    #[test]
    fn options_have_containerds_defaults() {
        let options = RuntimeOptions::parse(None, "k8s.io").unwrap();
        assert_eq!(
            (options.binary.as_path(), options.root.as_path()),
            (Path::new("runc"), Path::new("/run/containerd/runc/k8s.io"))
        );
    }
}
