//! Tests that need a host with control groups of version 2 alone, AppArmor, systemd and all capabilities: `cargo xtask
//! vm` runs them in a virtual machine. Everywhere else they are ignored.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod apparmor;
mod devices;
mod freezer;
mod host;
mod limits;
mod systemd;
mod users;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use stasis_cri_api::runtime::{
    ContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext, SecurityProfile,
    security_profile::ProfileType,
};
use stasis_e2e::Stage;
use xtask::cri::{Container, Pod, container_config};

const ROOT: &str = "/sys/fs/cgroup";

/// The directory of a container's cgroup.
async fn cgroup(stage: &mut Stage, container: &Container) -> Result<PathBuf> {
    let process = stage.process(container).await?;
    let line = fs::read_to_string(process.join("cgroup"))?;
    let path = line.trim_end().strip_prefix("0::/").context("the process is in cgroups of version 1, too")?;
    Ok(Path::new(ROOT).join(path))
}

/// A file of a cgroup, without the newline.
fn value(dir: &Path, file: &str) -> Result<String> {
    let path = dir.join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(text.trim_end().to_owned())
}

/// The number behind a key in a file of a cgroup.
fn keyed(dir: &Path, file: &str, key: &str) -> Result<u64> {
    let text = value(dir, file)?;
    let number = text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
    number.with_context(|| format!("no {key} in {text}"))
}

fn context(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

fn resources(config: &mut ContainerConfig, resources: LinuxContainerResources) {
    config.linux.as_mut().unwrap().resources = Some(resources);
}

fn profile(kind: ProfileType, name: &str) -> Option<SecurityProfile> {
    Some(SecurityProfile { profile_type: kind.into(), localhost_ref: name.to_owned() })
}

/// Checkpoints a container, removes its pod, and starts it again in another as `config` says but for the image.
async fn carry(
    stage: &mut Stage,
    pod: &Pod,
    container: &Container,
    mut config: ContainerConfig,
) -> Result<(Pod, Container)> {
    let archive = stage.put_away(pod, container, "carried.tar").await?;
    let pod = stage.pod("second").await?;
    config.image = container_config("", &archive, &[]).image;
    let container = stage.container(&pod, config).await?;
    Ok((pod, container))
}
