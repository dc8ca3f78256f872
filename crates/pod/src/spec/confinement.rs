//! AppArmor profiles, SELinux labels, masked and read-only paths.

use stasis_cri_api::runtime::security_profile::ProfileType;
use stasis_cri_api::runtime::{LinuxContainerSecurityContext, SeLinuxOption, SecurityProfile};

use super::HostFacts;
use super::error::{Result, SpecError};
use crate::apparmor::DEFAULT_PROFILE;

/// What is hidden unless the request gives its own list: containerd's list, which has the energy counters of
/// GHSA-7ww5-4wqc-m92c, and `/proc/interrupts`, which tells of other people's keystrokes, as in the kubelet's.
const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// What is read-only unless the request gives its own list.
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// SELinux type of a container, unless the request says otherwise (container-selinux).
const SELINUX_TYPE: &str = "container_t";
/// SELinux type of what a container may write (container-selinux).
const SELINUX_FILE_TYPE: &str = "container_file_t";

/// Masked and read-only paths.
///
/// An empty list cannot be told from an absent one on the wire. We take it for absent: the kubelet sends its lists,
/// and allows `procMount: Unmasked`, which sends empty ones, only in a user namespace.
pub(super) fn paths(context: &LinuxContainerSecurityContext) -> (Vec<String>, Vec<String>) {
    if context.privileged {
        return (Vec::new(), Vec::new());
    }
    let or = |given: &[String], default: &[&str]| match given {
        [] => default.iter().map(ToString::to_string).collect(),
        given => given.to_vec(),
    };
    (or(&context.masked_paths, &MASKED_PATHS), or(&context.readonly_paths, &READONLY_PATHS))
}

/// The AppArmor profile of a container: the one that it names or, also if it says nothing, ours. A privileged
/// container has none. Where AppArmor is off, or our profile cannot be loaded, the default is none.
pub(super) fn apparmor(context: &LinuxContainerSecurityContext, host: &HostFacts) -> Result<Option<String>> {
    if context.privileged {
        return Ok(None);
    }
    match wanted_apparmor(context)? {
        Some(Profile::Default) => Ok(host.apparmor_default.then(|| DEFAULT_PROFILE.to_owned())),
        Some(Profile::Named(profile)) if host.apparmor => Ok(Some(profile)),
        Some(Profile::Named(profile)) => {
            let reason = format!("the request asks for the profile {profile:?}, and AppArmor is not enabled");
            Err(SpecError::host("apparmor", reason))
        }
        None => Ok(None),
    }
}

/// What confines a container.
enum Profile {
    Default,
    Named(String),
}

#[allow(deprecated, reason = "old kubelets and crictl files still set apparmor_profile")]
fn wanted_apparmor(context: &LinuxContainerSecurityContext) -> Result<Option<Profile>> {
    let (kind, reference) = match &context.apparmor {
        Some(SecurityProfile { profile_type, localhost_ref }) => {
            let kind = ProfileType::try_from(*profile_type)
                .map_err(|_| SpecError::invalid("apparmor.profile_type", format!("{profile_type} is unknown")))?;
            (kind, localhost_ref.as_str())
        }
        None => match context.apparmor_profile.as_str() {
            "unconfined" => return Ok(None),
            "" | "runtime/default" => (ProfileType::RuntimeDefault, ""),
            other => match other.strip_prefix("localhost/") {
                Some(profile) => (ProfileType::Localhost, profile),
                None => {
                    return Err(SpecError::invalid("apparmor_profile", format!("{other:?} is unknown")));
                }
            },
        },
    };
    match kind {
        ProfileType::Localhost => {
            // In CRI the reference may carry the prefix of the deprecated field.
            let name = reference.strip_prefix("localhost/").unwrap_or(reference);
            let ok = !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic());
            ok.then(|| Some(Profile::Named(name.to_owned()))).ok_or_else(|| {
                SpecError::invalid("apparmor.localhost_ref", format!("{name:?} is not the name of a profile"))
            })
        }
        ProfileType::RuntimeDefault => Ok(Some(Profile::Default)),
        ProfileType::Unconfined => Ok(None),
    }
}

/// The SELinux labels of a container's processes and of its mounts; none where SELinux is off.
pub(super) fn selinux(
    context: &LinuxContainerSecurityContext,
    pod: Option<&SeLinuxOption>,
    host: &HostFacts,
) -> Result<Option<(String, String)>> {
    if context.privileged || !host.selinux {
        return Ok(None);
    }
    let none = SeLinuxOption::default();
    let options = context.selinux_options.as_ref().or(pod).unwrap_or(&none);
    let or = |given: &str, default: &'static str| {
        if given.is_empty() { default.to_owned() } else { given.to_owned() }
    };
    let user = or(&options.user, "system_u");
    let role = or(&options.role, "system_r");
    let typ = or(&options.r#type, SELINUX_TYPE);
    let level = or(&options.level, "s0");
    for (name, value) in [("user", &user), ("role", &role), ("type", &typ)] {
        if !value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return Err(SpecError::invalid(format!("selinux_options.{name}"), format!("{value:?} is not a name")));
        }
    }
    if !level.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b':' | b',' | b'.' | b'-')) {
        return Err(SpecError::invalid("selinux_options.level", format!("{level:?} is not a level")));
    }
    Ok(Some((format!("{user}:{role}:{typ}:{level}"), format!("{user}:object_r:{SELINUX_FILE_TYPE}:{level}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostFacts {
        HostFacts { apparmor: true, apparmor_default: true, selinux: true, ..super::super::tests::host() }
    }

    #[test]
    fn apparmor_profiles() {
        let check = |kind: ProfileType, name: &str, host: &HostFacts| {
            let profile = SecurityProfile { profile_type: kind.into(), localhost_ref: name.into() };
            apparmor(&LinuxContainerSecurityContext { apparmor: Some(profile), ..Default::default() }, host)
        };
        assert_eq!(check(ProfileType::Localhost, "localhost/web", &host()).unwrap().as_deref(), Some("web"));
        assert_eq!(check(ProfileType::Localhost, "web", &host()).unwrap().as_deref(), Some("web"));
        assert!(check(ProfileType::Localhost, "", &host()).is_err());
        assert!(check(ProfileType::Localhost, "a b", &host()).is_err());
        assert_eq!(check(ProfileType::RuntimeDefault, "", &host()).unwrap().as_deref(), Some(DEFAULT_PROFILE));
        assert_eq!(apparmor(&Default::default(), &host()).unwrap().as_deref(), Some(DEFAULT_PROFILE));
        let privileged = LinuxContainerSecurityContext { privileged: true, ..Default::default() };
        assert_eq!(apparmor(&privileged, &host()).unwrap(), None);
        let unloadable = HostFacts { apparmor_default: false, ..host() };
        assert_eq!(check(ProfileType::RuntimeDefault, "", &unloadable).unwrap(), None);
        assert_eq!(check(ProfileType::Localhost, "web", &unloadable).unwrap().as_deref(), Some("web"));
        let without = HostFacts { apparmor: false, apparmor_default: false, ..host() };
        assert!(check(ProfileType::Localhost, "web", &without).is_err());
        assert_eq!(check(ProfileType::RuntimeDefault, "", &without).unwrap(), None);
        assert_eq!(check(ProfileType::Unconfined, "", &host()).unwrap(), None);
    }

    #[test]
    fn selinux_labels() {
        let mut context = LinuxContainerSecurityContext::default();
        let pod = SeLinuxOption { level: "s0:c1,c2".into(), ..Default::default() };
        let (process, mount) = selinux(&context, Some(&pod), &host()).unwrap().unwrap();
        assert_eq!(process, "system_u:system_r:container_t:s0:c1,c2");
        assert_eq!(mount, "system_u:object_r:container_file_t:s0:c1,c2");
        context.selinux_options = Some(SeLinuxOption { r#type: "spc_t:s0".into(), ..Default::default() });
        assert!(selinux(&context, None, &host()).is_err());
        context.privileged = true;
        assert!(selinux(&context, None, &host()).unwrap().is_none());
    }

    #[test]
    fn paths_are_masked_unless_privileged() {
        let mut context = LinuxContainerSecurityContext::default();
        assert!(paths(&context).0.iter().any(|p| p == "/sys/devices/virtual/powercap"));
        context.masked_paths = vec!["/proc/x".into()];
        assert_eq!(paths(&context).0, ["/proc/x"]);
        assert_eq!(paths(&context).1, READONLY_PATHS);
        context.privileged = true;
        assert_eq!(paths(&context), (vec![], vec![]));
    }
}
