//! The names of an archive: what they are in each dialect, how large they may be, in which order they are written.

use std::borrow::Cow;
use std::fmt;

use serde::Serialize;

use crate::limits;

/// Whose archive it is, or in whose words an image is marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dialect {
    /// containerd's, which is also ours.
    Containerd,
    /// CRI-O's.
    CriO,
    /// Podman's.
    Podman,
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Containerd => "containerd",
            Self::CriO => "cri-o",
            Self::Podman => "podman",
        })
    }
}

/// A member of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Member {
    /// Identity of the container.
    ConfigDump,
    /// OCI runtime spec.
    SpecDump,
    /// CRI ContainerStatus.
    StatusDump,
    /// containerd's own status.
    Status,
    /// Bind mounts that are not Kubernetes' standard ones.
    BindMounts,
    /// Files of the image that the container deleted.
    DeletedFiles,
    /// Writable layer.
    RootfsDiff,
    /// The container's log under the name of a dialect.
    Log(Dialect),
    /// Addresses of the container.
    NetworkStatus,
    /// Content of a private `/dev/shm`.
    DevShm,
    /// Options of a pod's archive.
    PodOptions,
    /// Description of a pod's archive.
    PodDump,
    /// CRIU's statistics of the dump.
    StatsDump,
    /// CRIU's log of the dump.
    DumpLog,
    /// CRIU's log of an earlier restore.
    RestoreLog,
    /// The directory `checkpoint`.
    ImageDir,
    /// A file in `checkpoint`, by its name there.
    Image(String),
    /// The directory `volumes`.
    VolumeDir,
    /// A file in `volumes`, by its name there.
    Volume(String),
}

/// Directory of CRIU's images.
pub(crate) const IMAGE_DIR: &str = "checkpoint";
const VOLUME_DIR: &str = "volumes";

/// Members that are files at the top, in the order in which they are written.
const FILES: [(&str, Member); 17] = [
    ("config.dump", Member::ConfigDump),
    ("spec.dump", Member::SpecDump),
    ("status.dump", Member::StatusDump),
    ("status", Member::Status),
    ("bind.mounts", Member::BindMounts),
    ("deleted.files", Member::DeletedFiles),
    ("network.status", Member::NetworkStatus),
    ("pod.options", Member::PodOptions),
    ("pod.dump", Member::PodDump),
    ("rootfs-diff.tar", Member::RootfsDiff),
    ("devshm-checkpoint.tar", Member::DevShm),
    ("container.log", Member::Log(Dialect::Containerd)),
    ("io.kubernetes.cri-o.LogPath", Member::Log(Dialect::CriO)),
    ("ctr.log", Member::Log(Dialect::Podman)),
    ("stats-dump", Member::StatsDump),
    ("dump.log", Member::DumpLog),
    ("restore.log", Member::RestoreLog),
];

/// Files in `checkpoint` that are no images.
const IMAGE_DIR_FILES: [&str; 5] = ["descriptors.json", "stats-dump", "stats-restore", "dump.log", "restore.log"];

impl Member {
    /// The member of this name, which has no `./` before and no `/` behind it; none if the name belongs to no dialect.
    pub fn parse(name: &str) -> Option<Self> {
        if let Some((_, member)) = FILES.iter().find(|(known, _)| *known == name) {
            return Some(member.clone());
        }
        match name.split_once('/') {
            None if name == IMAGE_DIR => Some(Self::ImageDir),
            None if name == VOLUME_DIR => Some(Self::VolumeDir),
            Some((IMAGE_DIR, file)) if is_image(file) => Some(Self::Image(file.to_owned())),
            Some((VOLUME_DIR, file)) if is_plain(file) && file.ends_with(".tar") => Some(Self::Volume(file.to_owned())),
            _ => None,
        }
    }

    /// Its name in the archive.
    pub fn name(&self) -> Cow<'static, str> {
        match self {
            Self::Image(file) => format!("{IMAGE_DIR}/{file}").into(),
            Self::Volume(file) => format!("{VOLUME_DIR}/{file}").into(),
            Self::ImageDir => IMAGE_DIR.into(),
            Self::VolumeDir => VOLUME_DIR.into(),
            file => FILES.iter().find(|(_, member)| member == file).map_or("", |(name, _)| name).into(),
        }
    }

    /// Whether it is a directory; all others are regular files.
    pub fn is_dir(&self) -> bool {
        matches!(self, Self::ImageDir | Self::VolumeDir)
    }

    /// Whether it holds memory pages (`checkpoint/pages-N.img`).
    pub fn is_pages(&self) -> bool {
        matches!(self, Self::Image(file) if file.starts_with("pages-"))
    }

    /// Largest size that is accepted.
    pub fn size_max(&self) -> u64 {
        match self {
            Self::ImageDir | Self::VolumeDir => 0,
            Self::DeletedFiles => limits::DELETED_FILES_MAX,
            Self::Log(_) | Self::DumpLog | Self::RestoreLog => limits::LOG_MAX,
            Self::RootfsDiff | Self::DevShm | Self::Volume(_) | Self::Image(_) => limits::FILE_MAX,
            _ => limits::JSON_MAX,
        }
    }

    /// Where it comes in an archive: members are written in ascending order of this.
    pub fn order(&self) -> (usize, String) {
        (self.rank(), self.name().into_owned())
    }

    fn rank(&self) -> usize {
        let at = FILES.iter().position(|(_, file)| file == self).unwrap_or_default();
        match self {
            Self::ImageDir => 100,
            Self::Image(_) if self.is_pages() => 200,
            Self::Image(_) => 101,
            Self::StatsDump | Self::DumpLog | Self::RestoreLog => 110 + at,
            Self::VolumeDir => 150,
            Self::Volume(_) => 151,
            _ => at,
        }
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

fn is_image(file: &str) -> bool {
    is_plain(file) && (file.ends_with(".img") || IMAGE_DIR_FILES.contains(&file))
}

/// A file name that means the same to everybody.
fn is_plain(file: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    !file.is_empty() && !file.starts_with('.') && file.bytes().all(plain)
}
