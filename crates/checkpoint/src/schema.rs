//! The JSON members: their fields as the peers write them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Go's zero time, which is written where there is none.
pub(crate) const ZERO_TIME: &str = "0001-01-01T00:00:00Z";

/// `config.dump`: checkpointctl's ContainerConfig, with the fields that podman has instead. Foreign files may have more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ConfigDump {
    /// Container ID.
    pub id: String,
    /// `<container>_<pod>_<namespace>_<pod uid>_<attempt>` in containerd's form, `k8s_` before it in CRI-O's, a name of
    /// its own in podman's.
    pub name: String,
    /// Image as the user named it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub rootfs_image: String,
    /// Image by digest (`repo@sha256:…`) in containerd's form, by bare ID in CRI-O's.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub rootfs_image_ref: String,
    /// Some name of the image.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub rootfs_image_name: String,
    /// Image ID, 64 hexadecimal digits: podman's, and ours.
    #[serde(rename = "rootfsImageID", skip_serializing_if = "String::is_empty")]
    pub rootfs_image_id: String,
    /// Image as the user named it: podman's.
    #[serde(rename = "RawImageName", skip_serializing_if = "String::is_empty")]
    pub raw_image_name: String,
    /// Name of the runtime.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub runtime: String,
    /// RFC 3339.
    pub created_time: String,
    /// RFC 3339.
    pub checkpointed_time: String,
    /// RFC 3339; zero if the container was never restored.
    pub restored_time: String,
    /// Whether the container had come out of a checkpoint itself.
    pub restored: bool,
}

impl Default for ConfigDump {
    fn default() -> Self {
        let time = || ZERO_TIME.to_owned();
        Self {
            id: String::new(),
            name: String::new(),
            rootfs_image: String::new(),
            rootfs_image_ref: String::new(),
            rootfs_image_name: String::new(),
            rootfs_image_id: String::new(),
            raw_image_name: String::new(),
            runtime: String::new(),
            created_time: time(),
            checkpointed_time: time(),
            restored_time: time(),
            restored: false,
        }
    }
}

/// `status.dump`: CRI's ContainerStatus through Go's encoding/json, so snake_case names, numbers for enums, nothing for
/// zero values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerStatus {
    /// Container ID.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// Name and attempt.
    pub metadata: StatusMetadata,
    /// 0 created, 1 running, 2 exited, 3 unknown.
    #[serde(skip_serializing_if = "is_zero")]
    pub state: i64,
    /// Nanoseconds since 1970.
    #[serde(skip_serializing_if = "is_zero")]
    pub created_at: i64,
    /// Nanoseconds since 1970.
    #[serde(skip_serializing_if = "is_zero")]
    pub started_at: i64,
    /// Image that was asked for.
    pub image: StatusImage,
    /// Image by digest.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub image_ref: String,
    /// Labels of the container.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations of the container.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Mounts of the request.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<StatusMount>,
    /// Path of the log on the host.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub log_path: String,
    /// Image ID.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub image_id: String,
}

/// CRI's ContainerMetadata.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StatusMetadata {
    /// Name of the container in its pod.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Number of earlier attempts.
    #[serde(skip_serializing_if = "is_zero")]
    pub attempt: i64,
}

/// CRI's ImageSpec.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StatusImage {
    /// Name or ID of the image.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub image: String,
    /// Image as the user named it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user_specified_image: String,
}

/// CRI's Mount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StatusMount {
    /// Where in the container.
    pub container_path: String,
    /// Where on the host.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub host_path: String,
    /// Whether it is read-only.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub readonly: bool,
    /// Whether SELinux relabels it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub selinux_relabel: bool,
    /// 0 private, 1 from the host, 2 both ways.
    #[serde(skip_serializing_if = "is_zero")]
    pub propagation: i64,
}

/// `status`: what containerd stores of a container, in Go's field names. checkpointctl reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct InternalStatus {
    /// `v1`.
    pub version: String,
    /// Process ID on the host.
    pub pid: i64,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// Nanoseconds since 1970.
    pub started_at: i64,
    /// Nanoseconds since 1970; 0 while it runs.
    pub finished_at: i64,
    /// Exit code.
    pub exit_code: i64,
    /// Why it ended.
    pub reason: String,
    /// More about why it ended.
    pub message: String,
    /// Whether it is to be restored.
    pub restore: bool,
}

/// An element of `bind.mounts`, which CRI-O reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BindMount {
    /// Where on the host.
    pub source: String,
    /// Where in the container.
    pub destination: String,
    /// `file` or `directory`.
    pub file_type: String,
    /// Permission bits.
    pub permissions: u32,
}

fn is_zero(number: &i64) -> bool {
    *number == 0
}

impl ConfigDump {
    /// Names of the image that the container ran from. Where one of them means one image for ever, by digest or ID, only
    /// such ones: another image may have its tag by now. An ID has the form `sha256:…`.
    pub fn base_candidates(&self) -> Vec<String> {
        let names = self.base_names();
        let sure: Vec<String> = names.iter().filter(|name| is_sure(name)).cloned().collect();
        if sure.is_empty() { names } else { sure }
    }

    /// All names of that image, for people: by digest or ID, then by name.
    pub fn base_names(&self) -> Vec<String> {
        let names = [
            &self.rootfs_image_ref,
            &self.rootfs_image_id,
            &self.rootfs_image_name,
            &self.rootfs_image,
            &self.raw_image_name,
        ];
        let mut candidates: Vec<String> = Vec::new();
        for name in names.into_iter().filter(|name| !name.is_empty()) {
            let is_id = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
            let candidate = if is_id { format!("sha256:{name}") } else { name.clone() };
            if !candidates.contains(&candidate) {
                candidates.push(candidate);
            }
        }
        candidates
    }
}

/// Whether a name of an image means one image for ever.
fn is_sure(name: &str) -> bool {
    name.starts_with("sha256:") || name.contains("@sha256:")
}
