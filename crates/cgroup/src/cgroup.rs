//! One cgroup, in every hierarchy it is in.

use crate::Mode;
use crate::error::{Error, Result};
use crate::freeze;
use crate::parse::{self, Hierarchy, check_path};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long processes may take to be gone after SIGKILL: freeing a large memory takes seconds, and dumping core is over
/// by then.
const KILL_TIME_LIMIT: Duration = Duration::from_secs(10);

/// How long a directory may stay busy after its last process is gone: the kernel finishes that asynchronously.
const REMOVE_TIME_LIMIT: Duration = Duration::from_secs(2);

/// The pause between two tries of one of the above.
const PAUSE: Duration = Duration::from_millis(2);

/// The deepest nesting of cgroups that is walked, so that hostile nesting cannot exhaust the stack. The path length allows
/// no more in practice.
const DEPTH_MAX: usize = 256;

/// A cgroup, which may or may not exist. All operations act on every hierarchy that they concern.
#[derive(Debug, Clone)]
pub struct Cgroup {
    mode: Mode,
    path: String,
    places: Vec<Place>,
}

/// The cgroup in one hierarchy.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) path: String,
    pub(crate) mount: PathBuf,
    pub(crate) dir: PathBuf,
    pub(crate) unified: bool,
    hierarchy: Hierarchy,
}

impl Place {
    pub(crate) fn new(hierarchy: &Hierarchy, path: &str) -> Place {
        Place {
            path: path.to_owned(),
            mount: hierarchy.mount.clone(),
            dir: hierarchy.mount.join(path.trim_matches('/')),
            unified: hierarchy.unified,
            hierarchy: hierarchy.clone(),
        }
    }

    pub(crate) fn refuse_root(&self, action: &'static str) -> Result<()> {
        if self.dir == self.mount {
            return Err(Error::Root { action, hierarchy: self.mount.clone() });
        }
        Ok(())
    }
}

/// The place that stands for the whole when processes are listed or frozen.
pub(crate) fn main_place(places: &[Place]) -> Option<&Place> {
    let with = |controller| places.iter().find(move |place: &&Place| place.hierarchy.has(controller));
    with("freezer").or_else(|| with("pids")).or_else(|| places.iter().find(|place| place.unified)).or(places.first())
}

impl Cgroup {
    pub(crate) fn new(mode: Mode, path: String, places: Vec<Place>) -> Cgroup {
        Cgroup { mode, path, places }
    }

    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// The path below the root of the hierarchy.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The directory in the hierarchy of `controller` (any name on version 2), for those who hand it to a runtime or read
    /// a file that has no method here.
    pub fn dir(&self, controller: &'static str) -> Result<&Path> {
        Ok(&self.place(controller)?.dir)
    }

    /// Whether it is there: in the hierarchy that stands for the whole.
    pub fn exists(&self) -> bool {
        check_path(&self.path).is_ok() && main_place(&self.places).is_some_and(|place| place.dir.is_dir())
    }

    /// Makes it and what is missing above it. On version 2, every controller that the host has is enabled for it in its
    /// ancestors, as far as the kernel lets us; on version 1 it is made in every hierarchy, and a cpuset is given its
    /// parent's processors and memory nodes, without which it could hold no process.
    pub fn create(&self) -> Result<()> {
        for place in self.checked_places()? {
            if self.mode == Mode::V1 && place.unified {
                continue;
            }
            create_in(place)?;
        }
        Ok(())
    }

    /// Moves the process `pid` here, in every hierarchy where the cgroup exists.
    pub fn attach(&self, pid: u32) -> Result<()> {
        for place in self.checked_places()? {
            if place.dir.is_dir() {
                write(&place.dir.join("cgroup.procs"), &pid.to_string())?;
            }
        }
        Ok(())
    }

    /// Freezes every process at and below, and returns when the kernel says that they are frozen. After an error they run.
    pub fn freeze(&self) -> Result<()> {
        freeze::freeze(self)
    }

    /// Lets every process run again. No error if they run already.
    pub fn thaw(&self) -> Result<()> {
        freeze::thaw(self)
    }

    /// Whether it is frozen, by itself or by an ancestor. An absent cgroup is not.
    pub fn is_frozen(&self) -> Result<bool> {
        freeze::is_frozen(self)
    }

    /// Ends every process at and below with SIGKILL, frozen ones too, and returns when they are gone.
    pub fn kill_all(&self) -> Result<()> {
        let place = self.main("killing all processes in")?;
        let deadline = Instant::now() + KILL_TIME_LIMIT;
        loop {
            let alive = processes_below(&place.dir, 0)?;
            let Some(first) = alive.first().copied() else { return self.release() };
            if Instant::now() >= deadline {
                let (path, count) = (self.path.clone(), alive.len());
                return Err(Error::StillAlive { path, count, first, limit: KILL_TIME_LIMIT });
            }
            self.kill_once(place, &alive)?;
            std::thread::sleep(PAUSE);
        }
    }

    /// The number of processes here that the kernel has killed for lack of memory.
    pub fn oom_kill_count(&self) -> Result<u64> {
        let place = self.place("memory")?;
        let file = place.dir.join(if place.unified { "memory.events" } else { "memory.oom_control" });
        let text = crate::read(&file)?;
        parse::keyed(&text, "oom_kill").ok_or_else(|| malformed(file, "a line `oom_kill`", &text))
    }

    /// The memory in use here and below, page cache included, in bytes.
    pub fn memory_bytes(&self) -> Result<u64> {
        let place = self.place("memory")?;
        let file = place.dir.join(if place.unified { "memory.current" } else { "memory.usage_in_bytes" });
        let text = crate::read(&file)?;
        parse::number(&text).ok_or_else(|| malformed(file, "a number", &text))
    }

    /// The IDs of all processes here and below, sorted. An absent cgroup has none.
    pub fn procs(&self) -> Result<Vec<u32>> {
        check_path(&self.path)?;
        let place = main_place(&self.places).ok_or(Error::NoCgroups)?;
        let mut all = processes_below(&place.dir, 0)?;
        all.sort_unstable();
        all.dedup();
        Ok(all)
    }

    /// Sets how many processes and threads may be here and below; `None` is no limit.
    pub fn set_pids_max(&self, max: Option<u64>) -> Result<()> {
        let place = self.place("pids")?;
        place.refuse_root("limiting the processes of")?;
        write(&place.dir.join("pids.max"), &max.map_or("max".to_owned(), |max| max.to_string()))
    }

    /// Removes it and everything below it, in every hierarchy. There must be no processes; what is absent already is no
    /// error.
    pub fn remove(&self) -> Result<()> {
        let places = self.checked_places()?;
        for place in places {
            // A process's own cgroup can be the root in some hierarchies; those are not ours to remove.
            place.refuse_root("removing")?;
        }
        let deadline = Instant::now() + REMOVE_TIME_LIMIT;
        places.iter().try_for_each(|place| remove_below(&place.dir, deadline, 0))
    }

    pub(crate) fn freezer_place(&self) -> Result<&Place> {
        self.place("freezer")
    }

    /// The place where `controller` acts. On version 2 it is the only one; freezing needs no controller there.
    fn place(&self, controller: &'static str) -> Result<&Place> {
        check_path(&self.path)?;
        let found = match self.mode {
            Mode::V2 => self.places.first(),
            Mode::V1 => self.places.iter().find(|place| place.hierarchy.has(controller)),
        };
        found.ok_or_else(|| Error::NoController { path: self.path.clone(), controller })
    }

    fn main(&self, action: &'static str) -> Result<&Place> {
        check_path(&self.path)?;
        let place = main_place(&self.places).ok_or(Error::NoCgroups)?;
        place.refuse_root(action)?;
        Ok(place)
    }

    fn checked_places(&self) -> Result<&[Place]> {
        check_path(&self.path)?;
        Ok(&self.places)
    }

    /// Version 2 from Linux 5.14 has one file for it, which misses nobody. Otherwise all are held by the freezer while they
    /// are signalled, so that none can fork and no ID can be used anew; who cannot be frozen is signalled all the same.
    fn kill_once(&self, place: &Place, alive: &[u32]) -> Result<()> {
        if place.unified && write(&place.dir.join("cgroup.kill"), "1").is_ok() {
            return Ok(());
        }
        let held = !place.unified && self.hold_briefly()?;
        let alive = if held { processes_below(&place.dir, 0)? } else { alive.to_vec() };
        for pid in alive.iter().filter_map(|pid| Pid::from_raw(i32::try_from(*pid).ok()?)) {
            match kill_process(pid, Signal::KILL) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => return Err(Error::io("killing processes of", &place.dir)(error.into())),
            }
        }
        self.release()
    }

    /// Asks the version 1 freezer to hold the processes, without waiting for those that cannot be held.
    fn hold_briefly(&self) -> Result<bool> {
        match self.place("freezer") {
            Ok(freezer) => Ok(write(&freezer.dir.join("freezer.state"), "FROZEN").is_ok()),
            Err(Error::NoController { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Lets the processes here, and in cgroups below that are frozen by themselves, run into their end. Version 2 kills
    /// frozen processes as they are.
    fn release(&self) -> Result<()> {
        match self.place("freezer") {
            Ok(freezer) if freezer.unified => written_if_there(write(&freezer.dir.join("cgroup.freeze"), "0")),
            Ok(freezer) => thaw_below(&freezer.dir, 0),
            Err(Error::NoController { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn thaw_below(dir: &Path, depth: usize) -> Result<()> {
    for child in children(dir, depth)? {
        thaw_below(&child, depth + 1)?;
    }
    written_if_there(write(&dir.join("freezer.state"), "THAWED"))
}

fn written_if_there(written: Result<()>) -> Result<()> {
    match written {
        Err(error) if error.is_not_found() => Ok(()),
        done => done,
    }
}

fn create_in(place: &Place) -> Result<()> {
    let mut dir = place.mount.clone();
    for part in place.path.split('/').filter(|part| !part.is_empty()) {
        if place.unified {
            enable_controllers(&dir);
        }
        dir.push(part);
        match fs::create_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io("creating the cgroup", &dir)(error));
            }
            _ => {}
        }
        if place.hierarchy.has("cpuset") {
            inherit_cpuset(&dir)?;
        }
    }
    Ok(())
}

/// One by one, because one that cannot be enabled, as `cpu` under real-time processes, would spoil all of a single write.
/// What is missing then shows itself when a limit is set, with the file's name.
fn enable_controllers(dir: &Path) {
    let available = crate::read(&dir.join("cgroup.controllers")).unwrap_or_default();
    for controller in String::from_utf8_lossy(&available).split_whitespace() {
        let _ = write(&dir.join("cgroup.subtree_control"), &format!("+{controller}"));
    }
}

fn inherit_cpuset(dir: &Path) -> Result<()> {
    let Some(parent) = dir.parent() else { return Ok(()) };
    for name in ["cpuset.cpus", "cpuset.mems"] {
        if crate::read(&dir.join(name))?.trim_ascii().is_empty() {
            let inherited = crate::read(&parent.join(name))?;
            write(&dir.join(name), String::from_utf8_lossy(&inherited).trim())?;
        }
    }
    Ok(())
}

fn processes_below(dir: &Path, depth: usize) -> Result<Vec<u32>> {
    let mut all = match read_if_there(&dir.join("cgroup.procs")) {
        Ok(text) => parse::process_ids(&text.unwrap_or_default()),
        // A threaded cgroup of version 2; its processes are listed in the domain above.
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::Unsupported => Vec::new(),
        Err(error) => return Err(error),
    };
    for child in children(dir, depth)? {
        all.extend(processes_below(&child, depth + 1)?);
    }
    Ok(all)
}

fn remove_below(dir: &Path, deadline: Instant, depth: usize) -> Result<()> {
    for child in children(dir, depth)? {
        remove_below(&child, deadline, depth + 1)?;
    }
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            Err(error) => return Err(Error::io("removing the cgroup", dir)(error)),
        }
    }
}

fn children(dir: &Path, depth: usize) -> Result<Vec<PathBuf>> {
    let failed = |error| Error::io("listing the cgroup", dir)(error);
    if depth >= DEPTH_MAX {
        return Err(failed(io::Error::other("cgroups are nested too deep")));
    }
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut children = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}

/// The content of a file, or `None` when the cgroup is not there, or no more.
pub(crate) fn read_if_there(file: &Path) -> Result<Option<Vec<u8>>> {
    match crate::read(file) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

pub(crate) fn write(file: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    // Not `fs::write`, which would create a file; and with one write, which is what these files act on.
    let written = fs::OpenOptions::new().write(true).open(file).and_then(|mut open| open.write_all(text.as_bytes()));
    written.map_err(Error::io("writing to", file))
}

fn malformed(file: PathBuf, expected: &'static str, text: &[u8]) -> Error {
    Error::Malformed { file, expected, found: String::from_utf8_lossy(text).chars().take(64).collect() }
}
