//! The parts of the daemon, made from its configuration and put together: database, images, network, shims, pods.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use redb::Database;
use stasis_checkpoint::EngineFacts;
use stasis_cni::Cni;
use stasis_cri::Parts;
use stasis_cri_api::runtime::{RuntimeHandler, RuntimeHandlerFeatures};
use stasis_criu::Version;
use stasis_image::Images;
use stasis_oci_runtime::Features;
use stasis_pod::Pods;
use stasis_task::ShimRuntime;

use crate::config::{Config, Level};
use crate::engines::{self, Engines};

/// The state database below the root directory.
const DATABASE: &str = "meta.redb";
/// Memory for the database's pages: its records have a few KiB each, and lists are answered from memory.
const DATABASE_CACHE: usize = 4 * 1024 * 1024;
/// CRIU's answers take half a second on a calm machine, and the start waits for them.
const SLOW_PROBE: Duration = Duration::from_secs(5);
/// Mount option by which an OCI runtime makes a mount and all below it read-only.
const RECURSIVE_READ_ONLY: &str = "rro";

/// Annotation in which runc names its version among its features.
const RUNC_VERSION: &str = "org.opencontainers.runc.version";

/// Makes the parts and lets the pod engine find its pods again.
pub(crate) async fn build(config: &Config) -> anyhow::Result<Parts> {
    let engines = Engines::locate(config);
    let database = open_database(&config.root)?;
    let checkpoints = tokio::task::spawn_blocking({
        let (config, engines) = (config.clone(), engines.clone());
        move || probe_criu(&config, &engines)
    });
    let runtimes = tokio::task::spawn_blocking({
        let (config, engines) = (config.clone(), engines.clone());
        move || features(&config, &engines)
    });
    let images = tokio::task::spawn_blocking({
        let (config, database) = (config.images(), Arc::clone(&database));
        move || Images::open(config, database)
    });
    let images = images.await?.context("cannot open the images")?;
    let cni = Cni::new(config.network(&engines));
    let shims = Arc::new(ShimRuntime::new(config.shims(&engines)));
    let ((unavailable, criu), runtimes) = (checkpoints.await?, runtimes.await?);
    let facts = engine_facts(runtimes.get(&config.default_runtime), criu);
    let pods = Pods::open(config.pods(&engines, unavailable, facts), images.clone(), cni.clone(), shims, database)
        .await
        .context("cannot open the pods")?;
    let doctor = Arc::new({
        let config = config.clone();
        move || crate::doctor::examine(&config)
    });
    let backend = stasis_cri::backend(pods.clone());
    let (streaming, serving) = stasis_streaming::Server::bind(config.streaming(), backend).await?;
    // It ends with the runtime: clients of a daemon that ends connect to the next one.
    tokio::spawn(serving);
    Ok(Parts {
        pods,
        streaming,
        images,
        cni,
        handlers: handlers(&runtimes, &config.default_runtime),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        configuration: Arc::new(RwLock::new(serde_json::to_string(config)?)),
        doctor,
    })
}

fn open_database(root: &Path) -> anyhow::Result<Arc<Database>> {
    let path = root.join(DATABASE);
    let database = Database::builder().set_cache_size(DATABASE_CACHE).create(&path).with_context(|| {
        format!("cannot open the state database {}; if it is damaged, move it away to begin anew", path.display())
    })?;
    Ok(Arc::new(database))
}

/// Why containers cannot be checkpointed here, if so, which is said once; and CRIU's version.
pub(crate) fn probe_criu(config: &Config, engines: &Engines) -> (Option<String>, Option<Version>) {
    if config.checkpoint.level == Level::None {
        return (None, None);
    }
    let begin = Instant::now();
    let (refusal, version) = match &engines.criu {
        None => (Some(format!("{} is not in {}", config.engines.criu.display(), engines.path().display())), None),
        Some(criu) => match stasis_criu::probe(criu) {
            Ok(probe) => (probe.refusal, Some(probe.version)),
            Err(error) => (Some(error.to_string()), None),
        },
    };
    if begin.elapsed() > SLOW_PROBE {
        tracing::warn!(seconds = begin.elapsed().as_secs(), "CRIU took long to say what it can do here");
    }
    if let Some(why) = &refusal {
        tracing::warn!(why, "no checkpoints and restores on this node; see `stasisd doctor`");
    }
    (refusal, version)
}

/// What each OCI runtime says of itself, by handler; none for one that says nothing.
fn features(config: &Config, engines: &Engines) -> BTreeMap<String, Option<Features>> {
    let ask = |runtime| engines::features(&engines.binary_of(runtime, config));
    config.runtimes.iter().map(|(name, runtime)| (name.clone(), ask(runtime))).collect()
}

/// What makes checkpoints here, for those who read a checkpoint image elsewhere.
fn engine_facts(runtime: Option<&Option<Features>>, criu_version: Option<Version>) -> EngineFacts {
    let version = runtime.and_then(Option::as_ref).and_then(|features| features.annotations.get(RUNC_VERSION));
    let cgroup = stasis_cgroup::Cgroups::probe().ok().map(|cgroups| match cgroups.mode() {
        stasis_cgroup::Mode::V1 => "v1",
        stasis_cgroup::Mode::V2 => "v2",
    });
    EngineFacts {
        criu_version,
        runtime: version.map(|version| ("runc".to_owned(), version.clone())),
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|text| text.trim().to_owned()),
        cgroup_version: cgroup.map(str::to_owned),
    }
}

/// The runtime handlers with what each can do, the default one also under the empty name.
fn handlers(runtimes: &BTreeMap<String, Option<Features>>, default: &str) -> Vec<RuntimeHandler> {
    let mut handlers = Vec::new();
    for (name, features) in runtimes {
        let knows = features
            .as_ref()
            .is_some_and(|features| features.mount_options.iter().any(|option| option == RECURSIVE_READ_ONLY));
        let features = RuntimeHandlerFeatures { recursive_read_only_mounts: knows, user_namespaces: false };
        if name == default {
            handlers.push(RuntimeHandler { name: String::new(), features: Some(features) });
        }
        handlers.push(RuntimeHandler { name: name.clone(), features: Some(features) });
    }
    handlers
}
