//! Freezing, with an answer: a cgroup counts as frozen when the kernel says so, not when it was asked.
//!
//! Version 1: `freezer.state` (kernel: cgroup-v1/freezer-subsystem). Version 2: `cgroup.freeze` and `cgroup.events`.

use crate::cgroup::{Cgroup, Place, read_if_there, write};
use crate::error::{Error, Result};
use crate::parse::{FreezerState, freezer_state, keyed};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a cgroup may take to freeze. Usually it takes less than a millisecond; a process in uninterruptible sleep, as
/// on a dead network file system, can hold it up for ever.
pub const FREEZE_TIME_LIMIT: Duration = Duration::from_secs(10);

/// The first pause between two looks at `freezer.state`; each next one is twice as long, up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_micros(20);

/// The longest pause: the freeze is noticed at most this late.
const PAUSE_MAX: Duration = Duration::from_millis(5);

/// Version 1 can stick in FREEZING while new processes keep appearing; letting go for a moment helps. So many looks are
/// taken before that, as runc does.
const LOOKS_BEFORE_LETTING_GO: u32 = 50;

/// Freezes and waits until it is so. On failure the cgroup has been thawed again.
pub(crate) fn freeze(cgroup: &Cgroup) -> Result<()> {
    let place = freezer(cgroup, "freezing")?;
    let deadline = Instant::now() + FREEZE_TIME_LIMIT;
    let frozen = if place.unified { freeze_v2(place, deadline) } else { freeze_v1(place, deadline) };
    match frozen {
        Ok(true) => Ok(()),
        failed => {
            let thawed = thaw(cgroup);
            failed?;
            thawed?;
            Err(Error::NotFrozen { path: cgroup.path().to_owned(), limit: FREEZE_TIME_LIMIT })
        }
    }
}

pub(crate) fn thaw(cgroup: &Cgroup) -> Result<()> {
    let place = freezer(cgroup, "thawing")?;
    if place.unified {
        write(&place.dir.join("cgroup.freeze"), "0")
    } else {
        write(&place.dir.join("freezer.state"), "THAWED")
    }
}

pub(crate) fn is_frozen(cgroup: &Cgroup) -> Result<bool> {
    let place = cgroup.freezer_place()?;
    if place.unified {
        return events_frozen(place);
    }
    // The root of the freezer has no state; it is never frozen.
    match read_if_there(&place.dir.join("freezer.state"))? {
        Some(text) => Ok(state(place, &text)? == FreezerState::Frozen),
        None => Ok(false),
    }
}

fn freezer<'a>(cgroup: &'a Cgroup, action: &'static str) -> Result<&'a Place> {
    let place = cgroup.freezer_place()?;
    place.refuse_root(action)?;
    Ok(place)
}

/// Whether it froze before the deadline.
fn freeze_v1(place: &Place, deadline: Instant) -> Result<bool> {
    let file = place.dir.join("freezer.state");
    let mut pause = PAUSE_MIN;
    for look in 1u32.. {
        write(&file, "FROZEN")?;
        if state(place, &crate::read(&file)?)? == FreezerState::Frozen {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        if look % LOOKS_BEFORE_LETTING_GO == 0 {
            write(&file, "THAWED")?;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
    Ok(false)
}

fn freeze_v2(place: &Place, deadline: Instant) -> Result<bool> {
    let events = place.dir.join("cgroup.events");
    // Opened, and read, before the request: the kernel wakes a reader for changes after its last read.
    let watch = Events::open(&events)?;
    write(&place.dir.join("cgroup.freeze"), "1")?;
    while !events_frozen(place)? {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        watch.wait()?;
    }
    Ok(true)
}

/// A `cgroup.events` file, which wakes who polls it.
struct Events<'a> {
    path: &'a Path,
    file: File,
}

impl Events<'_> {
    fn open(path: &Path) -> Result<Events<'_>> {
        Ok(Events { path, file: File::open(path).map_err(Error::io("opening", path))? })
    }

    /// Returns after a change, and after [`PAUSE_MAX`] at the latest.
    fn wait(&self) -> Result<()> {
        let timeout = Timespec { tv_sec: 0, tv_nsec: PAUSE_MAX.as_nanos() as i64 };
        match poll(&mut [PollFd::new(&self.file, PollFlags::PRI)], Some(&timeout)) {
            // A file that was changed since it was opened reports it at once; without a pause this would spin.
            Ok(1..) => std::thread::sleep(PAUSE_MIN),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io("polling", self.path)(error.into())),
        }
        Ok(())
    }
}

fn events_frozen(place: &Place) -> Result<bool> {
    match read_if_there(&place.dir.join("cgroup.events"))? {
        Some(text) => Ok(keyed(&text, "frozen") == Some(1)),
        None => Ok(false),
    }
}

fn state(place: &Place, text: &[u8]) -> Result<FreezerState> {
    freezer_state(text).ok_or_else(|| Error::Malformed {
        file: place.dir.join("freezer.state"),
        expected: "THAWED, FREEZING or FROZEN",
        found: String::from_utf8_lossy(text).chars().take(64).collect(),
    })
}
