//! How each runtime is configured for a node and started. The only place that knows their options.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use stasis_cri_api::runtime::CgroupDriver;

use super::{Ground, Setup};
use crate::places::Places;

/// Whose daemon a node runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// Ours, as built.
    Stasis,
    /// Debian's containerd with runc.
    Containerd,
}

impl Runtime {
    /// The daemon's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stasis => "stasisd",
            Self::Containerd => "containerd",
        }
    }

    /// Writes the configuration and returns the command that starts the daemon.
    pub(super) fn command(self, places: &Places, ground: &Ground, setup: &Setup) -> Result<Command> {
        let file = ground.disk.join("config.toml");
        let text = match self {
            Self::Stasis => stasis(places, ground, setup),
            Self::Containerd => containerd(places, ground, &setup.sandbox_image),
        };
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        let mut command = match self {
            Self::Stasis => Command::new(places.daemon()),
            Self::Containerd => Command::new(places.peers().join("bin/containerd")),
        };
        command.arg("--config").arg(&file);
        if self == Self::Stasis {
            command.arg("--root").arg(ground.root()).arg("--state").arg(ground.state());
            command.arg("--listen").arg(ground.socket());
        }
        Ok(command)
    }
}

fn stasis(places: &Places, ground: &Ground, setup: &Setup) -> String {
    let engines = places.engines();
    format!(
        r#"version = 1

[engines]
runc = {runc}
criu = {criu}
path = [{path}]

[cni]
conf_dir = {conf_dir}
bin_dirs = [{bin_dir}]

[cgroup]
driver = "{driver}"

[shim]
path = {shim}

[checkpoint]
level = "{level}"
archive_dirs = [{archives}]
{more}
"#,
        runc = quoted(&engines.join("bin/runc")),
        criu = quoted(&engines.join("bin/criu")),
        path = quoted(&engines.join("bin")),
        conf_dir = quoted(&ground.cni()),
        bin_dir = quoted(&engines.join("cni")),
        shim = quoted(&places.shim()),
        archives = quoted(&ground.archives()),
        driver = match setup.cgroup_driver {
            CgroupDriver::Systemd => "systemd",
            CgroupDriver::Cgroupfs => "cgroupfs",
        },
        level = setup.checkpoint_level,
        more = setup.more,
    )
}

/// containerd as it comes, but for its places; without NRI, whose ground are the system's; and content with the OOM
/// score that a host without CAP_SYS_RESOURCE allows.
fn containerd(places: &Places, ground: &Ground, sandbox_image: &str) -> String {
    let engines = places.engines();
    format!(
        r#"version = 3
root = {root}
state = {state}

[grpc]
  address = {socket}

[ttrpc]
  address = {ttrpc}

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '{sandbox_image}'

[plugins.'io.containerd.cri.v1.runtime']
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
  runtime_path = {shim}

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = {runc}
  Root = {runc_state}
  SystemdCgroup = false

[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = [{cni}]
  conf_dir = {conf_dir}

[plugins.'io.containerd.internal.v1.opt']
  path = {opt}

[plugins.'io.containerd.nri.v1.nri']
  disable = true
"#,
        root = quoted(&ground.root()),
        state = quoted(&ground.state()),
        socket = quoted(&ground.socket()),
        ttrpc = quoted(&ground.run.join("ttrpc.sock")),
        shim = quoted(&places.peers().join("bin/containerd-shim-runc-v2")),
        runc = quoted(&engines.join("bin/runc")),
        runc_state = quoted(&ground.run.join("runc")),
        cni = quoted(&engines.join("cni")),
        conf_dir = quoted(&ground.cni()),
        opt = quoted(&ground.disk.join("opt")),
    )
}

/// A path as a TOML string.
fn quoted(path: &Path) -> String {
    format!("{:?}", path.display().to_string())
}
