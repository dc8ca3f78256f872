//! The shim's own log: lines with a time on standard error, which is the file `shim.log`, capped in size.

use std::fmt::Arguments;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;

/// Size at which the log begins anew: a pod may live for years on a tmpfs that many share.
const SIZE_MAX: u64 = 256 * 1024;

static DEBUG: AtomicBool = AtomicBool::new(false);

/// Lets [`debug`] speak.
pub(crate) fn enable_debug() {
    DEBUG.store(true, Ordering::Relaxed);
}

/// Writes a line.
pub(crate) fn line(text: Arguments<'_>) {
    // A log that cannot be written has nobody to tell.
    let _ = write(text);
}

/// Writes a line when debugging.
pub(crate) fn debug(text: Arguments<'_>) {
    if DEBUG.load(Ordering::Relaxed) {
        line(text);
    }
}

fn write(text: Arguments<'_>) -> std::io::Result<()> {
    let mut log = File::from(std::io::stderr().as_fd().try_clone_to_owned()?);
    let meta = log.metadata()?;
    if meta.is_file() && meta.len() > SIZE_MAX {
        log.set_len(0)?;
    }
    log.write_all(format!("{:.3} {text}\n", Timestamp::now()).as_bytes())
}
