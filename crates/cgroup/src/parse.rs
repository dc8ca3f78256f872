//! What the kernel writes about cgroups, read into types. Pure functions but for one file name; see cgroups(7).

use crate::error::{Error, Result};
use stasis_sys::mount::decode_octal;
use std::path::{Path, PathBuf};

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    /// Where it is mounted.
    pub(crate) mount: PathBuf,
    /// Which of its cgroups is shown at the mount point, seen from our cgroup namespace: `/` nearly always.
    pub(crate) root: PathBuf,
    /// Version 2.
    pub(crate) unified: bool,
    /// The controllers of a version 1 hierarchy; those of version 2 are asked of the kernel when needed.
    pub(crate) controllers: Vec<String>,
    /// The name of a version 1 hierarchy that has one: `systemd`.
    pub(crate) name: Option<String>,
}

impl Hierarchy {
    pub(crate) fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|have| have == controller)
    }

    pub(crate) fn available_controllers(&self) -> Vec<String> {
        if !self.unified {
            return self.controllers.clone();
        }
        let listed = crate::read(&self.mount.join("cgroup.controllers")).unwrap_or_default();
        String::from_utf8_lossy(&listed).split_whitespace().map(str::to_owned).collect()
    }

    /// The path of a process's cgroup below the mount point.
    pub(crate) fn path_of_member(&self, memberships: &[Membership]) -> Option<String> {
        let member = memberships.iter().find(|member| match (&self.name, self.unified) {
            (_, true) => member.controllers.is_empty() && member.name.is_none(),
            (Some(name), _) => member.name.as_ref() == Some(name),
            (None, _) => self.controllers.iter().any(|controller| member.controllers.contains(controller)),
        })?;
        let below = Path::new(&member.path).strip_prefix(&self.root).ok()?;
        Some(format!("/{}", below.display()))
    }
}

/// One line of `/proc/PID/cgroup`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Membership {
    controllers: Vec<String>,
    name: Option<String>,
    path: String,
}

/// The hierarchies in `/proc/self/mountinfo`. One that is mounted several times counts once, by its first mount: the
/// others are copies for containers.
pub(crate) fn hierarchies(mountinfo: &[u8]) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for hierarchy in mountinfo.split(|byte| *byte == b'\n').filter_map(hierarchy) {
        let same = |other: &Hierarchy| {
            (other.unified, &other.controllers, &other.name)
                == (hierarchy.unified, &hierarchy.controllers, &hierarchy.name)
        };
        if !found.iter().any(same) {
            found.push(hierarchy);
        }
    }
    found
}

/// proc(5): `ID parent major:minor root mount-point options [optional …] - type source super-options`.
fn hierarchy(line: &[u8]) -> Option<Hierarchy> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let separator = fields.iter().position(|field| *field == b"-")?;
    let (fs_type, options) = (*fields.get(separator + 1)?, *fields.get(separator + 3)?);
    let unified = match fs_type {
        b"cgroup2" => true,
        b"cgroup" => false,
        _ => return None,
    };
    let (root, mount) = (decode_octal(fields.get(3)?), decode_octal(fields.get(4)?));
    let options = String::from_utf8_lossy(options).into_owned();
    let mut hierarchy = Hierarchy { mount, root, unified, controllers: Vec::new(), name: None };
    if !unified {
        // General options of the superblock stand in the same list as the controllers.
        const NOT_CONTROLLERS: [&str; 8] =
            ["rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode", "release_agent", "favordynmods"];
        for option in options.split(',') {
            match option.split_once('=') {
                Some(("name", name)) => hierarchy.name = Some(name.to_owned()),
                Some(_) => {}
                None if NOT_CONTROLLERS.contains(&option) => {}
                None => hierarchy.controllers.push(option.to_owned()),
            }
        }
    }
    Some(hierarchy)
}

/// The lines of `/proc/PID/cgroup`: `ID:controllers:path`, where the path may hold colons.
pub(crate) fn memberships(text: &[u8]) -> Vec<Membership> {
    String::from_utf8_lossy(text)
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_id, list, path) = (fields.next()?, fields.next()?, fields.next()?);
            let name = list.strip_prefix("name=").map(str::to_owned);
            let controllers = match name {
                Some(_) => Vec::new(),
                None => list.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect(),
            };
            Some(Membership { controllers, name, path: path.to_owned() })
        })
        .collect()
}

/// The value of `key` in a file of `key value` lines: `memory.events`, `memory.oom_control`, `cgroup.events`.
pub(crate) fn keyed(text: &[u8], key: &str) -> Option<u64> {
    String::from_utf8_lossy(text).lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok())?
    })
}

/// A file that holds one number.
pub(crate) fn number(text: &[u8]) -> Option<u64> {
    String::from_utf8_lossy(text).trim().parse().ok()
}

/// `cgroup.procs`: one process ID a line. Zero stands for a process of a PID namespace we cannot see; it is left out.
pub(crate) fn process_ids(text: &[u8]) -> Vec<u32> {
    String::from_utf8_lossy(text).lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid != 0).collect()
}

/// The state in a version 1 `freezer.state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FreezerState {
    Thawed,
    Freezing,
    Frozen,
}

pub(crate) fn freezer_state(text: &[u8]) -> Option<FreezerState> {
    match text.trim_ascii() {
        b"THAWED" => Some(FreezerState::Thawed),
        b"FREEZING" => Some(FreezerState::Freezing),
        b"FROZEN" => Some(FreezerState::Frozen),
        _ => None,
    }
}

/// The longest cgroup path, in bytes: what the kernel takes for a path, less room for the mount point and a file name.
const PATH_BYTES_MAX: usize = 3072;

/// A path names a cgroup below the root and nothing else.
pub(crate) fn check_path(path: &str) -> Result<()> {
    let reason = if !path.starts_with('/') {
        "it must begin with a slash"
    } else if path.len() > PATH_BYTES_MAX {
        "it is too long"
    } else if path.bytes().any(|byte| byte == 0 || byte == b'\n') {
        "it has a zero byte or a newline"
    } else if path.split('/').any(|part| part == ".." || part == ".") {
        "it has a component `.` or `..`"
    } else {
        return Ok(());
    };
    Err(Error::InvalidPath { path: path.chars().take(256).collect(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(mountinfo: &[u8]) -> Vec<String> {
        hierarchies(mountinfo).iter().map(|hierarchy| format!("{}", hierarchy.mount.display())).collect()
    }

    fn check_member(mountinfo: &[u8], membership: &[u8], which: &str, expected: &str) {
        let all = hierarchies(mountinfo);
        let hierarchy = all
            .iter()
            .find(|hierarchy| {
                hierarchy.has(which)
                    || hierarchy.name.as_deref() == Some(which)
                    || (hierarchy.unified && which == "unified")
            })
            .unwrap();
        assert_eq!(hierarchy.path_of_member(&memberships(membership)).as_deref(), Some(expected), "{which}");
    }

    #[test]
    fn hierarchies_of_recorded_hosts() {
        let v1 = include_bytes!("../testdata/mountinfo-v1");
        assert_eq!(names(v1).len(), 10);
        assert_eq!(names(include_bytes!("../testdata/mountinfo-v2")), ["/sys/fs/cgroup"]);
        let hybrid = hierarchies(include_bytes!("../testdata/mountinfo-systemd-hybrid"));
        assert_eq!(hybrid.len(), 7, "the second mount of the freezer counts once");
        assert_eq!(hybrid[3].controllers, ["cpu", "cpuacct"]);
        assert_eq!(hybrid[1].name.as_deref(), Some("systemd"));
        assert!(hybrid[1].controllers.is_empty(), "xattr and rw are no controllers");
    }

    #[test]
    fn memberships_of_recorded_processes() {
        let v1: &[u8] = include_bytes!("../testdata/mountinfo-v1");
        let of_v1: &[u8] = include_bytes!("../testdata/proc-cgroup-v1");
        check_member(v1, of_v1, "memory", "/api/67f2");
        check_member(v1, of_v1, "freezer", "/");
        let hybrid: &[u8] = include_bytes!("../testdata/mountinfo-systemd-hybrid");
        let of_hybrid: &[u8] = include_bytes!("../testdata/proc-cgroup-systemd-hybrid");
        check_member(hybrid, of_hybrid, "cpuacct", "/user.slice");
        check_member(hybrid, of_hybrid, "systemd", "/user.slice/user-1000.slice/session-3.scope");
        check_member(hybrid, of_hybrid, "unified", "/user.slice/user-1000.slice/session-3.scope");
        check_member(
            include_bytes!("../testdata/mountinfo-v2"),
            include_bytes!("../testdata/proc-cgroup-v2"),
            "unified",
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-stasis-ab:c.scope",
        );
    }

    #[test]
    fn a_mount_of_a_part_of_the_hierarchy_shortens_paths() {
        let mountinfo = b"41 31 0:38 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        check_member(mountinfo, b"0::/docker/abc/pod\n", "unified", "/pod");
        let hierarchy = &hierarchies(mountinfo)[0];
        assert_eq!(hierarchy.path_of_member(&memberships(b"0::/elsewhere\n")), None);
    }

    #[test]
    fn counters_and_states() {
        assert_eq!(keyed(include_bytes!("../testdata/memory.events"), "oom_kill"), Some(3));
        assert_eq!(keyed(include_bytes!("../testdata/memory.oom_control"), "oom_kill"), Some(5));
        assert_eq!(keyed(include_bytes!("../testdata/cgroup.events"), "frozen"), Some(0));
        assert_eq!(keyed(include_bytes!("../testdata/cgroup.events-frozen"), "frozen"), Some(1));
        assert_eq!(keyed(b"oom_kill\n", "oom_kill"), None);
        let state = freezer_state;
        assert_eq!(state(include_bytes!("../testdata/freezer.state-frozen")), Some(FreezerState::Frozen));
        assert_eq!(state(include_bytes!("../testdata/freezer.state-freezing")), Some(FreezerState::Freezing));
        assert_eq!(state(include_bytes!("../testdata/freezer.state-thawed")), Some(FreezerState::Thawed));
        assert_eq!(state(b""), None);
        assert_eq!(process_ids(b"12\n0\n4194303\n"), [12, 4_194_303]);
        assert_eq!(number(b"4096\n"), Some(4096));
        assert_eq!(number(b"max\n"), None);
    }

    #[test]
    fn paths_must_stay_below_the_root() {
        for good in ["/", "/kubepods/burstable/pod1/abc", "/a..b/.c", "/cri-stasis-ab:c.scope"] {
            assert!(check_path(good).is_ok(), "{good}");
        }
        for bad in ["", "kubepods", "/a/../b", "/..", "/./a", "/a\n", "/a\0", &format!("/{}", "a".repeat(4000))] {
            assert!(check_path(bad).is_err(), "{bad:?}");
        }
    }
}
