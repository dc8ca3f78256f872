//! The process tree: who is whose child, and what every process must have.

use std::collections::{BTreeMap, BTreeSet};

use super::build::SetBuilder;
use super::{Credentials, Process, Task, Thread};
use crate::error::{Error, Fault, Result};
use crate::image::Entry;
use crate::kind::Kind;
use crate::messages::{self, core_entry::March};

/// States of a task that live.
const ALIVE: u32 = 1;
const STOPPED: u32 = 3;
/// The state of one that is dead and not yet waited for.
const DEAD: u32 = 2;

/// What is kept of a core.
#[derive(Debug)]
pub(super) struct Core {
    architecture: March,
    task: Option<CoreTask>,
    thread: Option<Thread>,
}

#[derive(Debug)]
struct CoreTask {
    state: u32,
    limits: Vec<(u64, u64)>,
    login_user: Option<u32>,
    oom_score_adj: Option<i32>,
    cgroup_set: Option<u32>,
    old_seccomp: bool,
}

impl SetBuilder {
    pub(super) fn take_core(&mut self, number: u64, entry: &Entry) -> Result<()> {
        let core: messages::CoreEntry = entry.decode()?;
        let tid = u32::try_from(number).map_err(|_| Error::new(Fault::Malformed, "its number is no process ID"))?;
        let thread = match &core.thread_core {
            Some(thread) => Some(self::thread(tid, thread)?),
            None => None,
        };
        let task = core.tc.as_ref().map(|task| CoreTask {
            state: task.task_state,
            limits: task
                .rlimits
                .iter()
                .flat_map(|limits| &limits.rlimits)
                .map(|limit| (limit.cur, limit.max))
                .collect(),
            login_user: task.loginuid,
            oom_score_adj: task.oom_score_adj,
            cgroup_set: task.cg_set,
            old_seccomp: task.old_seccomp_mode.is_some() || task.old_seccomp_filter.is_some(),
        });
        let labels = thread.as_ref().map_or(0, |thread| {
            let credentials = &thread.credentials;
            4 * credentials.groups.len()
                + credentials.label.as_ref().map_or(0, String::len)
                + credentials.socket_label.as_ref().map_or(0, String::len)
        });
        self.keep(size_of::<Core>() + 16 * task.as_ref().map_or(0, |task| task.limits.len()) + labels + 64)?;
        self.cores.insert(number, Core { architecture: core.mtype(), task, thread });
        Ok(())
    }

    /// One tree, and each process with all that belongs to it.
    pub(super) fn check_tree(&mut self, inventory: &messages::InventoryEntry) -> Result<Vec<Process>> {
        let name = "pstree.img";
        let order = order(&self.tree)?;
        // The set of CRIU itself has no entry.
        let sets: BTreeSet<u32> = self.cgroup.sets.iter().map(|set| set.id).chain(inventory.root_cg_set).collect();
        let mut processes = Vec::with_capacity(order.len());
        let mut threads = BTreeSet::new();
        for at in order {
            let entry = self.tree[at].clone();
            let process = self.process(&entry, &sets)?;
            // CRIU leaves the thread of a zombie to chance.
            let told = if process.task.is_some() { &entry.threads[..] } else { &[entry.pid] };
            if entry.threads.len() != told.len() || told.first() != Some(&entry.pid) {
                let why = format!("the first thread of process {} is not itself", entry.pid);
                return Err(Error::of(name, Fault::Inconsistent, why));
            }
            if let Some(twice) = told.iter().find(|tid| !threads.insert(**tid)) {
                return Err(Error::of(name, Fault::Duplicate, format!("thread {twice} comes twice")));
            }
            processes.push(process);
        }
        self.check_nothing_left(&threads, &processes)?;
        Ok(processes)
    }

    fn process(&mut self, entry: &messages::PstreeEntry, sets: &BTreeSet<u32>) -> Result<Process> {
        let pid = entry.pid;
        let core_name = format!("core-{pid}.img");
        let core = self.cores.remove(&pid.into()).ok_or_else(|| missing(&core_name))?;
        let inconsistent = |why: &str| Error::of(&core_name, Fault::Inconsistent, why);
        let core_task = core.task.ok_or_else(|| inconsistent("it is of a thread, not of a process"))?;
        if core_task.old_seccomp {
            return Err(inconsistent("its seccomp state is told as a CRIU before 3.0 did: dump again"));
        }
        let mut process = Process {
            pid,
            parent: entry.ppid,
            group: entry.pgid,
            session: entry.sid,
            architecture: core.architecture,
            threads: Vec::new(),
            task: None,
        };
        match core_task.state {
            DEAD => return Ok(process),
            ALIVE | STOPPED => {}
            other => return Err(inconsistent(&format!("a task cannot be in state {other}"))),
        }
        let first = core.thread.ok_or_else(|| inconsistent("it says nothing about the thread"))?;
        process.threads.push(Thread { cgroup_set: first.cgroup_set.or(core_task.cgroup_set), ..first });
        for tid in entry.threads.iter().skip(1) {
            let name = format!("core-{tid}.img");
            let core = self.cores.remove(&(*tid).into()).ok_or_else(|| missing(&name))?;
            if core.architecture != process.architecture {
                return Err(Error::of(name, Fault::Inconsistent, "it is of another architecture than its process"));
            }
            let no_thread = || Error::of(&name, Fault::Inconsistent, "it says nothing about the thread");
            process.threads.push(core.thread.ok_or_else(no_thread)?);
        }
        for thread in &process.threads {
            let set = thread.cgroup_set.filter(|set| !sets.contains(set));
            if let Some(set) = set {
                let why = format!("thread {} is in the set {set} of control groups, which is not there", thread.tid);
                return Err(Error::of(&core_name, Fault::Dangling, why));
            }
            if thread.seccomp_filter.is_some_and(|filter| filter as usize >= self.filters.len()) {
                let why = format!("thread {} has a seccomp filter that is not there", thread.tid);
                return Err(Error::of(&core_name, Fault::Dangling, why));
            }
        }
        process.task = Some(self.task(pid, core_task)?);
        Ok(process)
    }

    fn task(&mut self, pid: u32, core: CoreTask) -> Result<Task> {
        let number = u64::from(pid);
        let ids = *self.ids.get(&number).ok_or_else(|| missing(&format!("ids-{pid}.img")))?;
        let (working_directory, root) =
            *self.directories.get(&number).ok_or_else(|| missing(&format!("fs-{pid}.img")))?;
        let (executable, mappings) = self.memory.remove(&number).ok_or_else(|| missing(&format!("mm-{pid}.img")))?;
        if !self.pagemaps.contains_key(&(false, number)) {
            return Err(missing(&format!("pagemap-{pid}.img")));
        }
        if !self.descriptors.contains_key(&ids.files) && !self.images.contains(&(Kind::Descriptors, ids.files.into())) {
            return Err(missing(&format!("fdinfo-{}.img", ids.files)));
        }
        for (what, id) in [("program", executable), ("working directory", working_directory), ("root", root)] {
            if !matches!(self.files.get(&id), Some((messages::FdTypes::Reg, _))) {
                let why = format!("the {what} of process {pid} is file {id}, which is no regular file");
                return Err(Error::of("files.img", Fault::Dangling, why));
            }
        }
        Ok(Task {
            descriptors: ids.files,
            namespaces: ids.namespaces,
            executable,
            working_directory,
            root,
            mappings,
            limits: core.limits,
            login_user: core.login_user,
            oom_score_adj: core.oom_score_adj,
        })
    }

    /// CRIU reads by number and would pass over what no process has; it is refused, as a claim that nobody checks.
    fn check_nothing_left(&self, threads: &BTreeSet<u32>, processes: &[Process]) -> Result<()> {
        let foreign = |name: String| Err(Error::of(name, Fault::Dangling, "it belongs to no process of pstree.img"));
        let is_thread = |number: &u64| u32::try_from(*number).is_ok_and(|tid| threads.contains(&tid));
        let numbered: [(&str, Vec<u64>); 4] = [
            ("core", self.cores.keys().copied().collect()),
            ("ids", self.ids.keys().copied().collect()),
            ("fs", self.directories.keys().copied().collect()),
            ("mm", self.memory.keys().copied().collect()),
        ];
        for (word, numbers) in numbered {
            if let Some(number) = numbers.iter().find(|number| !is_thread(number)) {
                return foreign(format!("{word}-{number}.img"));
            }
        }
        let tables: BTreeSet<u32> =
            processes.iter().filter_map(|process| process.task.as_ref()).map(|task| task.descriptors).collect();
        match self.descriptors.keys().find(|table| !tables.contains(table)) {
            Some(table) => foreign(format!("fdinfo-{table}.img")),
            None => Ok(()),
        }
    }
}

/// The entries of the tree, parents first.
fn order(tree: &[messages::PstreeEntry]) -> Result<Vec<usize>> {
    let name = "pstree.img";
    let mut children: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    let mut pids = BTreeSet::new();
    for (at, entry) in tree.iter().enumerate() {
        if entry.pid == 0 || i32::try_from(entry.pid).is_err() {
            return Err(Error::of(name, Fault::Malformed, format!("{} is no process ID", entry.pid)));
        }
        if !pids.insert(entry.pid) {
            return Err(Error::of(name, Fault::Duplicate, format!("process {} comes twice", entry.pid)));
        }
        children.entry(entry.ppid).or_default().push(at);
    }
    let roots = children.get(&0).map_or(0, Vec::len);
    if roots != 1 {
        return Err(Error::of(
            name,
            Fault::Inconsistent,
            format!("{roots} processes have no parent, one has: the root"),
        ));
    }
    let mut order = children.remove(&0).unwrap_or_default();
    let mut next = 0;
    while let Some(at) = order.get(next) {
        order.extend(children.remove(&tree[*at].pid).unwrap_or_default());
        next += 1;
    }
    match children.keys().next() {
        Some(orphan) => {
            Err(Error::of(name, Fault::Dangling, format!("process {orphan} has children and is not below the root")))
        }
        None => Ok(order),
    }
}

fn thread(tid: u32, core: &messages::ThreadCoreEntry) -> Result<Thread> {
    let malformed = |why: &str| Error::new(Fault::Malformed, why);
    let told = core.creds.as_ref().ok_or_else(|| malformed("it has no credentials: it is of a CRIU before 2.0"))?;
    let set = |words: &[u32]| match words {
        [] => Ok(0),
        [low] => Ok(u64::from(*low)),
        [low, high] => Ok(u64::from(*high) << 32 | u64::from(*low)),
        _ => Err(malformed("a set of capabilities has more than 64")),
    };
    let mode = core.seccomp_mode();
    let filtered = mode == messages::SeccompMode::Filter;
    if filtered != core.seccomp_filter.is_some() {
        return Err(Error::new(Fault::Inconsistent, "its seccomp mode and its filter contradict each other"));
    }
    Ok(Thread {
        tid,
        credentials: Credentials {
            uids: [told.uid, told.euid, told.suid, told.fsuid],
            gids: [told.gid, told.egid, told.sgid, told.fsgid],
            groups: told.groups.clone(),
            inheritable: set(&told.cap_inh)?,
            permitted: set(&told.cap_prm)?,
            effective: set(&told.cap_eff)?,
            bounding: set(&told.cap_bnd)?,
            ambient: set(&told.cap_amb)?,
            secure_bits: told.secbits,
            no_new_privileges: told.no_new_privs.unwrap_or_default() != 0,
            label: told.lsm_profile.clone(),
            socket_label: told.lsm_sockcreate.clone(),
        },
        seccomp_strict: mode == messages::SeccompMode::Strict,
        seccomp_filter: core.seccomp_filter,
        cgroup_set: core.cg_set,
        scheduler: (core.sched_policy(), core.sched_prio()),
        nice: core.sched_nice(),
    })
}

fn missing(name: &str) -> Error {
    Error::of(name, Fault::Dangling, "it is missing")
}
