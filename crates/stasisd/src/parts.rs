//! The parts of the daemon, made from its configuration and put together: database, images, network, shims, pods.

use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use redb::Database;
use stasis_checkpoint::EngineFacts;
use stasis_cni::Cni;
use stasis_cri::{CheckpointSwitch, Checkpoints, Parts};
use stasis_cri_api::runtime::{RuntimeHandler, RuntimeHandlerFeatures};
use stasis_criu::Version;
use stasis_image::Images;
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
        move || {
            let (checkpoints, criu) = checkpoints(&config, &engines);
            (checkpoints, engine_facts(&config, &engines, criu))
        }
    });
    let handlers = tokio::task::spawn_blocking({
        let (config, engines) = (config.clone(), engines.clone());
        move || handlers(&config, &engines)
    });
    let images = tokio::task::spawn_blocking({
        let (config, database) = (config.images(), Arc::clone(&database));
        move || Images::open(config, database)
    });
    let images = images.await?.context("cannot open the images")?;
    let cni = Cni::new(config.network(&engines));
    let shims = Arc::new(ShimRuntime::new(config.shims(&engines)));
    let (checkpoints, facts) = checkpoints.await?;
    let pods = Pods::open(config.pods(&engines, &checkpoints, facts), images.clone(), cni.clone(), shims, database)
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
        checkpoints: CheckpointSwitch::new(checkpoints),
        handlers: handlers.await?,
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

/// Whether containers can be checkpointed; if not, it is said here once, at the start.
pub(crate) fn checkpoints(config: &Config, engines: &Engines) -> (Checkpoints, Option<Version>) {
    if config.checkpoint.level == Level::None {
        return (Checkpoints::Forbidden, None);
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
    match refusal {
        None => (Checkpoints::Available, version),
        Some(why) => {
            tracing::warn!(why, "no checkpoints and restores on this node; see `stasisd doctor`");
            (Checkpoints::Unavailable(why), version)
        }
    }
}

/// What makes checkpoints here, for those who read a checkpoint image elsewhere.
fn engine_facts(config: &Config, engines: &Engines, criu_version: Option<Version>) -> EngineFacts {
    let runtime = config.runtimes.get(&config.default_runtime).map(|runtime| engines.binary_of(runtime, config));
    let version = runtime
        .as_deref()
        .and_then(engines::features)
        .and_then(|mut features| features.annotations.remove(RUNC_VERSION));
    let cgroup = stasis_cgroup::Cgroups::probe().ok().map(|cgroups| match cgroups.mode() {
        stasis_cgroup::Mode::V1 => "v1",
        stasis_cgroup::Mode::V2 => "v2",
    });
    EngineFacts {
        criu_version,
        runtime: version.map(|version| ("runc".to_owned(), version)),
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|text| text.trim().to_owned()),
        cgroup_version: cgroup.map(str::to_owned),
    }
}

/// The runtime handlers with what each can do, the default one also under the empty name.
fn handlers(config: &Config, engines: &Engines) -> Vec<RuntimeHandler> {
    let mut handlers = Vec::new();
    for (name, runtime) in &config.runtimes {
        let binary = engines.binary_of(runtime, config);
        let knows = engines::features(&binary)
            .is_some_and(|features| features.mount_options.iter().any(|option| option == RECURSIVE_READ_ONLY));
        let features = RuntimeHandlerFeatures { recursive_read_only_mounts: knows, user_namespaces: false };
        if *name == config.default_runtime {
            handlers.push(RuntimeHandler { name: String::new(), features: Some(features) });
        }
        handlers.push(RuntimeHandler { name: name.clone(), features: Some(features) });
    }
    handlers
}
