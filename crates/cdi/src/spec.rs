//! A specification as it is written. Every field of the versions that are accepted is known; any other is an error, since
//! a device without it would not be what its vendor means.

use serde::Deserialize;

/// A file.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Spec {
    pub(crate) cdi_version: String,
    pub(crate) kind: String,
    /// Information for people.
    #[serde(default, rename = "annotations")]
    _annotations: Option<serde_json::Map<String, serde_json::Value>>,
    pub(crate) devices: Vec<Device>,
    /// What every device of the file needs.
    #[serde(default)]
    pub(crate) container_edits: Edits,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Device {
    pub(crate) name: String,
    #[serde(default, rename = "annotations")]
    _annotations: Option<serde_json::Map<String, serde_json::Value>>,
    pub(crate) container_edits: Edits,
}

/// What to change in a container.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Edits {
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Device nodes.
    pub device_nodes: Vec<DeviceNode>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// Programs of the host that the OCI runtime runs.
    pub hooks: Vec<Hook>,
    /// Supplementary groups of the first process.
    pub additional_gids: Vec<u32>,
    /// Cache and memory bandwidth: refused where it is given.
    pub(crate) intel_rdt: Option<serde_json::Value>,
}

/// A device node in the container.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct DeviceNode {
    /// Path in the container.
    pub path: String,
    /// Path on the host, where it is another.
    #[serde(default)]
    pub host_path: String,
    /// `b`, `c`, `u` or `p`; that of the host's node if it is empty.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// Major number; that of the host's node unless it is given.
    #[serde(default)]
    pub major: Option<i64>,
    /// Minor number, likewise.
    #[serde(default)]
    pub minor: Option<i64>,
    /// Mode of the node, likewise.
    #[serde(default)]
    pub file_mode: Option<u32>,
    /// What the container may do with it: any of `r`, `w`, `m`; all where it is empty.
    #[serde(default)]
    pub permissions: String,
    /// Owner; the user of the container unless it is given.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Group, likewise.
    #[serde(default)]
    pub gid: Option<u32>,
}

/// A mount.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Mount {
    /// Path on the host.
    pub host_path: String,
    /// Path in the container.
    pub container_path: String,
    /// Type of the file system; a bind mount where it is empty.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// As `mount(8)` takes them.
    #[serde(default)]
    pub options: Vec<String>,
}

/// A program of the host.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Hook {
    /// When it runs, in the words of the OCI runtime specification.
    pub hook_name: String,
    /// The program.
    pub path: String,
    /// Its arguments, the name first.
    #[serde(default)]
    pub args: Vec<String>,
    /// Its environment.
    #[serde(default)]
    pub env: Vec<String>,
    /// Seconds that it may take.
    #[serde(default)]
    pub timeout: Option<i64>,
}

impl Edits {
    pub(crate) fn append(&mut self, other: &Edits) {
        self.env.extend(other.env.iter().cloned());
        self.device_nodes.extend(other.device_nodes.iter().cloned());
        self.mounts.extend(other.mounts.iter().cloned());
        self.hooks.extend(other.hooks.iter().cloned());
        self.additional_gids.extend(&other.additional_gids);
    }
}
