//! Operations on a chain (section 3): add, delete, check, garbage collection.
//!
//! Plugins run one after the other, on a thread of their own. What changes something runs to its end even when its
//! caller gives up. Two operations on one pod at once are the caller's to prevent.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::statfs;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::cache::{Attachment, Cache, bad_id};
use crate::config::{NetworkInfo, Source, describe, is_name};
use crate::plugin::{Call, check_args};
use crate::{Added, Config, Error, INTERFACE, NotReady, PodNetwork, Result};

/// The file system of namespaces, `NSFS_MAGIC` of `linux/magic.h`.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Chains that run at once. Each has a thread of those for blocking work, which a plugin that waits for its agent may
/// hold for minutes, and others need some, too: among them the pod in the host's network that is the agent.
const CHAINS_AT_ONCE: usize = 16;

/// The pod network of this node. Cloning gives another handle of the same.
#[derive(Clone, Debug)]
pub struct Cni(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: Config,
    source: Source,
    cache: Cache,
    turns: Semaphore,
}

impl Cni {
    /// The network on that configuration. Reads nothing yet.
    pub fn new(config: Config) -> Self {
        let cache = Cache(config.cache_dir.clone());
        Self(Arc::new(Inner { config, source: Source::default(), cache, turns: Semaphore::new(CHAINS_AT_ONCE) }))
    }

    /// Whether pods can be connected: a valid configuration, and all programs that it names. No plugin is run.
    pub fn status(&self) -> Result<NetworkInfo, NotReady> {
        let loaded = self.0.source.load(&self.0.config.conf_dir)?;
        describe(&loaded.0, &loaded.1, &self.0.config.bin_dirs)
    }

    /// Connects a pod: runs the chain's ADD in its namespace.
    ///
    /// # Errors
    /// [`Error::NotReady`] without a configuration; the first plugin's failure as [`Error::Plugin`], after everything
    /// that was added has been deleted again.
    pub async fn add(&self, pod: &PodNetwork) -> Result<Added> {
        let pod = pod.clone();
        self.blocking(move |inner| inner.add(pod)).await
    }

    /// Disconnects a pod: runs the chain's DEL with the configuration and the result of its ADD. A pod of which nothing
    /// is kept was not connected, or is no more: that is no error. `netns` may be gone.
    ///
    /// # Errors
    /// The first plugin's failure, after the others have been run; what is kept stays, and the call can be repeated.
    pub async fn del(&self, id: &str, netns: Option<&Path>) -> Result<()> {
        let (id, netns) = (id.to_owned(), netns.map(Path::to_owned));
        self.blocking(move |inner| {
            let Some(attachment) = inner.cache.get(&id)? else {
                debug!(id, "nothing was added to a network");
                return Ok(());
            };
            inner.del(&attachment, netns.as_deref())
        })
        .await
    }

    /// Asks the plugins whether a pod is still connected as it was: the chain's CHECK.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a pod that was not connected; a plugin's objection as [`Error::Plugin`].
    pub async fn check(&self, id: &str, netns: &Path) -> Result<()> {
        let (id, netns) = (id.to_owned(), netns.to_owned());
        self.blocking(move |inner| inner.check(&id, &netns)).await
    }

    /// Deletes what is kept of pods other than `valid`, then tells the plugins which are left (GC, since 1.1).
    ///
    /// # Errors
    /// The first failure, after all have been tried.
    pub async fn gc(&self, valid: &[String]) -> Result<()> {
        let valid = valid.to_vec();
        self.blocking(move |inner| inner.gc(&valid)).await
    }

    /// IDs of the pods of which something is kept: connected, or not yet disconnected to the end.
    pub fn cached(&self) -> Vec<String> {
        self.0.cache.ids()
    }

    /// What a pod got when it was connected; none if it is not connected.
    pub async fn result(&self, id: &str) -> Result<Option<Added>> {
        let id = id.to_owned();
        self.blocking(move |inner| {
            let Some(attachment) = inner.cache.get(&id)? else { return Ok(None) };
            let added = attachment.result.map(|result| Added::parse(result, &attachment.interface));
            added.transpose().map_err(|error| Error::Cache(format!("the kept result of pod {id}: {error}")))
        })
        .await
    }

    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> Result<T> + Send + 'static) -> Result<T> {
        // The semaphore is never closed.
        let _turn = self.0.turns.acquire().await;
        let inner = Arc::clone(&self.0);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result,
            Err(error) => Err(Error::Cache(format!("the work on a pod's network ended early: {error}"))),
        }
    }
}

impl Inner {
    fn add(&self, pod: PodNetwork) -> Result<Added> {
        if !is_name(&pod.id) {
            return Err(bad_id(&pod.id));
        }
        check_args(&pod)?;
        if !is_namespace(&pod.netns) {
            return Err(Error::InvalidArgument(format!(
                "{} is no network namespace: pod {} cannot be connected",
                pod.netns.display(),
                pod.id
            )));
        }
        if self.cache.get(&pod.id)?.is_some() {
            // The plugins would refuse, and taking their refusal back would cut the pod off.
            let id = &pod.id;
            return Err(Error::InvalidArgument(format!("pod {id} is connected already: disconnect it first")));
        }
        let loaded = self.source.load(&self.config.conf_dir)?;
        let mut attachment = Attachment::new(loaded.1.clone(), INTERFACE, pod);
        self.cache.put(&attachment)?;
        let added = self.run_add(&attachment).and_then(|added| {
            attachment.result = Some(added.result.clone());
            self.cache.put(&attachment).map(|()| added)
        });
        added.map_err(|error| self.undo(&attachment, error))
    }

    fn run_add(&self, attachment: &Attachment) -> Result<Added> {
        let call = self.call(attachment, "ADD", attachment.pod.netns.as_os_str());
        let mut result = Value::Null;
        for plugin in &attachment.network.plugins {
            let previous = [("prevResult", result.take())];
            let more: &[_] = if previous[0].1.is_null() { &[] } else { &previous };
            result = call.run(plugin, more)?;
        }
        Added::parse(result, &attachment.interface).map_err(|error| {
            let last = attachment.network.types().last().unwrap_or_default();
            call.failed(last, format!("its result cannot be understood: {error}"))
        })
    }

    /// Deletes what a failed ADD left (section 2: DEL after a failed ADD); the whole chain, as which plugins did
    /// something is not known for sure. The error is the first one, and says if this failed, too.
    fn undo(&self, attachment: &Attachment, mut error: Error) -> Error {
        if let Err(second) = self.del(attachment, Some(&attachment.pod.netns)) {
            warn!(id = attachment.pod.id, error = %second, "a failed ADD cannot be taken back");
            if let Error::Plugin(failure) = &mut error {
                failure.not_undone = second.to_string();
            }
        }
        error
    }

    fn del(&self, attachment: &Attachment, netns: Option<&Path>) -> Result<()> {
        let netns = netns.filter(|netns| is_namespace(netns)).map(Path::as_os_str).unwrap_or_default();
        let call = self.call(attachment, "DEL", netns);
        let mut first_error = None;
        for plugin in attachment.network.plugins.iter().rev() {
            if let Err(error) = call.run(plugin, &previous_result(attachment)) {
                // The others can still free what is theirs: firewall rules, addresses.
                first_error.get_or_insert(error);
            }
        }
        match first_error {
            None => self.cache.remove(&attachment.pod.id),
            Some(error) => Err(error),
        }
    }

    fn check(&self, id: &str, netns: &Path) -> Result<()> {
        let attachment = self.cache.get(id)?.filter(|attachment| attachment.result.is_some());
        let attachment =
            attachment.ok_or_else(|| Error::InvalidArgument(format!("pod {id} is not connected to a network")))?;
        if attachment.network.disable_check || !attachment.network.speaks("0.4.0") {
            return Ok(());
        }
        let call = self.call(&attachment, "CHECK", netns.as_os_str());
        for plugin in &attachment.network.plugins {
            call.run(plugin, &previous_result(&attachment))?;
        }
        Ok(())
    }

    fn gc(&self, valid: &[String]) -> Result<()> {
        let mut failures = Vec::new();
        for id in self.cache.ids().into_iter().filter(|id| !valid.contains(id)) {
            let deleted = self.cache.get(&id).and_then(|kept| kept.map_or(Ok(()), |kept| self.del(&kept, None)));
            failures.extend(deleted.err());
        }
        if let Ok(loaded) = self.source.load(&self.config.conf_dir)
            && loaded.1.speaks("1.1.0")
            && !loaded.1.disable_gc
        {
            let attachments: Vec<Value> =
                valid.iter().map(|id| json!({"containerID": id, "ifname": INTERFACE})).collect();
            let network = &loaded.1;
            let call = Call { config: &self.config, network, command: "GC", target: None, netns: OsStr::new("") };
            for plugin in &network.plugins {
                failures.extend(call.run(plugin, &[("cni.dev/valid-attachments", json!(attachments))]).err());
            }
        }
        failures.into_iter().next().map_or(Ok(()), Err)
    }

    fn call<'a>(&'a self, attachment: &'a Attachment, command: &'static str, netns: &'a OsStr) -> Call<'a> {
        let target = Some((&attachment.pod, attachment.interface.as_str()));
        Call { config: &self.config, network: &attachment.network, command, target, netns }
    }
}

/// The result of the ADD, for a plugin's DEL (since 0.4.0) and CHECK.
fn previous_result(attachment: &Attachment) -> Vec<(&'static str, Value)> {
    let known = attachment.result.clone().filter(|_| attachment.network.speaks("0.4.0"));
    known.map(|result| ("prevResult", result)).into_iter().collect()
}

/// Whether the path leads to a namespace: an empty file on which one was pinned once does not.
fn is_namespace(path: &Path) -> bool {
    #[allow(clippy::unnecessary_cast, reason = "the type differs between architectures")]
    statfs(path).is_ok_and(|file_system| file_system.f_type as i64 == NSFS_MAGIC)
}
