//! All images of one dump, and whether they fit together.
//!
//! A set is filled file by file, in any order, and keeps of each what later questions need: about 100 bytes a memory
//! mapping, 24 a run of pages. What it is once [`SetBuilder::finish`] has found it in order: a tree with one root, whose
//! every process has its cores, memory and descriptors, whose page maps lie in its mappings and use up their pages to
//! the byte, and in which nothing refers to what is not there.

mod build;
mod files;
mod memory;
mod tree;

use std::collections::{BTreeMap, BTreeSet};

use crate::messages;

pub use build::SetBuilder;

/// Size of a page in the images of every architecture that is told apart here.
pub const PAGE_SIZE: u64 = 4096;

/// A dump whose images fit together.
#[derive(Clone, Debug)]
pub struct ImageSet {
    /// What CRIU says of the dump as a whole.
    pub inventory: messages::InventoryEntry,
    /// The processes, each after its parent; the first is the root.
    pub processes: Vec<Process>,
    /// What descriptors, mappings and directories refer to.
    pub files: BTreeMap<u32, File>,
    /// Tables of descriptors by their ID: number of the descriptor and file.
    pub descriptors: BTreeMap<u32, Vec<(u32, u32)>>,
    /// Mounts by the ID of their namespace.
    pub mounts: BTreeMap<u32, Vec<messages::MntEntry>>,
    /// Seccomp filters: instructions, and the filter before it.
    pub filters: Vec<messages::SeccompFilter>,
    /// Control groups.
    pub cgroup: messages::CgroupEntry,
    /// Deleted files that are kept.
    pub ghosts: BTreeMap<u64, Ghost>,
    /// Deleted or procfs files: the file, the ghost or process it stands for, how.
    pub remaps: Vec<messages::RemapFilePathEntry>,
    /// Maps of user IDs by their namespace.
    pub user_namespaces: BTreeMap<u32, messages::UsernsEntry>,
    /// Names of hosts by their namespace.
    pub host_names: BTreeMap<u32, messages::UtsnsEntry>,
    /// Terminals.
    pub terminals: Vec<messages::TtyInfoEntry>,
    /// The names of all files of the dump.
    pub names: BTreeSet<String>,
    /// Bytes of memory.
    pub memory: u64,
    /// CPU of the dump, if it was told.
    pub cpu: Option<messages::CpuinfoEntry>,
}

/// A process.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its ID in the dump's PID namespace.
    pub pid: u32,
    /// Its parent; 0 for the root.
    pub parent: u32,
    /// Process group.
    pub group: u32,
    /// Session.
    pub session: u32,
    /// Architecture, as CRIU numbers it.
    pub architecture: messages::core_entry::March,
    /// Its threads, the first being the process; none of a zombie.
    pub threads: Vec<Thread>,
    /// What a living process has; none for a zombie.
    pub task: Option<Task>,
}

/// What a living process has.
#[derive(Clone, Debug)]
pub struct Task {
    /// ID of its table of descriptors.
    pub descriptors: u32,
    /// Its namespaces.
    pub namespaces: Namespaces,
    /// Its program, a file.
    pub executable: u32,
    /// Its working directory, a file.
    pub working_directory: u32,
    /// Its root directory, a file.
    pub root: u32,
    /// Memory mappings in ascending order.
    pub mappings: Vec<Mapping>,
    /// Limits (soft, hard), in the order of the kernel's numbers.
    pub limits: Vec<(u64, u64)>,
    /// Audit's login user.
    pub login_user: Option<u32>,
    /// Adjustment of the OOM score.
    pub oom_score_adj: Option<i32>,
}

/// IDs of namespaces; CRIU numbers them, and the inventory names the ones around the dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// Process IDs.
    pub pid: u32,
    /// Network.
    pub net: u32,
    /// System V IPC.
    pub ipc: u32,
    /// Host name.
    pub uts: u32,
    /// Mounts.
    pub mnt: u32,
    /// Users.
    pub user: u32,
    /// Control groups.
    pub cgroup: u32,
    /// Clocks.
    pub time: u32,
}

/// A thread.
#[derive(Clone, Debug)]
pub struct Thread {
    /// Its ID in the dump's PID namespace.
    pub tid: u32,
    /// Who it is and what it may.
    pub credentials: Credentials,
    /// Whether strict seccomp is on.
    pub seccomp_strict: bool,
    /// Its last seccomp filter.
    pub seccomp_filter: Option<u32>,
    /// Its set of control groups.
    pub cgroup_set: Option<u32>,
    /// Scheduler and its priority.
    pub scheduler: (u32, u32),
    /// Nice value.
    pub nice: i32,
}

/// Who a thread is and what it may.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// Real, effective, saved and file system user.
    pub uids: [u32; 4],
    /// The same of the group.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Capabilities.
    pub inheritable: u64,
    /// Capabilities.
    pub permitted: u64,
    /// Capabilities.
    pub effective: u64,
    /// Capabilities.
    pub bounding: u64,
    /// Capabilities.
    pub ambient: u64,
    /// Securebits.
    pub secure_bits: u32,
    /// Whether no program can give it more.
    pub no_new_privileges: bool,
    /// Security label.
    pub label: Option<String>,
    /// Security label of its sockets.
    pub socket_label: Option<String>,
}

/// A memory mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First byte.
    pub start: u64,
    /// First byte behind it.
    pub end: u64,
    /// What CRIU knows of it (`VMA_…`).
    pub status: u32,
    /// Protection.
    pub protection: u32,
    /// `MAP_…`.
    pub flags: u32,
    /// The file, or the shared memory, that is mapped.
    pub source: u64,
}

/// What a descriptor, a mapping or a directory refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum File {
    /// A file by its path.
    Regular {
        /// Path in the mount namespace.
        path: String,
        /// Mount, as the mount table numbers it; -1 if unknown.
        mount: i32,
        /// How it was opened.
        flags: u32,
        /// Type and permissions, if known.
        mode: Option<u32>,
        /// Whether the restorer hands it over.
        external: bool,
    },
    /// A pipe.
    Pipe {
        /// Both ends have the same.
        pipe: u32,
    },
    /// A named pipe.
    Fifo {
        /// All that have it open have the same.
        pipe: u32,
        /// The file that names it.
        regular: Option<u32>,
    },
    /// An internet socket.
    Inet {
        /// `SOCK_…`.
        kind: u32,
        /// Protocol.
        protocol: u32,
        /// TCP's state.
        state: u32,
        /// Network namespace.
        namespace: Option<u32>,
        /// Number that its TCP state is filed under.
        inode: u32,
    },
    /// A unix socket.
    Unix {
        /// Name, as the kernel has it.
        name: Vec<u8>,
        /// Directory that a relative name is below.
        directory: Option<String>,
        /// Its number.
        inode: u32,
        /// Number of its peer; 0 without.
        peer: u32,
        /// CRIU's marks (`USK_…`).
        marks: u32,
    },
    /// A terminal.
    Terminal {
        /// Which.
        info: u32,
        /// The file that names it.
        regular: Option<u32>,
    },
    /// A namespace.
    Namespace {
        /// Which.
        namespace: u32,
        /// `CLONE_NEW…`.
        flag: u32,
    },
    /// A file in memory.
    Memory {
        /// Which.
        inode: u32,
    },
    /// Watches of files (inotify, or fanotify if `true`).
    Watch(bool),
    /// eventfd, eventpoll, signalfd, timerfd.
    Event,
    /// A netlink socket of this protocol.
    Netlink(u32),
    /// A raw packet socket.
    Packet,
    /// A network interface of user space.
    Tun,
    /// A file of CRIU's plugins.
    External,
    /// A BPF map.
    BpfMap,
    /// A process.
    Pidfd,
}

/// A deleted file that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ghost {
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Owner's group.
    pub gid: u32,
    /// Device, for a device node.
    pub device: u32,
    /// Bytes of content in the image.
    pub size: u64,
    /// Target of a link.
    pub target: Option<String>,
}

impl ImageSet {
    /// The descriptors of a living process: number and file.
    pub fn descriptors_of(&self, task: &Task) -> &[(u32, u32)] {
        self.descriptors.get(&task.descriptors).map_or(&[], Vec::as_slice)
    }

    /// All living threads with their process.
    pub fn threads(&self) -> impl Iterator<Item = (&Process, &Thread)> {
        self.processes.iter().flat_map(|process| process.threads.iter().map(move |thread| (process, thread)))
    }

    /// The seccomp filters of a thread, from its last to its first.
    pub fn filters_of(&self, thread: &Thread) -> Vec<&messages::SeccompFilter> {
        let mut chain = Vec::new();
        let mut next = thread.seccomp_filter;
        while let Some(filter) = next.and_then(|at| self.filters.get(at as usize)) {
            chain.push(filter);
            next = filter.prev;
        }
        chain
    }
}
