//! The verdict, and with it what a verified checkpoint will be: all that the privileged side gets to know of it.

use serde::{Deserialize, Serialize};
use stasis_criu_image::ImageSet;
use stasis_shim_api::plan::{Plan, PlannedThread};

use crate::error::Refusal;

/// What the helper answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It may be restored, to become this.
    Accepted(Plan),
    /// It may not.
    Refused(Refusal),
}

/// What the images will be.
pub fn plan(set: &ImageSet) -> Plan {
    let threads = set.threads().map(|(process, thread)| {
        let credentials = &thread.credentials;
        let mut groups = credentials.groups.clone();
        groups.sort_unstable();
        let filters = set.filters_of(thread).len();
        PlannedThread {
            tid: thread.tid,
            pid: process.pid,
            uids: credentials.uids,
            gids: credentials.gids,
            groups,
            capabilities: [
                credentials.inheritable,
                credentials.permitted,
                credentials.effective,
                credentials.bounding,
                credentials.ambient,
            ],
            no_new_privileges: credentials.no_new_privileges,
            seccomp: if filters > 0 { 2 } else { thread.seccomp_strict.into() },
            filters: u32::try_from(filters).unwrap_or(u32::MAX),
            label: credentials.label.clone(),
        }
    });
    let living = set.processes.iter().filter_map(|process| Some((process.pid, process.task.as_ref()?)));
    let descriptors = living.map(|(pid, task)| {
        let mut numbers: Vec<u32> = set.descriptors_of(task).iter().map(|(number, _)| *number).collect();
        numbers.sort_unstable();
        (pid, numbers)
    });
    Plan {
        threads: threads.collect(),
        processes: set.processes.len() as u64,
        memory: set.memory,
        mounts: set.mounts.values().flatten().map(|mount| mount.mountpoint.clone()).collect(),
        descriptors: descriptors.collect(),
    }
}
