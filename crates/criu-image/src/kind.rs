//! The types of CRIU's images: magic, message, what follows the message, and under which names files of them come.

use crate::schema::{self, Message};

/// First word of an image file.
pub(crate) const CLASS_IMAGE: u32 = 0x5456_4319;
/// First word of a service file.
pub(crate) const CLASS_SERVICE: u32 = 0x5510_5940;

/// What follows an entry's message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Follows {
    Nothing,
    /// `bytes` of a pipe.
    PipeData,
    /// `length` of a datagram.
    Packet,
    /// `inq_len` and `outq_len` of a connection.
    Stream,
    /// Keys and values.
    BpfMap,
    /// The segment, unless its pages are in the page maps.
    SharedMemory,
    /// Numbers of two bytes, padded to eight.
    Semaphores,
    /// Messages, each with a header of its own.
    Messages,
    /// The file, to the end or in chunks.
    Ghost,
    /// Entries of another type than the first.
    Pagemap,
}

macro_rules! kinds {
    ($($name:ident $crit:literal $magic:literal $message:ident $follows:ident;)*) => {
        /// The type of an image.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind {
            $(#[doc = concat!("`", $crit, "` in crit's words.")] $name,)*
        }

        /// Every type.
        pub(crate) const ALL: &[Kind] = &[$(Kind::$name,)*];

        impl Kind {
            /// The name that crit has for it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $crit,)* }
            }

            /// The magic of its files.
            pub fn magic(self) -> u32 {
                match self { $(Self::$name => $magic,)* }
            }

            pub(crate) fn message(self) -> &'static Message {
                match self { $(Self::$name => &schema::$message,)* }
            }

            pub(crate) fn follows(self) -> Follows {
                match self { $(Self::$name => Follows::$follows,)* }
            }
        }
    };
}

kinds! {
    Inventory "INVENTORY" 0x5831_3116 INVENTORY_ENTRY Nothing;
    Core "CORE" 0x5505_3847 CORE_ENTRY Nothing;
    Ids "IDS" 0x5443_2030 TASK_KOBJ_IDS_ENTRY Nothing;
    Creds "CREDS" 0x5402_3547 CREDS_ENTRY Nothing;
    Utsns "UTSNS" 0x5447_3203 UTSNS_ENTRY Nothing;
    Timens "TIMENS" 0x4311_4433 TIMENS_ENTRY Nothing;
    Pidns "PIDNS" 0x6115_7326 PIDNS_ENTRY Nothing;
    IpcVar "IPC_VAR" 0x5311_5007 IPC_VAR_ENTRY Nothing;
    Fs "FS" 0x5140_3912 FS_ENTRY Nothing;
    GhostFile "GHOST_FILE" 0x5258_3605 GHOST_FILE_ENTRY Ghost;
    Mm "MM" 0x5749_2820 MM_ENTRY Nothing;
    Cgroup "CGROUP" 0x5938_3330 CGROUP_ENTRY Nothing;
    TcpStream "TCP_STREAM" 0x5146_5506 TCP_STREAM_ENTRY Stream;
    Stats "STATS" 0x5709_3306 STATS_ENTRY Nothing;
    Pagemap "PAGEMAP" 0x5608_4025 PAGEMAP_HEAD Pagemap;
    Pstree "PSTREE" 0x5027_3030 PSTREE_ENTRY Nothing;
    RegFiles "REG_FILES" 0x5036_3636 REG_FILE_ENTRY Nothing;
    NsFiles "NS_FILES" 0x6139_4011 NS_FILE_ENTRY Nothing;
    EventfdFile "EVENTFD_FILE" 0x4452_3722 EVENTFD_FILE_ENTRY Nothing;
    EventpollFile "EVENTPOLL_FILE" 0x4502_3858 EVENTPOLL_FILE_ENTRY Nothing;
    EventpollTfd "EVENTPOLL_TFD" 0x4443_3746 EVENTPOLL_TFD_ENTRY Nothing;
    Signalfd "SIGNALFD" 0x5732_3820 SIGNALFD_ENTRY Nothing;
    Timerfd "TIMERFD" 0x5049_3712 TIMERFD_ENTRY Nothing;
    InotifyFile "INOTIFY_FILE" 0x4842_4431 INOTIFY_FILE_ENTRY Nothing;
    InotifyWd "INOTIFY_WD" 0x5456_2009 INOTIFY_WD_ENTRY Nothing;
    FanotifyFile "FANOTIFY_FILE" 0x5509_6122 FANOTIFY_FILE_ENTRY Nothing;
    FanotifyMark "FANOTIFY_MARK" 0x5650_6035 FANOTIFY_MARK_ENTRY Nothing;
    Vmas "VMAS" 0x5412_3737 VMA_ENTRY Nothing;
    Pipes "PIPES" 0x5651_3555 PIPE_ENTRY Nothing;
    Fifo "FIFO" 0x5836_4939 FIFO_ENTRY Nothing;
    Sigact "SIGACT" 0x5534_4201 SA_ENTRY Nothing;
    NetlinkSockets "NETLINK_SK" 0x5800_5614 NETLINK_SK_ENTRY Nothing;
    RemapFpath "REMAP_FPATH" 0x5913_3954 REMAP_FILE_PATH_ENTRY Nothing;
    Mounts "MNTS" 0x5556_3928 MNT_ENTRY Nothing;
    TtyFiles "TTY_FILES" 0x5943_3025 TTY_FILE_ENTRY Nothing;
    TtyInfo "TTY_INFO" 0x5945_3036 TTY_INFO_ENTRY Nothing;
    TtyData "TTY_DATA" 0x5941_3026 TTY_DATA_ENTRY Nothing;
    Rlimit "RLIMIT" 0x5711_3925 RLIMIT_ENTRY Nothing;
    TunFiles "TUNFILE" 0x5714_3751 TUNFILE_ENTRY Nothing;
    ExtFiles "EXT_FILES" 0x5925_5641 EXT_FILE_ENTRY Nothing;
    IrmapCache "IRMAP_CACHE" 0x5700_4059 IRMAP_CACHE_ENTRY Nothing;
    FileLocks "FILE_LOCKS" 0x5432_3616 FILE_LOCK_ENTRY Nothing;
    Descriptors "FDINFO" 0x5621_3732 FDINFO_ENTRY Nothing;
    UnixSockets "UNIXSK" 0x5437_3943 UNIX_SK_ENTRY Nothing;
    InetSockets "INETSK" 0x5644_3851 INET_SK_ENTRY Nothing;
    PacketSockets "PACKETSK" 0x6045_4618 PACKET_SOCK_ENTRY Nothing;
    Itimers "ITIMERS" 0x5746_4056 ITIMER_ENTRY Nothing;
    PosixTimers "POSIX_TIMERS" 0x5260_3957 POSIX_TIMER_ENTRY Nothing;
    Netdev "NETDEV" 0x5737_3951 NET_DEVICE_ENTRY Nothing;
    PipesData "PIPES_DATA" 0x5645_3709 PIPE_DATA_ENTRY PipeData;
    FifoData "FIFO_DATA" 0x5933_3054 PIPE_DATA_ENTRY PipeData;
    SkQueues "SK_QUEUES" 0x5626_4026 SK_PACKET_ENTRY Packet;
    IpcnsShm "IPCNS_SHM" 0x4628_3044 IPC_SHM_ENTRY SharedMemory;
    IpcnsSem "IPCNS_SEM" 0x5957_3019 IPC_SEM_ENTRY Semaphores;
    IpcnsMsg "IPCNS_MSG" 0x5545_3737 IPC_MSG_ENTRY Messages;
    Netns "NETNS" 0x5593_3752 NETNS_ENTRY Nothing;
    Userns "USERNS" 0x5547_4906 USERNS_ENTRY Nothing;
    Seccomp "SECCOMP" 0x6441_3049 SECCOMP_ENTRY Nothing;
    Autofs "AUTOFS" 0x4935_3943 AUTOFS_ENTRY Nothing;
    Files "FILES" 0x5630_3138 FILE_ENTRY Nothing;
    Cpuinfo "CPUINFO" 0x6140_4013 CPUINFO_ENTRY Nothing;
    MemfdInode "MEMFD_INODE" 0x4845_3499 MEMFD_INODE_ENTRY Nothing;
    BpfmapFile "BPFMAP_FILE" 0x5750_6142 BPFMAP_FILE_ENTRY Nothing;
    BpfmapData "BPFMAP_DATA" 0x6432_4033 BPFMAP_DATA_ENTRY BpfMap;
    Signal "SIGNAL" 0x5925_5647 SIGINFO_ENTRY Nothing;
    BinfmtMisc "BINFMT_MISC" 0x6734_3323 BINFMT_MISC_ENTRY Nothing;
    Pidfd "PIDFD" 0x5443_5556 PIDFD_ENTRY Nothing;
    Apparmor "APPARMOR" 0x5942_3047 APPARMOR_ENTRY Nothing;
}

impl Kind {
    /// The type of this magic.
    pub fn of_magic(magic: u32) -> Option<Self> {
        ALL.iter().copied().find(|kind| kind.magic() == magic)
    }
}

/// What a file of a dump's directory is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// An image of this type; with the number in its name, if there is one.
    Image(Kind, Option<u64>),
    /// The page map of a process or, `true`, of shared memory.
    Pagemap(bool, u64),
    /// Memory, `pages-N.img`.
    Pages(u64),
    /// An archive of a file system in memory, made by tar; `true` for `tmpfs-dev`, named by the device.
    Tmpfs(bool, u64),
    /// Network configuration in the words of other programs (`iptables-N`, `route-N`, …).
    Network(&'static str, u64),
    /// Statistics or a log, which CRIU does not read.
    Passive,
}

/// Images with no number in their name.
const SINGLE: [(&str, Kind); 34] = [
    ("inventory", Kind::Inventory),
    ("pstree", Kind::Pstree),
    ("files", Kind::Files),
    ("reg-files", Kind::RegFiles),
    ("ext-files", Kind::ExtFiles),
    ("ns-files", Kind::NsFiles),
    ("eventfd", Kind::EventfdFile),
    ("eventpoll", Kind::EventpollFile),
    ("eventpoll-tfd", Kind::EventpollTfd),
    ("signalfd", Kind::Signalfd),
    ("timerfd", Kind::Timerfd),
    ("inotify", Kind::InotifyFile),
    ("inotify-wd", Kind::InotifyWd),
    ("fanotify", Kind::FanotifyFile),
    ("fanotify-mark", Kind::FanotifyMark),
    ("pipes", Kind::Pipes),
    ("pipes-data", Kind::PipesData),
    ("fifo", Kind::Fifo),
    ("fifo-data", Kind::FifoData),
    ("unixsk", Kind::UnixSockets),
    ("inetsk", Kind::InetSockets),
    ("packetsk", Kind::PacketSockets),
    ("netlinksk", Kind::NetlinkSockets),
    ("sk-queues", Kind::SkQueues),
    ("remap-fpath", Kind::RemapFpath),
    ("memfd", Kind::MemfdInode),
    ("tty", Kind::TtyFiles),
    ("tty-info", Kind::TtyInfo),
    ("tty-data", Kind::TtyData),
    ("filelocks", Kind::FileLocks),
    ("tunfile", Kind::TunFiles),
    ("cgroup", Kind::Cgroup),
    ("cpuinfo", Kind::Cpuinfo),
    ("seccomp", Kind::Seccomp),
];

/// The rest of them, which a container has no use for.
const SINGLE_RARE: [(&str, Kind); 5] = [
    ("bpfmap-file", Kind::BpfmapFile),
    ("bpfmap-data", Kind::BpfmapData),
    ("apparmor", Kind::Apparmor),
    ("binfmt-misc", Kind::BinfmtMisc),
    ("pidfd", Kind::Pidfd),
];

/// Images with a number behind their name.
const NUMBERED: [(&str, Kind); 24] = [
    ("fdinfo", Kind::Descriptors),
    ("core", Kind::Core),
    ("ids", Kind::Ids),
    ("mm", Kind::Mm),
    ("vmas", Kind::Vmas),
    ("sigacts", Kind::Sigact),
    ("itimers", Kind::Itimers),
    ("posix-timers", Kind::PosixTimers),
    ("creds", Kind::Creds),
    ("utsns", Kind::Utsns),
    ("ipcns-var", Kind::IpcVar),
    ("ipcns-shm", Kind::IpcnsShm),
    ("ipcns-msg", Kind::IpcnsMsg),
    ("ipcns-sem", Kind::IpcnsSem),
    ("fs", Kind::Fs),
    ("mountpoints", Kind::Mounts),
    ("netdev", Kind::Netdev),
    ("netns", Kind::Netns),
    ("autofs", Kind::Autofs),
    ("rlimit", Kind::Rlimit),
    ("signal-s", Kind::Signal),
    ("signal-p", Kind::Signal),
    ("userns", Kind::Userns),
    ("timens", Kind::Timens),
];

/// The same with hexadecimal numbers, and what is left.
const NUMBERED_RARE: [(&str, Kind); 4] = [
    ("ghost-file", Kind::GhostFile),
    ("tcp-stream", Kind::TcpStream),
    ("pidns", Kind::Pidns),
    ("binfmt-misc", Kind::BinfmtMisc),
];

/// Files that other programs or the kernel's netlink wrote.
const NETWORK: [&str; 9] =
    ["ifaddr", "route", "route6", "rule", "iptables", "ip6tables", "nftables", "netns-ct", "netns-exp"];

/// Files beside the images.
const PASSIVE: [&str; 5] = ["stats-dump", "stats-restore", "dump.log", "restore.log", "descriptors.json"];

impl FileKind {
    /// The kind of a file of this name; none if CRIU 4.2.1 has no such file.
    pub fn of(name: &str) -> Option<Self> {
        if PASSIVE.contains(&name) {
            return Some(Self::Passive);
        }
        let stem = name.strip_suffix(".img")?;
        if let Some((_, kind)) = SINGLE.iter().chain(&SINGLE_RARE).find(|(known, _)| *known == stem) {
            return Some(Self::Image(*kind, None));
        }
        let (word, number) = stem.strip_suffix(".tar.gz").unwrap_or(stem).rsplit_once('-')?;
        let radix = if matches!(word, "ghost-file" | "tcp-stream") { 16 } else { 10 };
        let number = plain_number(number, radix)?;
        match (word, stem.ends_with(".tar.gz")) {
            ("tmpfs", true) => return Some(Self::Tmpfs(false, number)),
            ("tmpfs-dev", true) => return Some(Self::Tmpfs(true, number)),
            (_, true) => return None,
            ("pages", _) => return Some(Self::Pages(number)),
            ("pagemap", _) => return Some(Self::Pagemap(false, number)),
            ("pagemap-shmem", _) => return Some(Self::Pagemap(true, number)),
            _ => {}
        }
        if let Some((_, kind)) = NUMBERED.iter().chain(&NUMBERED_RARE).find(|(known, _)| *known == word) {
            return Some(Self::Image(*kind, Some(number)));
        }
        NETWORK.iter().find(|known| **known == word).map(|known| Self::Network(known, number))
    }
}

/// A number as CRIU writes it: no sign, no leading zeros, small letters.
fn plain_number(text: &str, radix: u32) -> Option<u64> {
    let digit = |c: char| c.is_digit(radix) && !c.is_ascii_uppercase();
    let plain = !text.is_empty() && text.chars().all(digit) && (text == "0" || !text.starts_with('0'));
    if plain { u64::from_str_radix(text, radix).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files() {
        let image = |kind, number| Some(FileKind::Image(kind, number));
        for (name, expected) in [
            ("inventory.img", image(Kind::Inventory, None)),
            ("core-12.img", image(Kind::Core, Some(12))),
            ("core-012.img", None),
            ("core-+1.img", None),
            ("core-1", None),
            ("core-1.tar.gz.img", None),
            ("ghost-file-ff.img", image(Kind::GhostFile, Some(255))),
            ("ghost-file-FF.img", None),
            ("pages-1.img", Some(FileKind::Pages(1))),
            ("pagemap-shmem-9.img", Some(FileKind::Pagemap(true, 9))),
            ("tmpfs-dev-49.tar.gz.img", Some(FileKind::Tmpfs(true, 49))),
            ("tmpfs-dev-49.img", None),
            ("netns-4.img", image(Kind::Netns, Some(4))),
            ("netns-ct-4.img", Some(FileKind::Network("netns-ct", 4))),
            ("dump.log", Some(FileKind::Passive)),
            ("core-18446744073709551616.img", None),
            ("amdgpu-kfd-1.img", None),
        ] {
            assert_eq!(FileKind::of(name), expected, "{name}");
        }
    }

    #[test]
    fn magics_are_one_to_a_type() {
        for kind in ALL {
            assert_eq!(Kind::of_magic(kind.magic()), Some(*kind));
        }
    }
}
