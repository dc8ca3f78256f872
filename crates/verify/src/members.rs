//! What the checks see of an archive: images, JSON members, archives of file systems in memory.

use std::io::Read;

use serde_json::Value;
use stasis_checkpoint::reader::{ArchiveReader, Skip};
use stasis_checkpoint::{Member, limits};
use stasis_criu_image::{ImageSet, SetBuilder};

use crate::error::{Reason, Refusal};
use crate::grant::{CgroupHandling, Grant};
use crate::tarball;

/// An archive of a file system in memory holds what a container wrote there; far beyond what fits into memory is none.
const TARBALL_MAX: u64 = 1 << 40;

/// Takes the members of an archive one by one.
#[derive(Debug, Default)]
pub struct Members {
    images: SetBuilder,
    spec: Option<Value>,
    descriptors: Option<Vec<String>>,
    /// Where the first refusal is kept until the checks before it are through.
    tarballs: Vec<(String, tarball::Contents)>,
}

/// Everything of an archive that the checks look at.
#[derive(Debug)]
pub struct Contents {
    /// CRIU's images.
    pub images: ImageSet,
    /// The OCI specification that the archive claims, for comparison only.
    pub spec: Option<Value>,
    /// What the first descriptors were, as the OCI runtime reads it.
    pub descriptors: Vec<String>,
    /// File systems in memory by the name of their archive.
    pub tarballs: Vec<(String, tarball::Contents)>,
}

impl Members {
    /// Goes through an archive once.
    ///
    /// # Errors
    /// The first thing in it that is refused whatever the request.
    pub fn of_archive<R: Skip>(reader: &mut ArchiveReader<R>) -> Result<Contents, Refusal> {
        let mut members = Self::default();
        let form = |error: stasis_checkpoint::Error| Refusal::new(Reason::ArchiveForm, "archive", error.to_string());
        while let Some(entry) = reader.next_entry().map_err(form)? {
            members.add(&entry.member, entry.size, &mut *reader)?;
        }
        members.finish()
    }

    /// Whether the content of a member is looked at; else its size is enough.
    pub fn wants_content(member: &Member) -> bool {
        match member {
            Member::Image(name) => {
                SetBuilder::wants_content(name) || name == "descriptors.json" || name.starts_with("tmpfs-")
            }
            Member::SpecDump | Member::ConfigDump => true,
            _ => false,
        }
    }

    /// Takes a member.
    ///
    /// # Errors
    /// If it is refused whatever the request.
    pub fn add(&mut self, member: &Member, size: u64, content: impl Read) -> Result<(), Refusal> {
        match member {
            Member::SpecDump => self.spec = Some(json(member, content)?),
            Member::ConfigDump => drop(json(member, content)?),
            Member::Image(name) if name == "descriptors.json" => {
                let value = json(member, content)?;
                let malformed = |_| {
                    let why = "it is no list of descriptors";
                    Refusal::new(Reason::DescriptorsMalformed, name.clone(), why)
                };
                self.descriptors = Some(serde_json::from_value(value).map_err(malformed)?);
            }
            Member::Image(name) if name.starts_with("tmpfs-") => {
                self.add_image(name, size, std::io::empty())?;
                let contents = tarball::read(content.take(TARBALL_MAX))
                    .map_err(|why| Refusal::new(Reason::TarRefused, name.clone(), why))?;
                self.tarballs.push((name.clone(), contents));
            }
            Member::Image(name) => self.add_image(name, size, std::io::BufReader::new(content))?,
            _ => {}
        }
        Ok(())
    }

    fn add_image(&mut self, name: &str, size: u64, content: impl Read) -> Result<(), Refusal> {
        self.images.add(name, size, content).map_err(image)
    }

    /// All have come.
    ///
    /// # Errors
    /// If the images do not fit together.
    pub fn finish(self) -> Result<Contents, Refusal> {
        Ok(Contents {
            images: self.images.finish().map_err(image)?,
            spec: self.spec,
            descriptors: self.descriptors.unwrap_or_default(),
            tarballs: self.tarballs,
        })
    }
}

impl Contents {
    /// What the archive's own specification would grant: for a verification without a request.
    pub(crate) fn own_grant(&self) -> Result<Grant, Refusal> {
        let spec = self.spec.as_ref().ok_or_else(|| malformed("spec.dump", "it is missing"))?;
        let grant = Grant::of_spec(spec, &crate::grant::Host::default());
        let grant = grant.map_err(|error| malformed("spec.dump", &error.to_string()))?;
        // Which of these paths the host of the checkpoint had nobody knows any more, nor how it kept control groups.
        Ok(Grant { masked: Vec::new(), read_only: Vec::new(), cgroups: CgroupHandling::Soft, ..grant })
    }
}

fn json(member: &Member, content: impl Read) -> Result<Value, Refusal> {
    let mut text = Vec::new();
    let read = content.take(limits::JSON_MAX + 1).read_to_end(&mut text);
    read.map_err(|error| malformed(&member.name(), &error.to_string()))?;
    if text.len() as u64 > limits::JSON_MAX {
        return Err(malformed(&member.name(), "it is too large"));
    }
    stasis_checkpoint::parse_json(&member.name(), &text).map_err(|error| malformed(&member.name(), &error.to_string()))
}

fn malformed(member: &str, why: &str) -> Refusal {
    Refusal::new(Reason::JsonMalformed, member, why)
}

fn image(error: stasis_criu_image::Error) -> Refusal {
    Refusal::new(Reason::ImageRefused, error.file, format!("{} ({})", error.why, error.fault.code()))
}
