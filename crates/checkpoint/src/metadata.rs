//! What an archive, or a directory with its members, says about itself, without unpacking anything.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use serde_json::Value;
use stasis_sys::path::Root;

use crate::error::{Doing, Error, Result};
use crate::json;
use crate::limits;
use crate::member::{Dialect, Member};
use crate::reader::{ArchiveReader, Source};
use crate::schema::{ConfigDump, ContainerStatus};

/// Who the container was, as the archive claims.
#[derive(Clone, Debug)]
pub struct ArchiveMetadata {
    /// Whose archive it is.
    pub dialect: Dialect,
    /// `config.dump`.
    pub config: ConfigDump,
    /// `spec.dump`, an OCI runtime spec; for comparison only.
    pub spec: Value,
    /// `status.dump`, which only containerd's and our archives have.
    pub status: Option<ContainerStatus>,
    /// Whether there is a writable layer.
    pub has_rootfs_diff: bool,
    /// The member that holds the container's log.
    pub log: Option<Member>,
}

/// Reads who the container was. An uncompressed archive is skipped through, a compressed one is read to its end.
///
/// # Errors
/// [`Error::Refused`] for an archive that [`crate::reader`] does not accept, [`Error::Missing`] without `config.dump` or
/// `spec.dump`.
pub fn read_metadata(archive: File) -> Result<ArchiveMetadata> {
    Survey::of_archive(archive, &IDENTITY)?.metadata()
}

/// Members that say who the container was.
pub(crate) const IDENTITY: [Member; 3] = [Member::ConfigDump, Member::SpecDump, Member::StatusDump];

/// The members that are there, with the content of some.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    pub(crate) sizes: Vec<(Member, u64)>,
    contents: HashMap<Member, Vec<u8>>,
}

impl Survey {
    /// Looks through an archive and keeps the content of `wanted` members.
    pub(crate) fn of_archive(archive: File, wanted: &[Member]) -> Result<Self> {
        let mut survey = Self::default();
        let mut reader = ArchiveReader::new(Source::new(archive)?);
        while let Some(entry) = reader.next_entry()? {
            if wanted.contains(&entry.member) && entry.size <= limits::DECODED_IMAGE_MAX {
                survey.contents.insert(entry.member.clone(), reader.content()?);
            }
            survey.sizes.push((entry.member, entry.size));
        }
        Ok(survey)
    }

    /// Looks through a directory with the rules of an archive: known names, regular files, no links.
    pub(crate) fn of_dir(dir: &Path, wanted: &[Member]) -> Result<Self> {
        let root = Root::open(dir).doing_to("open", dir)?;
        let mut survey = Self::default();
        survey.add_dir(dir, "")?;
        for member in wanted {
            if let Some(size) = survey.size(member).filter(|size| *size <= limits::DECODED_IMAGE_MAX) {
                let content = root.read(Path::new(&*member.name()), size.max(1));
                survey.contents.insert(member.clone(), content.doing_to(&format!("read {member} in"), dir)?);
            }
        }
        Ok(survey)
    }

    /// Adds the entries of `below` (empty, or a directory member's name and a slash).
    fn add_dir(&mut self, dir: &Path, below: &str) -> Result<()> {
        for entry in fs::read_dir(dir.join(below)).doing_to("list", dir)? {
            let entry = entry.doing_to("list", dir)?;
            let name = format!("{below}{}", entry.file_name().to_string_lossy());
            let refuse = |why: &str| Error::refused(format!("{name:?} {why}"));
            let kind = entry.file_type().doing_to("look at", &entry.path())?;
            let member = Member::parse(&name).ok_or_else(|| refuse("belongs to no checkpoint of a container"))?;
            if kind.is_dir() && member.is_dir() {
                self.sizes.push((member, 0));
                self.add_dir(dir, &format!("{name}/"))?;
            } else if kind.is_file() && !member.is_dir() {
                let size = entry.metadata().doing_to("look at", &entry.path())?.len();
                if size > member.size_max() {
                    return Err(refuse(&format!("has {size} bytes, more than {}", member.size_max())));
                }
                self.sizes.push((member, size));
            } else {
                return Err(refuse("is neither a regular file nor the directory of that name"));
            }
        }
        Ok(())
    }

    pub(crate) fn size(&self, member: &Member) -> Option<u64> {
        self.sizes.iter().find(|(known, _)| known == member).map(|(_, size)| *size)
    }

    pub(crate) fn content(&self, member: &Member) -> Option<&[u8]> {
        self.contents.get(member).map(Vec::as_slice)
    }

    pub(crate) fn metadata(&self) -> Result<ArchiveMetadata> {
        let required = |member, name| self.content(&member).ok_or(Error::Missing(name));
        let config: ConfigDump = json::parse_as("config.dump", required(Member::ConfigDump, "config.dump")?)?;
        let spec = json::parse("spec.dump", required(Member::SpecDump, "spec.dump")?)?;
        if !spec.is_object() {
            return Err(Error::malformed("spec.dump", "it is no JSON object"));
        }
        let status = self.content(&Member::StatusDump);
        let status = status.map(|status| json::parse_as("status.dump", status)).transpose()?;
        let dialect = self.dialect(&config);
        let logs = [dialect, Dialect::Containerd, Dialect::CriO, Dialect::Podman].map(Member::Log);
        let log = logs.into_iter().find(|log| self.size(log).is_some());
        let has_rootfs_diff = self.size(&Member::RootfsDiff).is_some();
        Ok(ArchiveMetadata { dialect, config, spec, status, has_rootfs_diff, log })
    }

    /// Only containerd has a status; podman calls the image's ID by another name than CRI-O.
    fn dialect(&self, config: &ConfigDump) -> Dialect {
        if self.size(&Member::StatusDump).is_some() {
            Dialect::Containerd
        } else if config.rootfs_image_ref.is_empty() && !config.rootfs_image_id.is_empty() {
            Dialect::Podman
        } else if config.rootfs_image_ref.contains('@') {
            Dialect::Containerd
        } else {
            Dialect::CriO
        }
    }
}

/// Opens a member below `root` for reading, without following a link. That it is missing is no error.
pub(crate) fn open_in(root: &Root, member: &Member) -> Result<Option<File>> {
    let name = member.name();
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match root.open_file(Path::new(&*name), flags, Mode::empty()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        opened => File::from(opened.doing(format_args!("open {name}"))?),
    };
    if !file.metadata().doing(format_args!("look at {name}"))?.is_file() {
        return Err(Error::refused(format!("{name} is not a regular file")));
    }
    Ok(Some(file))
}
