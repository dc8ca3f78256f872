//! What the CDI devices of a request need, put into a specification. It comes from files of the host's administrator, is
//! applied last, and wins over what image and request say, as in every other engine.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Hook, Hooks, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Mount, Process, Spec};
use stasis_cdi::{DeviceNode, Edits, Hook as HookEdit, Mount as MountEdit};

use super::devices::{self, rule};
use super::error::{Result, SpecError};

/// The field of the request.
const FIELD: &str = "CDI_devices";

/// Access where a specification of a device says none: CDI specification, `deviceNodes.permissions`.
const ALL_ACCESS: &str = "rwm";

/// Applies `edits`.
pub(super) fn apply(spec: &mut Spec, edits: &Edits) -> Result<()> {
    let (uid, gid) = spec.process().as_ref().map_or((0, 0), |p| (p.user().uid(), p.user().gid()));
    if let Some(process) = spec.process_mut() {
        edit_process(process, edits);
    }
    for node in &edits.device_nodes {
        let device = device(node, uid, gid)?;
        let access = if node.permissions.is_empty() { ALL_ACCESS } else { &node.permissions };
        add_device(spec, device, access);
    }
    if !edits.mounts.is_empty() {
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for edit in &edits.mounts {
            let mount = mount(edit);
            mounts.retain(|other| other.destination() != mount.destination());
            mounts.push(mount);
        }
        mounts.sort_by_key(|m| m.destination().components().count());
        spec.set_mounts(Some(mounts));
    }
    if !edits.hooks.is_empty() {
        spec.set_hooks(Some(hooks(&edits.hooks)?));
    }
    Ok(())
}

fn edit_process(process: &mut Process, edits: &Edits) {
    let mut env = process.env().clone().unwrap_or_default();
    for variable in &edits.env {
        let name = |variable: &str| variable.split('=').next().map(str::to_owned);
        env.retain(|other| name(other) != name(variable));
        env.push(variable.clone());
    }
    process.set_env(Some(env));
    if edits.additional_gids.is_empty() {
        return;
    }
    let mut user = process.user().clone();
    let mut groups = user.additional_gids().clone().unwrap_or_default();
    groups.extend(&edits.additional_gids);
    groups.sort_unstable();
    groups.dedup();
    user.set_additional_gids(Some(groups));
    process.set_user(user);
}

/// A node with what its specification leaves out taken from the host's.
fn device(edit: &DeviceNode, uid: u32, gid: u32) -> Result<LinuxDevice> {
    let host = Path::new(if edit.host_path.is_empty() { &edit.path } else { &edit.host_path });
    let kind = match edit.kind.as_str() {
        "b" => Some(LinuxDeviceType::B),
        "c" | "u" => Some(LinuxDeviceType::C),
        "p" => Some(LinuxDeviceType::P),
        _ => None,
    };
    let complete = kind == Some(LinuxDeviceType::P) || (kind.is_some() && edit.major.is_some() && edit.minor.is_some());
    let mut device = LinuxDevice::default();
    if !complete {
        let stat = rustix::fs::stat(host).map_err(|e| SpecError::io(FIELD, host, e.into()))?;
        device = devices::node(host, &stat).ok_or_else(|| {
            let words =
                format!("{} is no device node, and its CDI specification leaves out its numbers", host.display());
            SpecError::host(FIELD, words)
        })?;
        device.set_uid(None);
        device.set_gid(None);
        if kind.is_some_and(|kind| kind != device.typ()) {
            let words =
                format!("{} is not of the type {:?} that its CDI specification says", host.display(), edit.kind);
            return Err(SpecError::host(FIELD, words));
        }
    }
    device.set_path(PathBuf::from(&edit.path));
    device.set_typ(kind.unwrap_or(device.typ()));
    device.set_major(edit.major.unwrap_or(device.major()));
    device.set_minor(edit.minor.unwrap_or(device.minor()));
    device.set_file_mode(edit.file_mode.or(device.file_mode()));
    // "If not specified, the user of the container": a node that only root may open is of no use to it.
    device.set_uid(edit.uid.or((uid > 0).then_some(uid)));
    device.set_gid(edit.gid.or((gid > 0).then_some(gid)));
    Ok(device)
}

/// The node takes the place of one at the same path; what has a number is allowed.
fn add_device(spec: &mut Spec, device: LinuxDevice, access: &str) {
    let Some(linux) = spec.linux_mut() else { return };
    let mut nodes = linux.devices().clone().unwrap_or_default();
    nodes.retain(|other| other.path() != device.path());
    if device.typ() != LinuxDeviceType::P
        && let Some(resources) = linux.resources_mut()
    {
        let mut rules: Vec<LinuxDeviceCgroup> = resources.devices().clone().unwrap_or_default();
        rules.push(rule(true, Some(&device), access));
        resources.set_devices(Some(rules));
    }
    nodes.push(device);
    linux.set_devices(Some(nodes));
}

fn mount(edit: &MountEdit) -> Mount {
    let mut options = edit.options.clone();
    let is_bind = ["", "bind", "none"].contains(&edit.kind.as_str());
    if is_bind && !options.iter().any(|o| o == "bind" || o == "rbind") {
        options.push("bind".to_owned());
    }
    let mut mount = Mount::default();
    mount.set_destination(PathBuf::from(&edit.container_path));
    mount.set_source(Some(PathBuf::from(&edit.host_path)));
    mount.set_typ(Some(if is_bind { "bind".to_owned() } else { edit.kind.clone() }));
    mount.set_options(Some(options));
    mount
}

fn hooks(edits: &[HookEdit]) -> Result<Hooks> {
    let at = |name: &str| -> Option<Vec<Hook>> {
        let hooks: Vec<Hook> = edits.iter().filter(|edit| edit.hook_name == name).map(hook).collect();
        (!hooks.is_empty()).then_some(hooks)
    };
    let mut hooks = Hooks::default();
    // Deprecated, and run by the OCI runtimes at the same point as `createRuntime`, before it.
    let create_runtime = [at("prestart"), at("createRuntime")].into_iter().flatten().flatten().collect::<Vec<_>>();
    hooks.set_create_runtime((!create_runtime.is_empty()).then_some(create_runtime));
    hooks.set_create_container(at("createContainer"));
    hooks.set_start_container(at("startContainer"));
    hooks.set_poststart(at("poststart"));
    hooks.set_poststop(at("poststop"));
    Ok(hooks)
}

fn hook(edit: &HookEdit) -> Hook {
    let mut hook = Hook::default();
    hook.set_path(PathBuf::from(&edit.path));
    hook.set_args((!edit.args.is_empty()).then(|| edit.args.clone()));
    hook.set_env((!edit.env.is_empty()).then(|| edit.env.clone()));
    hook.set_timeout(edit.timeout);
    hook
}

/// The error of a device that cannot be had.
pub(crate) fn refused(error: stasis_cdi::Error) -> SpecError {
    match error {
        stasis_cdi::Error::Name { .. } => SpecError::invalid(FIELD, error.to_string()),
        _ => SpecError::host(FIELD, error.to_string()),
    }
}
