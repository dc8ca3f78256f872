//! The careful end of a CRIU that may hold TCP connections of a container.
//!
//! CRIU keeps the sockets that it dumps in repair mode until it lets the processes go. Killed in between it leaves them so, and
//! the processes find every connection broken. So the container is frozen first, which keeps its processes from noticing;
//! then CRIU is killed; then the sockets are put right; then the container runs.

use std::fs;
use std::time::Duration;

use stasis_cgroup::Cgroup;
use stasis_sys::socket;

use crate::journal;

/// How long the container may take to be frozen; it is microseconds, unless CRIU is just setting it running.
pub(crate) const HOLD_LIMIT: Duration = Duration::from_millis(500);

/// One attempt to freeze the container: whether it is frozen now.
pub(crate) fn hold(cgroup: &Cgroup) -> bool {
    cgroup.freeze().and_then(|()| cgroup.is_frozen()).unwrap_or(false)
}

/// Takes all sockets of the container's processes out of repair mode. CRIU is gone, and the container frozen.
pub(crate) fn end_repair(cgroup: &Cgroup) {
    for pid in cgroup.procs().unwrap_or_default().into_iter().map(u32::cast_signed) {
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let is_socket = |entry: &fs::DirEntry| {
            fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
        };
        let sockets = entries.filter(is_socket).filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        match socket::end_repair(pid, sockets) {
            Ok(0) => {}
            Ok(ended) => journal::line(format_args!("{ended} connections of process {pid} were put right again")),
            Err(error) => journal::line(format_args!("the connections of process {pid} may be broken: {error}")),
        }
    }
}
