//! Container Network Interface 1.1, the runtime's side: configuration lists, plugin execution, cached results.
//!
//! A pod's network namespace comes in, addresses come out; what a plugin does in between is its own. Section numbers in
//! comments are those of the CNI specification 1.1.0. This crate knows nothing of pods' states or of who made the
//! namespace; the loopback device is that maker's care.
//!
//! # What is kept
//!
//! `<cache_dir>/<id>.json`, one a pod, written before the first plugin runs: the configuration as it was, the arguments,
//! and after a success the result. What was added can therefore be deleted after a crash, a restart, or a change of the
//! configuration. It goes when every plugin of the chain has deleted.

mod cache;
mod config;
mod error;
mod network;
mod plugin;
mod result;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use config::NetworkInfo;
pub use error::{Error, NotReady, PluginFailure, Result};
pub use network::Cni;
pub use result::{Added, Dns, Interface};

/// Name of a pod's interface, as Kubernetes expects it.
pub const INTERFACE: &str = "eth0";

/// Where things are, and how long they may take.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory of the configuration files; the first valid one by name counts.
    pub conf_dir: PathBuf,
    /// Directories of the plugins' programs, in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// Directory of what is kept, of this daemon alone; made if need be.
    pub cache_dir: PathBuf,
    /// A plugin that takes longer is killed.
    pub plugin_timeout: Duration,
    /// `PATH` of the plugins, which call `iptables` and the like; none: the daemon's own.
    pub path: Option<OsString>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cache_dir: "/var/lib/stasis/cni".into(),
            // Half of the kubelet's two minutes: time is left to take back what was added.
            plugin_timeout: Duration::from_secs(60),
            path: None,
        }
    }
}

/// A pod that is to be connected, and what a plugin may want to know of it.
///
/// The fields from `port_mappings` on reach only plugins whose configuration names the capability.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodNetwork {
    /// The pod's ID: `CNI_CONTAINERID`.
    pub id: String,
    /// Its network namespace: a path that can be opened.
    pub netns: PathBuf,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_UID`.
    pub uid: String,
    /// Capability `portMappings`.
    pub port_mappings: Vec<PortMapping>,
    /// Capability `bandwidth`.
    pub bandwidth: Option<Bandwidth>,
    /// Capability `dns`.
    pub dns: Option<Dns>,
    /// Capability `ips`: wanted addresses, with or without a prefix length.
    pub ips: Vec<String>,
    /// Capability `mac`: wanted hardware address.
    pub mac: Option<String>,
    /// Capability `cgroupPath`.
    pub cgroup_path: Option<String>,
    /// Capability `io.kubernetes.cri.pod-annotations`.
    pub annotations: BTreeMap<String, String>,
    /// Any further capability arguments by name, such as `ipRanges`.
    pub capability_args: BTreeMap<String, serde_json::Value>,
}

/// One port of the host that leads into the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// Port on the host.
    pub host_port: u16,
    /// Port in the pod.
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// Address on the host; empty: all.
    #[serde(rename = "hostIP", default, skip_serializing_if = "String::is_empty")]
    pub host_ip: String,
}

/// Limits of a pod's traffic: rates in bits a second, bursts in bits. Zero is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bandwidth {
    /// Towards the pod.
    pub ingress_rate: u64,
    /// Towards the pod, at once.
    pub ingress_burst: u64,
    /// From the pod.
    pub egress_rate: u64,
    /// From the pod, at once.
    pub egress_burst: u64,
}
