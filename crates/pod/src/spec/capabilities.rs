//! Linux capabilities of a container: the default set, what a request adds and drops, and what the daemon can give.

use std::collections::BTreeSet;

use oci_spec::runtime::{Capability, LinuxCapabilities};
use stasis_cri_api::runtime::Capability as Request;

use super::error::{Result, SpecError};

/// Every capability at its number of `linux/capability.h`.
const BY_NUMBER: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// What a container has unless asked otherwise: the set of containerd and Docker.
const DEFAULT: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// A set of capabilities by number.
type Numbers = BTreeSet<usize>;

fn number(capability: Capability) -> usize {
    BY_NUMBER.iter().position(|c| *c == capability).expect("the table holds every variant")
}

fn parse(field: &str, name: &str) -> Result<usize> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    short.parse().map(number).map_err(|_| {
        SpecError::invalid(field, format!("{name:?} is not a capability; see capabilities(7) for their names"))
    })
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("ALL") || name.eq_ignore_ascii_case("CAP_ALL")
}

/// The sets of a container. `own` are the capabilities of the daemon, by number as bits: what a container gets by
/// default, by `ALL` or by being privileged is bounded by them, and a name beyond them is refused, since the OCI
/// runtime would fail with a bare "operation not permitted".
///
/// `ALL` is read first on either side, then the names that are added, then those that are dropped, so `drop: [ALL],
/// add: [X]` leaves X. Inheritable and ambient stay empty unless the request asks for ambient ones (CVE-2022-29162
/// and its kin).
pub(super) fn sets(request: Option<&Request>, privileged: bool, own: u64) -> Result<LinuxCapabilities> {
    let known: Numbers = (0..BY_NUMBER.len()).filter(|n| own >> n & 1 == 1).collect();
    if privileged {
        return Ok(linux(&known, &Numbers::new()));
    }
    let none = Request::default();
    let request = request.unwrap_or(&none);
    let mut set: Numbers = DEFAULT.into_iter().map(number).collect();
    if request.drop_capabilities.iter().any(|c| is_all(c)) {
        set.clear();
    }
    if request.add_capabilities.iter().any(|c| is_all(c)) {
        set.clone_from(&known);
    }
    for name in request.add_capabilities.iter().filter(|c| !is_all(c)) {
        set.insert(checked("add_capabilities", name, &known)?);
    }
    let mut ambient = Numbers::new();
    for name in &request.add_ambient_capabilities {
        if is_all(name) {
            ambient.clone_from(&known);
        } else {
            ambient.insert(checked("add_ambient_capabilities", name, &known)?);
        }
    }
    set.extend(&ambient);
    for name in request.drop_capabilities.iter().filter(|c| !is_all(c)) {
        let dropped = parse("drop_capabilities", name)?;
        set.remove(&dropped);
        ambient.remove(&dropped);
    }
    set.retain(|n| known.contains(n));
    Ok(linux(&set, &ambient))
}

fn checked(field: &str, name: &str, known: &Numbers) -> Result<usize> {
    let number = parse(field, name)?;
    if !known.contains(&number) {
        let reason = format!("the daemon itself does not have {name:?}, or the kernel does not know it");
        return Err(SpecError::host(field, reason));
    }
    Ok(number)
}

fn linux(set: &Numbers, ambient: &Numbers) -> LinuxCapabilities {
    let of = |numbers: &Numbers| numbers.iter().map(|n| BY_NUMBER[*n]).collect::<std::collections::HashSet<_>>();
    let mut all = LinuxCapabilities::default();
    all.set_bounding(Some(of(set)));
    all.set_effective(Some(of(set)));
    all.set_permitted(Some(of(set)));
    all.set_inheritable(Some(of(ambient)));
    all.set_ambient(Some(of(ambient)));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(add: &[&str], drop: &[&str], ambient: &[&str]) -> Result<(Vec<String>, Vec<String>)> {
        let own = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let request = Request {
            add_capabilities: own(add),
            drop_capabilities: own(drop),
            add_ambient_capabilities: own(ambient),
        };
        let sets = sets(Some(&request), false, u64::MAX)?;
        let list = |set: &Option<std::collections::HashSet<Capability>>| {
            let mut names: Vec<String> = set.iter().flatten().map(ToString::to_string).collect();
            names.sort();
            names
        };
        assert_eq!(sets.bounding(), sets.effective());
        assert_eq!(sets.bounding(), sets.permitted());
        assert_eq!(sets.inheritable(), sets.ambient());
        Ok((list(sets.bounding()), list(sets.ambient())))
    }

    #[test]
    fn add_and_drop() {
        assert_eq!(check(&[], &[], &[]).unwrap().0.len(), 14);
        assert_eq!(check(&["cap_sys_admin", "NET_ADMIN"], &["ALL"], &[]).unwrap().0, ["NET_ADMIN", "SYS_ADMIN"]);
        assert_eq!(check(&["ALL"], &["CAP_SYS_ADMIN"], &[]).unwrap().0.len(), 40);
        assert_eq!(check(&[], &["ALL"], &["KILL"]).unwrap(), (vec!["KILL".into()], vec!["KILL".into()]));
        assert_eq!(check(&["KILL"], &["ALL", "KILL"], &["KILL"]).unwrap(), (vec![], vec![]));
        assert!(check(&["CAP_CAP_KILL"], &[], &[]).is_err());
        assert!(check(&["NOPE"], &[], &[]).is_err());
        assert!(check(&[], &[""], &[]).is_err());
    }

    #[test]
    fn nobody_gets_what_the_daemon_lacks() {
        let own = !(1 << number(Capability::SysResource) | 1 << number(Capability::Mknod));
        let all = sets(None, true, own).unwrap();
        assert_eq!(all.bounding().as_ref().unwrap().len(), 39);
        assert!(all.ambient().as_ref().unwrap().is_empty());
        assert_eq!(sets(None, false, own).unwrap().bounding().as_ref().unwrap().len(), 13);
        let add = |name: &str| Request { add_capabilities: vec![name.into()], ..Default::default() };
        let everything = sets(Some(&add("ALL")), false, own).unwrap();
        assert_eq!(everything.bounding().as_ref().unwrap().len(), 39);
        assert!(sets(Some(&add("SYS_RESOURCE")), false, own).is_err());
        assert!(sets(Some(&add("SYS_ADMIN")), false, own).is_ok());
    }
}
