//! The members that say who the container was, out of plain facts about it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::error::{Doing, Error, Result};
use crate::json;
use crate::member::Member;
use crate::schema::{
    BindMount, ConfigDump, ContainerStatus, InternalStatus, StatusImage, StatusMetadata, StatusMount, ZERO_TIME,
};

/// For whose readers an archive is written, where their formats contradict each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// containerd's readers, and ours.
    #[default]
    Containerd,
    /// CRI-O's readers, and ours.
    CriO,
}

/// A container at the moment of its checkpoint.
#[derive(Clone, Debug, Default)]
pub struct ContainerDescription {
    /// Container ID.
    pub id: String,
    /// Name in its pod.
    pub name: String,
    /// Number of earlier attempts.
    pub attempt: u32,
    /// Its pod.
    pub pod: PodDescription,
    /// Its image.
    pub image: ImageDescription,
    /// Name of the runtime, such as `io.containerd.stasis.v1`.
    pub runtime: String,
    /// Labels of the request.
    pub labels: BTreeMap<String, String>,
    /// Annotations of the request.
    pub annotations: BTreeMap<String, String>,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// Nanoseconds since 1970.
    pub started_at: i64,
    /// Nanoseconds since 1970; 0 if it never came out of a checkpoint.
    pub restored_at: i64,
    /// Process ID on the host.
    pub pid: u32,
    /// Path of the log on the host.
    pub log_path: String,
    /// Mounts of the request.
    pub mounts: Vec<MountDescription>,
    /// The OCI spec that it runs by.
    pub spec: Value,
}

/// A pod sandbox.
#[derive(Clone, Debug, Default)]
pub struct PodDescription {
    /// Sandbox ID.
    pub id: String,
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// UID.
    pub uid: String,
}

/// The image of a container.
#[derive(Clone, Debug, Default)]
pub struct ImageDescription {
    /// As the user named it.
    pub requested: String,
    /// By digest, `repository@sha256:…`; empty if it has none.
    pub digest_reference: String,
    /// Some name of it.
    pub name: String,
    /// Image ID, with or without `sha256:`.
    pub id: String,
}

/// A mount of the request.
#[derive(Clone, Debug, Default)]
pub struct MountDescription {
    /// Where in the container.
    pub container_path: String,
    /// Where on the host.
    pub host_path: String,
    /// Whether it is read-only.
    pub readonly: bool,
    /// Whether SELinux relabels it.
    pub selinux_relabel: bool,
    /// CRI's number: 0 private, 1 from the host, 2 both ways.
    pub propagation: i32,
}

impl ContainerDescription {
    /// Writes `config.dump`, `spec.dump`, `status.dump`, `status` and, if there are mounts, `bind.mounts` into `dir`, each
    /// 0600. The time of the checkpoint is now.
    ///
    /// # Errors
    /// Of writing.
    pub fn write_members(&self, dir: &Path, profile: Profile) -> Result<()> {
        let binds = self.bind_mounts();
        let mut members = vec![
            (Member::ConfigDump, json::pretty("config.dump", &self.config(profile))?),
            (Member::SpecDump, json::pretty("spec.dump", &self.marked_spec()?)?),
            (Member::StatusDump, json::pretty("status.dump", &self.status())?),
            (Member::Status, json::pretty("status", &self.internal_status())?),
        ];
        if !binds.is_empty() {
            members.push((Member::BindMounts, json::pretty("bind.mounts", &binds)?));
        }
        for (member, content) in members {
            let path = dir.join(&*member.name());
            let mut options = fs::OpenOptions::new();
            let file = options.write(true).create_new(true).mode(0o600).open(&path);
            std::io::Write::write_all(&mut file.doing_to("create", &path)?, &content).doing_to("write", &path)?;
        }
        Ok(())
    }

    fn config(&self, profile: Profile) -> ConfigDump {
        let id = bare_digest(&self.image.id);
        let digest_reference = Some(&self.image.digest_reference).filter(|reference| !reference.is_empty());
        let reference = match profile {
            Profile::Containerd => digest_reference.cloned().unwrap_or_else(|| self.image.id.clone()),
            Profile::CriO => id.to_owned(),
        };
        let prefix = if profile == Profile::CriO { "k8s_" } else { "" };
        let pod = &self.pod;
        ConfigDump {
            id: self.id.clone(),
            name: format!("{prefix}{}_{}_{}_{}_{}", self.name, pod.name, pod.namespace, pod.uid, self.attempt),
            rootfs_image: self.image.requested.clone(),
            rootfs_image_ref: reference,
            rootfs_image_name: self.image.name.clone(),
            rootfs_image_id: id.to_owned(),
            raw_image_name: String::new(),
            runtime: self.runtime.clone(),
            created_time: rfc3339(self.created_at),
            checkpointed_time: Timestamp::now().to_string(),
            restored_time: rfc3339(self.restored_at),
            restored: self.restored_at != 0,
        }
    }

    /// The spec with the annotations that the peers look for, and without the path of our CRIU configuration file, which
    /// means nothing elsewhere.
    fn marked_spec(&self) -> Result<Value> {
        let mut spec = self.spec.clone();
        let object = spec.as_object_mut().ok_or_else(|| Error::malformed("spec.dump", "it is no JSON object"))?;
        let annotations = object.entry("annotations").or_insert_with(|| Value::Object(Map::new()));
        if !annotations.is_object() {
            *annotations = Value::Object(Map::new());
        }
        if let Some(annotations) = annotations.as_object_mut() {
            annotations.remove(stasis_criu::config::ANNOTATION);
            for (key, value) in self.spec_annotations() {
                annotations.insert(key.to_owned(), value.into());
            }
        }
        Ok(spec)
    }

    fn spec_annotations(&self) -> Vec<(&'static str, String)> {
        let pod = &self.pod;
        let full = format!("{}_{}_{}_{}_{}", self.name, pod.name, pod.namespace, pod.uid, self.attempt);
        vec![
            ("io.kubernetes.cri.container-type", "container".to_owned()),
            ("io.kubernetes.cri.container-name", self.name.clone()),
            ("io.kubernetes.cri.image-name", self.image.requested.clone()),
            ("io.kubernetes.cri.sandbox-id", pod.id.clone()),
            ("io.kubernetes.cri.sandbox-name", pod.name.clone()),
            ("io.kubernetes.cri.sandbox-namespace", pod.namespace.clone()),
            ("io.kubernetes.cri.sandbox-uid", pod.uid.clone()),
            ("io.kubernetes.cri-o.Annotations", json!(self.annotations).to_string()),
            ("io.kubernetes.cri-o.Labels", json!(self.labels).to_string()),
            ("io.kubernetes.cri-o.ContainerID", self.id.clone()),
            ("io.kubernetes.cri-o.ContainerType", "container".to_owned()),
            ("io.kubernetes.cri-o.Name", format!("k8s_{full}")),
            ("io.kubernetes.cri-o.SandboxID", pod.id.clone()),
            ("io.kubernetes.cri-o.SandboxName", format!("k8s_{}_{}_{}_0", pod.name, pod.namespace, pod.uid)),
        ]
    }

    fn status(&self) -> ContainerStatus {
        ContainerStatus {
            id: self.id.clone(),
            metadata: StatusMetadata { name: self.name.clone(), attempt: self.attempt.into() },
            state: 1,
            created_at: self.created_at,
            started_at: self.started_at,
            image: StatusImage { image: self.image.name.clone(), user_specified_image: self.image.requested.clone() },
            image_ref: self.image.digest_reference.clone(),
            labels: self.labels.clone(),
            annotations: self.annotations.clone(),
            mounts: self.mounts.iter().map(MountDescription::status).collect(),
            log_path: self.log_path.clone(),
            image_id: self.image.id.clone(),
        }
    }

    fn internal_status(&self) -> InternalStatus {
        InternalStatus {
            version: "v1".to_owned(),
            pid: self.pid.into(),
            created_at: self.created_at,
            started_at: self.started_at,
            ..InternalStatus::default()
        }
    }

    fn bind_mounts(&self) -> Vec<BindMount> {
        self.mounts.iter().filter(|mount| !mount.host_path.is_empty()).map(MountDescription::bind).collect()
    }
}

impl MountDescription {
    fn status(&self) -> StatusMount {
        StatusMount {
            container_path: self.container_path.clone(),
            host_path: self.host_path.clone(),
            readonly: self.readonly,
            selinux_relabel: self.selinux_relabel,
            propagation: self.propagation.into(),
        }
    }

    fn bind(&self) -> BindMount {
        let facts = fs::metadata(&self.host_path);
        let is_dir = facts.as_ref().is_ok_and(fs::Metadata::is_dir);
        BindMount {
            source: self.host_path.clone(),
            destination: self.container_path.clone(),
            file_type: if is_dir { "directory" } else { "file" }.to_owned(),
            permissions: facts.map_or(0o755, |facts| facts.mode() & 0o777),
        }
    }
}

fn bare_digest(id: &str) -> &str {
    id.strip_prefix("sha256:").unwrap_or(id)
}

fn rfc3339(nanoseconds: i64) -> String {
    match Timestamp::from_nanosecond(nanoseconds.into()) {
        Ok(time) if nanoseconds != 0 => time.to_string(),
        _ => ZERO_TIME.to_owned(),
    }
}
