//! Network configurations (section 1): found, understood, and read again when the directory changes.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use stasis_sys::path::read_limited;
use tracing::warn;

use crate::NotReady;

/// Versions of the specification that we speak, oldest first. Those before have no chains and another result.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// What a configuration without a version means (section 1).
const VERSION_IF_NONE: &str = "0.1.0";

/// Larger than any configuration that people write.
const FILE_MAX: u64 = 1 << 20;

/// A usable configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkInfo {
    /// Name of the network.
    pub name: String,
    /// Its file.
    pub file: PathBuf,
    /// Version of the specification that is spoken with its plugins.
    pub cni_version: String,
    /// Types of its plugins, in the order of the chain.
    pub plugins: Vec<String>,
}

/// A network: a chain of plugins. This is also the form in which it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Network {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) disable_check: bool,
    pub(crate) disable_gc: bool,
    pub(crate) plugins: Vec<Map<String, Value>>,
}

impl Network {
    /// Reads a list, or a single plugin's configuration as a list of one.
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut object: Map<String, Value> = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let version = choose_version(&object)?;
        let name = object.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        if !is_name(&name) {
            return Err(format!("its name {name:?} must be letters, digits, '.', '_' and '-', the first no sign"));
        }
        let flag = |key: &str| match object.get(key) {
            // Both forms are in use (section 1 says boolean; older texts said string).
            Some(Value::Bool(set)) => *set,
            Some(Value::String(text)) => text.eq_ignore_ascii_case("true"),
            _ => false,
        };
        let (disable_check, disable_gc) = (flag("disableCheck"), flag("disableGC"));
        let plugins = match object.remove("plugins") {
            Some(Value::Array(plugins)) => plugins.into_iter().map(as_object).collect::<Result<Vec<_>, _>>()?,
            Some(_) => return Err("\"plugins\" must be a list".into()),
            None => vec![object],
        };
        let network = Self { name, version, disable_check, disable_gc, plugins };
        if network.plugins.is_empty() {
            return Err("its list of plugins is empty".into());
        }
        if let Some(bad) = network.types().find(|plugin| !is_name(plugin)) {
            return Err(format!("{bad:?} is no plugin's type: the name of a program is needed"));
        }
        Ok(network)
    }

    pub(crate) fn types(&self) -> impl Iterator<Item = &str> {
        self.plugins.iter().map(|plugin| plugin.get("type").and_then(Value::as_str).unwrap_or_default())
    }

    /// Whether it speaks that version or a later one.
    pub(crate) fn speaks(&self, version: &str) -> bool {
        let rank = |version: &str| VERSIONS.iter().position(|known| *known == version);
        rank(&self.version) >= rank(version)
    }

    /// The programs that the chain needs: the plugins and their IPAM plugins.
    fn programs(&self) -> impl Iterator<Item = &str> {
        let ipams = self.plugins.iter().filter_map(|plugin| plugin.get("ipam")?.get("type")?.as_str());
        self.types().chain(ipams.filter(|name| !name.is_empty()))
    }
}

fn as_object(plugin: Value) -> Result<Map<String, Value>, String> {
    match plugin {
        Value::Object(object) => Ok(object),
        other => Err(format!("{other} in its list of plugins is no plugin")),
    }
}

/// The highest version that both sides speak (section 1, "Version considerations").
fn choose_version(object: &Map<String, Value>) -> Result<String, String> {
    let one = object.get("cniVersion").and_then(Value::as_str).filter(|version| !version.is_empty());
    let many = object.get("cniVersions").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let offered: Vec<&str> = match many.chain(one).collect::<Vec<_>>() {
        none if none.is_empty() => vec![VERSION_IF_NONE],
        some => some,
    };
    let best = VERSIONS.iter().rev().find(|version| offered.contains(*version));
    best.map(|version| (*version).to_owned())
        .ok_or_else(|| format!("its cniVersion {} is not supported: {} are", offered.join(", "), VERSIONS.join(", ")))
}

/// libcni's rule for networks; it fits programs, too, and keeps both from being paths.
pub(crate) fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric) && name.bytes().all(plain)
}

/// Finds a plugin's program.
pub(crate) fn find_program(name: &str, bin_dirs: &[PathBuf]) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let is_program =
        |path: &PathBuf| path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
    bin_dirs.iter().map(|dir| dir.join(name)).find(is_program)
}

/// The words for a program that is in none of the directories.
pub(crate) fn missing_program(name: &str, bin_dirs: &[PathBuf]) -> String {
    let dirs: Vec<String> = bin_dirs.iter().map(|dir| dir.display().to_string()).collect();
    format!("its program {name} is in none of {}: install it, or set the plugins' directories", dirs.join(", "))
}

/// What tells one state of the directory from another: name, inode, size and times of each file.
type Signature = Vec<(PathBuf, u64, u64, (i64, i64))>;

type Loaded = Result<Arc<(PathBuf, Network)>, NotReady>;

/// The configuration in a directory, read again when a look at its files tells of a change.
#[derive(Debug, Default)]
pub(crate) struct Source(Mutex<Option<(Signature, Loaded)>>);

impl Source {
    /// The current configuration. Blocks for a look at a few files.
    pub(crate) fn load(&self, dir: &Path) -> Loaded {
        let signature = look(dir)?;
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*known {
            Some((seen, loaded)) if *seen == signature => loaded.clone(),
            _ => {
                let files: Vec<&Path> = signature.iter().map(|(path, ..)| path.as_path()).collect();
                let loaded = read_first(dir, &files);
                known.insert((signature, loaded)).1.clone()
            }
        }
    }
}

fn look(dir: &Path) -> Result<Signature, NotReady> {
    let unreadable = |error: std::io::Error| NotReady {
        reason: format!("the directory of CNI configurations {} cannot be read: {error}", dir.display()),
    };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(unreadable)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        let wanted = path.extension().is_some_and(|kind| kind == "conflist" || kind == "conf" || kind == "json");
        // A file that goes away in between is none.
        if let Some(file) = path.metadata().ok().filter(|file| wanted && file.is_file()) {
            files.push((path, file.ino(), file.size(), (file.mtime(), file.mtime_nsec())));
        }
    }
    files.sort();
    Ok(files)
}

fn read_first(dir: &Path, files: &[&Path]) -> Loaded {
    let mut broken = Vec::new();
    for path in files {
        let read = read_limited(path, FILE_MAX).map_err(|error| error.to_string());
        match read.and_then(|bytes| Network::parse(&bytes)) {
            Ok(network) => return Ok(Arc::new((path.to_path_buf(), network))),
            Err(error) => {
                warn!(file = %path.display(), error, "skipping a broken CNI configuration");
                broken.push(format!("{}: {error}", path.display()));
            }
        }
    }
    let reason = if broken.is_empty() {
        format!("no CNI configuration (.conflist, .conf, .json) in {}: install a network add-on", dir.display())
    } else {
        format!("no valid CNI configuration: {}", broken.join("; "))
    };
    Err(NotReady { reason })
}

/// What a loaded configuration is, if its plugins are there.
pub(crate) fn describe(file: &Path, network: &Network, bin_dirs: &[PathBuf]) -> Result<NetworkInfo, NotReady> {
    if let Some(name) = network.programs().find(|name| !is_name(name) || find_program(name, bin_dirs).is_none()) {
        let why = missing_program(name, bin_dirs);
        return Err(NotReady { reason: format!("CNI network {} ({}): {why}", network.name, file.display()) });
    }
    Ok(NetworkInfo {
        name: network.name.clone(),
        file: file.to_owned(),
        cni_version: network.version.clone(),
        plugins: network.types().map(str::to_owned).collect(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(config: Value) -> Result<Network, String> {
        Network::parse(config.to_string().as_bytes())
    }

    #[test]
    fn lists_and_single_plugins_are_understood() {
        let list = parse(json!({"cniVersion": "1.0.0", "name": "n", "disableCheck": "true",
            "plugins": [{"type": "bridge"}, {"type": "portmap"}]}))
        .unwrap();
        assert_eq!(list.types().collect::<Vec<_>>(), ["bridge", "portmap"]);
        assert!(list.disable_check && !list.disable_gc);
        let single = parse(json!({"cniVersion": "0.3.1", "name": "n", "type": "bridge", "x": 1})).unwrap();
        assert_eq!((single.types().collect::<Vec<_>>(), &single.plugins[0]["x"]), (vec!["bridge"], &json!(1)));
    }

    #[test]
    fn the_highest_common_version_is_chosen() {
        let version = |config| parse(config).map(|network| network.version);
        let plugins = json!([{"type": "p"}]);
        let many =
            json!({"cniVersion": "0.4.0", "cniVersions": ["1.0.0", "1.1.0", "9.0.0"], "name": "n", "plugins": plugins});
        assert_eq!(version(many).unwrap(), "1.1.0");
        assert!(version(json!({"name": "n", "plugins": plugins})).unwrap_err().contains("0.1.0 is not supported"));
        assert!(version(json!({"cniVersion": "9.0.0", "name": "n", "plugins": plugins})).is_err());
        let old = parse(json!({"cniVersion": "0.3.1", "name": "n", "plugins": plugins})).unwrap();
        assert!(old.speaks("0.3.0") && !old.speaks("0.4.0"));
    }

    #[test]
    fn what_could_be_a_path_is_refused() {
        for bad in ["", "../x", "a/b", ".x", "a b"] {
            assert!(parse(json!({"cniVersion": "1.0.0", "name": bad, "plugins": [{"type": "p"}]})).is_err(), "{bad:?}");
            assert!(parse(json!({"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": bad}]})).is_err(), "{bad:?}");
        }
        for broken in [json!({"cniVersion": "1.0.0", "name": "n", "plugins": []}), json!([]), json!("x")] {
            assert!(parse(broken).is_err());
        }
    }

    #[test]
    fn the_first_valid_file_counts_and_changes_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let source = Source::default();
        let load = || source.load(dir.path()).map(|loaded| loaded.1.name.clone()).map_err(|not| not.reason);
        let write = |file: &str, text: &str| fs::write(dir.path().join(file), text).unwrap();
        let named = |name: &str| json!({"cniVersion": "1.0.0", "name": name, "plugins": [{"type": "p"}]}).to_string();

        assert!(load().unwrap_err().contains("no CNI configuration"));
        write("10-a.conflist", "{ broken");
        let reason = load().unwrap_err();
        assert!(reason.contains("10-a.conflist") && reason.contains("line 1"), "{reason}");
        write("20-b.conflist", &named("b"));
        write("05-x.txt", &named("x"));
        assert_eq!(load().unwrap(), "b");
        write("10-a.conflist", &named("a"));
        assert_eq!(load().unwrap(), "a");
        fs::remove_file(dir.path().join("10-a.conflist")).unwrap();
        assert_eq!(load().unwrap(), "b");
    }

    #[test]
    fn a_missing_plugin_is_named() {
        let network = parse(json!({"cniVersion": "1.0.0", "name": "n",
            "plugins": [{"type": "sh", "ipam": {"type": "no-such-ipam"}}]}))
        .unwrap();
        let reason = describe(Path::new("/x"), &network, &["/bin".into()]).unwrap_err().reason;
        assert!(reason.contains("no-such-ipam") && reason.contains("/bin"), "{reason}");
    }
}
