//! The parts of the daemon, made from its configuration and put together: database, images, network, shims, pods.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use redb::Database;
use stasis_cni::Cni;
use stasis_cri::{Checkpoints, Parts};
use stasis_cri_api::runtime::{RuntimeHandler, RuntimeHandlerFeatures};
use stasis_image::Images;
use stasis_pod::Pods;
use stasis_task::ShimRuntime;

use crate::config::{Config, Level};
use crate::engines::{self, Engines};

/// The state database below the root directory.
const DATABASE: &str = "meta.redb";
/// Memory for the database's pages: its records have a few KiB each, and lists are answered from memory.
const DATABASE_CACHE: usize = 4 * 1024 * 1024;
/// Mount option by which an OCI runtime makes a mount and all below it read-only.
const RECURSIVE_READ_ONLY: &str = "rro";

/// Makes the parts and lets the pod engine find its pods again.
pub(crate) async fn build(config: &Config) -> anyhow::Result<Parts> {
    let engines = Engines::locate(config);
    let database = open_database(&config.root)?;
    let checkpoints = tokio::task::spawn_blocking({
        let (config, engines) = (config.clone(), engines.clone());
        move || checkpoints(&config, &engines)
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
    let checkpoints = checkpoints.await?;
    let pods = Pods::open(config.pods(&engines, &checkpoints), images.clone(), cni.clone(), shims, database)
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
        checkpoints,
        handlers: handlers.await?,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        configuration: serde_json::to_string(config)?,
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
fn checkpoints(config: &Config, engines: &Engines) -> Checkpoints {
    if config.checkpoint.level == Level::None {
        return Checkpoints::Forbidden;
    }
    let refusal = match &engines.criu {
        None => Some(format!("{} is not in {}", config.engines.criu.display(), engines.path().display())),
        Some(criu) => match stasis_criu::probe(criu) {
            Ok(probe) => probe.refusal,
            Err(error) => Some(error.to_string()),
        },
    };
    match refusal {
        None => Checkpoints::Available,
        Some(why) => {
            tracing::warn!(why, "no checkpoints and restores on this node; see `stasisd doctor`");
            Checkpoints::Unavailable(why)
        }
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
