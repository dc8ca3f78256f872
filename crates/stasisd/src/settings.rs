//! What the daemon's configuration means for each library: the one place where one becomes the other.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use stasis_checkpoint::EngineFacts;
use stasis_image::RegistryConfig;
use stasis_pod::{CheckpointLimits, Handler, Keep, RestoreLevel, Retention};

use crate::config::{CgroupDriver, Config, Level};
use crate::engines::Engines;

/// containerd's namespace of pods: shims put it into the paths that they make.
const NAMESPACE: &str = "k8s.io";
/// Exists where systemd is process 1 (sd_booted(3)).
const SYSTEMD: &str = "/run/systemd/system";

impl Config {
    pub(crate) fn images(&self) -> stasis_image::Config {
        stasis_image::Config {
            root: self.root.clone(),
            registry: RegistryConfig {
                hosts_dir: self.registry.hosts_dir.clone(),
                insecure: self.registry.insecure.clone(),
            },
            max_concurrent_downloads: self.image.max_concurrent_downloads,
            pinned: self.image.pinned.clone(),
        }
    }

    /// What was added to a network must be deleted from it even after a reboot, so the cache is below `root`.
    pub(crate) fn network(&self, engines: &Engines) -> stasis_cni::Config {
        stasis_cni::Config {
            conf_dir: self.cni.conf_dir.clone(),
            bin_dirs: self.cni.bin_dirs.clone(),
            cache_dir: self.root.join("cni"),
            plugin_timeout: Duration::from_secs(self.cni.plugin_timeout_seconds),
            path: Some(engines.path()),
        }
    }

    pub(crate) fn shims(&self, engines: &Engines) -> stasis_task::Config {
        stasis_task::Config {
            state_dir: self.state.join("pods"),
            shim_dirs: engines.shim.iter().filter_map(|shim| shim.parent()).map(Path::to_owned).collect(),
            address: self.socket().display().to_string(),
            namespace: NAMESPACE.to_owned(),
            env: vec![(OsString::from("PATH"), engines.path())],
        }
    }

    pub(crate) fn streaming(&self) -> stasis_streaming::Config {
        let streaming = &self.streaming;
        let tls = streaming.tls_certificate.clone().zip(streaming.tls_key.clone());
        stasis_streaming::Config {
            address: SocketAddr::new(streaming.address, streaming.port),
            tls: tls.map(|(certificate, key)| stasis_streaming::Tls { certificate, key }),
            idle: Duration::from_secs(streaming.idle_timeout_seconds),
        }
    }

    fn retention(&self) -> Retention {
        let of = &self.checkpoint.retention;
        Retention {
            container: Keep { count: of.container_count, bytes: of.container_bytes },
            namespace: Keep { count: of.namespace_count, bytes: of.namespace_bytes },
            node: Keep { count: of.node_count, bytes: of.node_bytes },
            max_age: Duration::from_secs(of.max_age_seconds),
        }
    }

    /// `unavailable` is why there are no checkpoints here, if so.
    pub(crate) fn pods(
        &self,
        engines: &Engines,
        unavailable: Option<String>,
        facts: EngineFacts,
    ) -> stasis_pod::Config {
        let handler = |runtime: &crate::config::Runtime| Handler {
            runtime: runtime.r#type.clone(),
            binary: engines.binary_of(runtime, self),
            checkpoint: runtime.checkpoint_policy(),
        };
        stasis_pod::Config {
            root: self.root.clone(),
            state: self.state.clone(),
            handlers: self.runtimes.iter().map(|(name, runtime)| (name.clone(), handler(runtime))).collect(),
            default_handler: self.default_runtime.clone(),
            cgroup_driver: self.cgroup_driver(),
            policy: self.policy(unavailable),
            checkpoint_limits: CheckpointLimits {
                parallel: self.checkpoint.parallel,
                buffer_bytes: self.checkpoint.buffer_bytes,
                reserve_bytes: self.checkpoint.reserve_bytes,
            },
            checkpoint_retention: self.retention(),
            cdi: stasis_cdi::Registry::new(self.cdi.spec_dirs.clone()),
            engine_facts: facts,
        }
    }

    pub(crate) fn policy(&self, unavailable: Option<String>) -> stasis_pod::Policy {
        stasis_pod::Policy {
            restore_level: match self.checkpoint.level {
                Level::None => RestoreLevel::None,
                Level::CheckpointOnly => RestoreLevel::CheckpointOnly,
                Level::CheckpointRestore => RestoreLevel::CheckpointRestore,
            },
            archive_dirs: self.checkpoint.archive_dirs.clone(),
            checkpoint_timeout_max: Duration::from_secs(self.checkpoint.max_timeout_seconds),
            checkpoint_unavailable: unavailable,
        }
    }

    fn cgroup_driver(&self) -> stasis_cri_api::runtime::CgroupDriver {
        match self.cgroup.driver {
            CgroupDriver::Systemd => stasis_cri_api::runtime::CgroupDriver::Systemd,
            CgroupDriver::Auto if Path::new(SYSTEMD).is_dir() => stasis_cri_api::runtime::CgroupDriver::Systemd,
            CgroupDriver::Auto | CgroupDriver::Cgroupfs => stasis_cri_api::runtime::CgroupDriver::Cgroupfs,
        }
    }
}
