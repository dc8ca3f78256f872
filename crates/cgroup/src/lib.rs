//! Control groups of version 2, version 1 and hybrid hosts behind one small interface.
//!
//! A [`Cgroup`] is a path below the root of every hierarchy of the host: one hierarchy on version 2, one for each
//! controller or so on version 1. It knows nothing of pods and containers, and it sets no limits of a container: the OCI
//! runtime does that. What it does is what the runtime does not: find, freeze with an answer, count OOM kills, end
//! everything inside, and remove.
//!
//! A handle acts at and below its own path only, with one exception: [`Cgroup::create`] makes the missing directories
//! above, and on version 2 switches the controllers on there.

mod cgroup;
mod error;
mod freeze;
mod parse;
mod stats;
mod systemd;

pub use cgroup::Cgroup;
pub use error::{Error, Result};
pub use freeze::FREEZE_TIME_LIMIT;
pub use stats::{Cpu, Detail, Device, HugePages, Memory, Pids, Pressure, Stall, Stats, Throttling};
pub use systemd::{scope_path, slice_path};

use cgroup::Place;
use parse::Hierarchy;
use std::path::Path;
use std::sync::Arc;

/// The cap on a file of `/proc` or of the cgroup file system that is read whole. The largest is `cgroup.procs`: seven
/// digits and a newline for each of the kernel's four million possible processes.
pub(crate) const FILE_BYTES_MAX: u64 = 32 << 20;

/// Which version the controllers are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The unified hierarchy.
    V2,
    /// Version 1; also hybrid hosts, where the unified hierarchy is there too, but without the controllers that matter.
    V1,
}

/// The control group hierarchies of this host.
#[derive(Debug, Clone)]
pub struct Cgroups {
    mode: Mode,
    hierarchies: Arc<Vec<Hierarchy>>,
}

impl Cgroups {
    /// Finds out what is mounted.
    pub fn probe() -> Result<Cgroups> {
        Cgroups::from_mountinfo(&read(Path::new("/proc/self/mountinfo"))?)
    }

    fn from_mountinfo(mountinfo: &[u8]) -> Result<Cgroups> {
        let hierarchies = parse::hierarchies(mountinfo);
        let mode = if hierarchies.iter().any(|hierarchy| !hierarchy.unified && !hierarchy.controllers.is_empty()) {
            Mode::V1
        } else if hierarchies.iter().any(|hierarchy| hierarchy.unified) {
            Mode::V2
        } else {
            return Err(Error::NoCgroups);
        };
        // A version 1 hierarchy without a controller beside version 2 is systemd's own book-keeping.
        let used = hierarchies.into_iter().filter(|hierarchy| mode == Mode::V1 || hierarchy.unified).collect();
        Ok(Cgroups { mode, hierarchies: Arc::new(used) })
    }

    /// Which version the controllers are in.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The controllers that a cgroup can have on this host, such as `memory` and `pids`, sorted.
    pub fn controllers(&self) -> Vec<String> {
        let mut all: Vec<String> = self.hierarchies.iter().flat_map(Hierarchy::available_controllers).collect();
        all.sort();
        all.dedup();
        all
    }

    /// The cgroup `path` (`/kubepods/…`) below the root of every hierarchy, whether it exists or not. The path is checked
    /// when the handle is used, so that a bad one is an error of that call.
    pub fn at(&self, path: &str) -> Cgroup {
        let places = self.hierarchies.iter().map(|hierarchy| Place::new(hierarchy, path)).collect();
        Cgroup::new(self.mode, path.to_owned(), places)
    }

    /// The cgroup that the process `pid` is in. On version 1 it may have another path in each hierarchy; the handle
    /// then acts on each at its own, and [`Cgroup::path`] is that of the one that freezes, or else counts, processes.
    pub fn of_pid(&self, pid: u32) -> Result<Cgroup> {
        let memberships = parse::memberships(&read(Path::new(&format!("/proc/{pid}/cgroup")))?);
        let mut places = Vec::new();
        for hierarchy in self.hierarchies.iter() {
            if let Some(path) = hierarchy.path_of_member(&memberships) {
                places.push(Place::new(hierarchy, &path));
            }
        }
        let path = cgroup::main_place(&places).map(|place| place.path.clone());
        Ok(Cgroup::new(self.mode, path.ok_or(Error::NoCgroups)?, places))
    }
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    stasis_sys::path::read_limited(path, FILE_BYTES_MAX).map_err(Error::io("reading", path))
}

#[cfg(test)]
mod tests;
