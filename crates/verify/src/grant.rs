//! What a live request grants, taken from the OCI specification that was made of it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// The names of capabilities, by their number.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Limits by their number.
const LIMITS: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

/// Devices that every container has: null, zero, full, random, urandom, tty, console, ptmx.
const DEVICES: [(u32, u32); 8] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)];

/// Largest deleted file whose content a checkpoint may hold, where nothing else is said: CRIU's own default.
const GHOST_MAX: u64 = 1 << 20;

/// What a live request grants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Who the container's processes may be.
    pub user: GrantedUser,
    /// Mounts, in their order.
    pub mounts: Vec<GrantedMount>,
    /// Paths that must be masked or read-only, as far as this host has them.
    pub masked: Vec<String>,
    /// The same, read-only.
    pub read_only: Vec<String>,
    /// Namespaces that are the container's or its pod's and not the host's, by OCI's names.
    pub namespaces: BTreeSet<String>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Limit of memory in bytes.
    pub memory_limit: Option<u64>,
    /// Limit of processes.
    pub process_limit: Option<u64>,
    /// Devices beyond those that every container has.
    pub devices: Vec<Device>,
    /// Largest deleted file that a checkpoint may hold.
    pub ghost_max: u64,
    /// Whether established TCP connections are restored.
    pub tcp_established: bool,
    /// What the host does with control groups.
    pub cgroups: CgroupHandling,
}

/// What CRIU does with the control groups of the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CgroupHandling {
    /// Nothing.
    Ignored,
    /// It makes those that are missing and sets their properties.
    Soft,
}

/// A device node, by its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Which driver.
    pub major: u32,
    /// Which device of it.
    pub minor: u32,
}

/// Who the container's processes may be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantedUser {
    /// User that it starts as.
    pub uid: u32,
    /// Group that it starts as.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Capabilities that a process can get, as bits.
    pub bounding: u64,
    /// Capabilities that it starts with: those of root, or else the ambient ones.
    pub permitted: u64,
    /// Whether no program can give it more.
    pub no_new_privileges: bool,
    /// Whether a seccomp filter confines it.
    pub seccomp: bool,
    /// Security label of its processes.
    pub label: Option<String>,
    /// Hard limits by number.
    pub limits: Vec<Option<u64>>,
    /// Adjustment of the OOM score.
    pub oom_score_adj: Option<i64>,
}

/// A mount that the request makes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantedMount {
    /// Where.
    pub destination: String,
    /// Type; `bind` for what comes from outside.
    pub kind: String,
    /// Options.
    pub options: Vec<String>,
}

/// What of the host the privileged side looks up: the helper sees no file.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Hard limits of a process that nobody limits, by number.
    pub limits: Vec<u64>,
    /// Paths of `/proc` and `/sys` that do not exist here.
    pub absent: BTreeSet<String>,
}

impl Host {
    /// Looks at this host, and which of the paths that `spec` masks it has.
    pub fn look(spec: &Value) -> Self {
        let paths = ["/linux/maskedPaths", "/linux/readonlyPaths"].into_iter().flat_map(|list| strings(spec, list));
        let absent = paths.filter(|path| !std::path::Path::new(path).exists()).collect();
        let text = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
        // A line: name in words, soft limit, hard limit, unit; in the kernel's own order.
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).map(str::to_owned);
        let names = [
            "Max cpu time",
            "Max file size",
            "Max data size",
            "Max stack size",
            "Max core file size",
            "Max resident set",
            "Max processes",
            "Max open files",
            "Max locked memory",
            "Max address space",
            "Max file locks",
            "Max pending signals",
            "Max msgqueue size",
            "Max nice priority",
            "Max realtime priority",
            "Max realtime timeout",
        ];
        let hard = |name: &str| {
            let line = line(name)?;
            let word = line.get(name.len()..)?.split_whitespace().nth(1)?.to_owned();
            if word == "unlimited" { Some(u64::MAX) } else { word.parse().ok() }
        };
        Self { limits: names.into_iter().map(|name| hard(name).unwrap_or(u64::MAX)).collect(), absent }
    }
}

impl Grant {
    /// What the OCI specification grants on this host.
    ///
    /// # Errors
    /// If it is none, or names what is not known.
    pub fn of_spec(spec: &Value, host: &Host) -> Result<Self> {
        let process = spec.get("process").ok_or_else(|| Error::Grant("it has no process".to_owned()))?;
        let linux = spec.get("linux").unwrap_or(&Value::Null);
        let here = |list: &str| strings(spec, list).filter(|path| !host.absent.contains(path)).collect();
        let number = |pointer: &str| spec.pointer(pointer).and_then(Value::as_i64).and_then(|n| u64::try_from(n).ok());
        Ok(Self {
            user: user(process, linux, host)?,
            mounts: mounts(spec)?,
            masked: here("/linux/maskedPaths"),
            read_only: here("/linux/readonlyPaths"),
            namespaces: objects(spec, "/linux/namespaces").filter_map(|entry| text(entry, "type")).collect(),
            terminal: process.get("terminal").and_then(Value::as_bool).unwrap_or_default(),
            memory_limit: number("/linux/resources/memory/limit").filter(|limit| *limit > 0),
            process_limit: number("/linux/resources/pids/limit").filter(|limit| *limit > 0),
            devices: objects(spec, "/linux/devices").filter_map(device).collect(),
            ghost_max: GHOST_MAX,
            tcp_established: false,
            cgroups: CgroupHandling::Ignored,
        })
    }

    pub(crate) fn has_device(&self, major: u32, minor: u32) -> bool {
        // Terminals of a pty file system come and go.
        DEVICES.contains(&(major, minor)) || major == 136 || self.devices.contains(&Device { major, minor })
    }

    pub(crate) fn may(&self, capability: &str) -> bool {
        bit(capability).is_some_and(|bit| self.user.permitted & bit != 0)
    }
}

impl GrantedMount {
    pub(crate) fn is_bind(&self) -> bool {
        let bind = |word: &str| matches!(word, "bind" | "rbind");
        bind(&self.kind) || self.options.iter().any(|option| bind(option))
    }

    pub(crate) fn has(&self, option: &str) -> bool {
        self.options.iter().any(|word| word == option)
    }
}

fn user(process: &Value, linux: &Value, host: &Host) -> Result<GrantedUser> {
    let id = |pointer: &str| match process.pointer(pointer) {
        None => Ok(0),
        Some(value) => value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| Error::Grant(format!("process{pointer} is {value}, no ID"))),
    };
    let uid = id("/user/uid")?;
    let set = |name: &str| -> Result<u64> {
        strings(process, &format!("/capabilities/{name}")).try_fold(0, |set, name| {
            bit(&name).map(|bit| set | bit).ok_or_else(|| Error::Grant(format!("{name} is no known capability")))
        })
    };
    let permitted = if uid == 0 { set("permitted")? } else { set("ambient")? };
    let mut limits: Vec<Option<u64>> = host.limits.iter().copied().map(Some).collect();
    limits.resize(LIMITS.len(), None);
    for limit in objects(process, "/rlimits") {
        let number = text(limit, "type")
            .and_then(|name| LIMITS.iter().position(|known| name.strip_prefix("RLIMIT_") == Some(*known)));
        if let (Some(number), Some(hard)) = (number, limit.get("hard").and_then(Value::as_u64)) {
            limits[number] = Some(hard);
        }
    }
    let groups = process.pointer("/user/additionalGids").and_then(Value::as_array).into_iter().flatten();
    let label = ["apparmorProfile", "selinuxLabel"].into_iter().find_map(|key| text(process, key));
    Ok(GrantedUser {
        uid,
        gid: id("/user/gid")?,
        groups: groups.filter_map(Value::as_u64).filter_map(|group| u32::try_from(group).ok()).collect(),
        bounding: set("bounding")?,
        permitted,
        no_new_privileges: process.get("noNewPrivileges").and_then(Value::as_bool).unwrap_or_default(),
        seccomp: linux.get("seccomp").is_some_and(|seccomp| !seccomp.is_null()),
        label: label.filter(|label| !label.is_empty()),
        limits,
        oom_score_adj: process.get("oomScoreAdj").and_then(Value::as_i64),
    })
}

fn mounts(spec: &Value) -> Result<Vec<GrantedMount>> {
    let mounts = objects(spec, "/mounts").map(|mount| {
        let destination = text(mount, "destination").ok_or_else(|| Error::Grant("a mount goes nowhere".to_owned()))?;
        let options = strings(mount, "/options").collect();
        Ok(GrantedMount {
            destination: normalized(&destination),
            kind: text(mount, "type").unwrap_or_default(),
            options,
        })
    });
    mounts.collect()
}

fn device(value: &Value) -> Option<Device> {
    let number = |name: &str| value.get(name).and_then(Value::as_u64).and_then(|number| u32::try_from(number).ok());
    Some(Device { major: number("major")?, minor: number("minor")? })
}

/// The bit of a capability, whose name may begin with `CAP_`.
pub(crate) fn bit(name: &str) -> Option<u64> {
    let name = name.strip_prefix("CAP_").unwrap_or(name);
    CAPABILITIES.iter().position(|known| *known == name).map(|at| 1 << at)
}

/// The names of capabilities, for people.
pub(crate) fn names(set: u64) -> String {
    let known =
        CAPABILITIES.iter().enumerate().filter(|(at, _)| set & 1 << at != 0).map(|(_, name)| (*name).to_owned());
    let rest = set >> CAPABILITIES.len() << CAPABILITIES.len();
    known.chain((rest != 0).then(|| format!("{rest:#x}"))).collect::<Vec<_>>().join(", ")
}

/// The name of a limit.
pub(crate) fn limit_name(number: usize) -> &'static str {
    LIMITS.get(number).copied().unwrap_or("unknown")
}

/// An absolute path without empty or `.` components; `..` stays.
pub(crate) fn normalized(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    format!("/{}", parts.join("/"))
}

fn objects<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

fn strings<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = String> + use<'a> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).map(str::to_owned)
}

fn text(value: &Value, key: &str) -> Option<String> {
    value.get(key).and_then(Value::as_str).map(str::to_owned)
}
