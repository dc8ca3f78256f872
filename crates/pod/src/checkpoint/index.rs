//! The checkpoints that this node made: which there are, which are kept, and which go.
//!
//! A row is written once the archive or the image is durable, and goes with it. What was made elsewhere, or carried away, is
//! not in the index and is never touched; a row whose archive or image is gone is not shown, and dropped when the next
//! checkpoint is entered.

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::CheckpointReport;
use crate::error::{Error, IoContext as _, Kind, Result};
use crate::pods::Pods;
use crate::record::now;

/// Digits of a checkpoint's ID: enough to be unique on a node, and few enough to type.
const ID_DIGITS: usize = 12;

/// A checkpoint of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointEntry {
    /// Its ID.
    pub id: String,
    /// Container ID.
    pub container_id: String,
    /// Container name.
    pub container: String,
    /// Pod name.
    pub pod: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// UID of the pod: checkpoints of a container that was made anew belong together.
    #[serde(default)]
    pub pod_uid: String,
    /// Path of the archive; empty for an image.
    pub path: String,
    /// Reference of the image; empty for an archive.
    pub image: String,
    /// ID of the image, so that another one of that name is not taken for it.
    #[serde(default)]
    pub image_id: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// Whether it is never pruned.
    pub pinned: bool,
}

/// How many checkpoints are kept, by what they are of; 0 is no limit. Pinned ones count but stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Of each container.
    pub container: Keep,
    /// Of each Kubernetes namespace.
    pub namespace: Keep,
    /// Of the node.
    pub node: Keep,
    /// Older ones go.
    pub max_age: Duration,
}

/// The newest ones that stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// So many.
    pub count: u64,
    /// So many bytes.
    pub bytes: u64,
}

impl Retention {
    /// Those of `all` that go, but for the one whose ID is `spared`, which counts; `at` is now, in nanoseconds since 1970.
    fn surplus<'a>(&self, all: &'a [CheckpointEntry], at: i64, spared: Option<&str>) -> Vec<&'a CheckpointEntry> {
        let mut newest: Vec<&CheckpointEntry> = all.iter().collect();
        newest.sort_by_key(|entry| std::cmp::Reverse(entry.created_at));
        let max_age = i64::try_from(self.max_age.as_nanos()).unwrap_or(i64::MAX);
        let mut containers = Tally::new(self.container);
        let mut namespaces = Tally::new(self.namespace);
        let mut node = Tally::new(self.node);
        let goes = |entry: &&CheckpointEntry| {
            let old = max_age > 0 && at.saturating_sub(entry.created_at) > max_age;
            let of_container = format!("{}/{}/{}/{}", entry.namespace, entry.pod, entry.pod_uid, entry.container);
            let over = [
                containers.is_over(of_container, entry),
                namespaces.is_over(entry.namespace.clone(), entry),
                node.is_over(String::new(), entry),
            ];
            !entry.pinned && spared != Some(&entry.id) && (old || over.contains(&true))
        };
        newest.into_iter().filter(goes).collect()
    }
}

/// What has been kept so far, newest first.
struct Tally {
    keep: Keep,
    seen: HashMap<String, Keep>,
}

impl Tally {
    fn new(keep: Keep) -> Self {
        Self { keep, seen: HashMap::new() }
    }

    fn is_over(&mut self, of: String, entry: &CheckpointEntry) -> bool {
        let seen = self.seen.entry(of).or_default();
        seen.count += 1;
        seen.bytes = seen.bytes.saturating_add(entry.size_bytes);
        let over = |limit: u64, value: u64| limit > 0 && value > limit;
        over(self.keep.count, seen.count) || over(self.keep.bytes, seen.bytes)
    }
}

impl Pods {
    /// The checkpoints of this node, newest first.
    ///
    /// # Errors
    /// Where the index cannot be read.
    pub async fn checkpoints(&self) -> Result<Vec<CheckpointEntry>> {
        Ok(self.indexed().await?.0)
    }

    /// Removes checkpoints by ID, unique beginning of one, path or image reference.
    ///
    /// # Errors
    /// `NotFound` for a name that fits none, before anything is removed.
    pub async fn remove_checkpoints(&self, names: &[String]) -> Result<Vec<CheckpointEntry>> {
        let _index = self.checkpoint_index.lock().await;
        let all = self.checkpoints().await?;
        let entries = names.iter().map(|name| find(&all, name)).collect::<Result<Vec<_>>>()?;
        self.remove_entries(entries).await
    }

    /// Removes what is beyond `retention`, or the configured one; with `dry_run`, only says what that is.
    ///
    /// # Errors
    /// Where one cannot be removed.
    pub async fn prune_checkpoints(
        &self,
        retention: Option<&Retention>,
        dry_run: bool,
    ) -> Result<Vec<CheckpointEntry>> {
        let _index = self.checkpoint_index.lock().await;
        let all = self.checkpoints().await?;
        let retention = retention.unwrap_or(&self.config.checkpoint_retention);
        let surplus = retention.surplus(&all, now(), None);
        if dry_run {
            return Ok(surplus.into_iter().cloned().collect());
        }
        self.remove_entries(surplus).await
    }

    /// Keeps a checkpoint from being pruned, or lets it be pruned again.
    ///
    /// # Errors
    /// `NotFound` if there is none of that name.
    pub async fn pin_checkpoint(&self, name: &str, pinned: bool) -> Result<CheckpointEntry> {
        let _index = self.checkpoint_index.lock().await;
        let all = self.checkpoints().await?;
        let entry = CheckpointEntry { pinned, ..find(&all, name)?.clone() };
        self.store.put_checkpoint(&entry).await?;
        Ok(entry)
    }

    /// Enters a new archive, and prunes.
    pub(super) async fn remember_archive(&self, report: &CheckpointReport) -> Result<()> {
        let path = report.path.display().to_string();
        self.remember(CheckpointEntry { path, ..report.entry.clone() }).await
    }

    /// Enters a new image, and prunes.
    pub(super) async fn remember_image(&self, report: &CheckpointReport, reference: &str) -> Result<()> {
        let made = self.images.resolve(reference);
        let made = made.ok_or_else(|| Error::internal(format!("the image {reference} is gone again")))?;
        let image = made.references.first().cloned().unwrap_or_else(|| reference.to_owned());
        self.remember(CheckpointEntry { image, image_id: made.id.clone(), ..report.entry.clone() }).await
    }

    async fn remember(&self, mut entry: CheckpointEntry) -> Result<()> {
        entry.id = stasis_sys::file::random_id()[..ID_DIGITS].to_owned();
        let _index = self.checkpoint_index.lock().await;
        let (mut all, gone) = self.indexed().await?;
        for gone in gone {
            self.store.delete_checkpoint(&gone.id).await?;
        }
        // One that was written over is no longer there.
        for old in all.extract_if(.., |old| old.path == entry.path && old.image == entry.image) {
            self.store.delete_checkpoint(&old.id).await?;
            entry.pinned |= old.pinned;
        }
        self.store.put_checkpoint(&entry).await?;
        // The new one is there whatever becomes of the old ones, and does not go with them: somebody was told of it.
        let id = entry.id.clone();
        all.push(entry);
        let surplus = self.config.checkpoint_retention.surplus(&all, now(), Some(&id));
        if let Err(error) = self.remove_entries(surplus).await {
            warn!(%error, "cannot prune checkpoints");
        }
        Ok(())
    }

    /// Entries whose archive or image is still there, and still the one that was made, newest first; and the others.
    async fn indexed(&self) -> Result<(Vec<CheckpointEntry>, Vec<CheckpointEntry>)> {
        let (mut present, mut gone) = (Vec::new(), Vec::new());
        for entry in self.store.checkpoints()? {
            let there = match entry.image.as_str() {
                "" => is_there(&entry).await,
                image => self.images.resolve(image).is_some_and(|image| image.id == entry.image_id),
            };
            if there { present.push(entry) } else { gone.push(entry) }
        }
        present.sort_by_key(|entry| std::cmp::Reverse(entry.created_at));
        Ok((present, gone))
    }

    async fn remove_entries(&self, entries: Vec<&CheckpointEntry>) -> Result<Vec<CheckpointEntry>> {
        let mut removed = Vec::new();
        for entry in entries {
            match entry.image.as_str() {
                "" => match tokio::fs::remove_file(&entry.path).await {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(error).doing(format_args!("remove the archive {}", entry.path));
                    }
                    _ => {}
                },
                image => self.images.remove(image).await?,
            }
            self.store.delete_checkpoint(&entry.id).await?;
            info!(checkpoint = entry.id, path = entry.path, image = entry.image, "removed a checkpoint");
            removed.push(entry.clone());
        }
        Ok(removed)
    }
}

/// Whether an archive has not gone, nor been replaced by a file of another size. One that cannot be looked at may be there.
async fn is_there(entry: &CheckpointEntry) -> bool {
    match tokio::fs::metadata(&entry.path).await {
        Ok(facts) => facts.len() == entry.size_bytes,
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}

fn find<'a>(all: &'a [CheckpointEntry], name: &str) -> Result<&'a CheckpointEntry> {
    let exact = |entry: &&CheckpointEntry| [&entry.id, &entry.path, &entry.image].into_iter().any(|own| own == name);
    if let Some(entry) = all.iter().find(exact).filter(|_| !name.is_empty()) {
        return Ok(entry);
    }
    let mut fitting = all.iter().filter(|entry| !name.is_empty() && entry.id.starts_with(name));
    match (fitting.next(), fitting.next()) {
        (Some(entry), None) => Ok(entry),
        (Some(_), Some(_)) => Err(Error::invalid(format!("more than one checkpoint begins with {name}"))),
        _ => Err(Error::new(
            Kind::NotFound,
            format!("no checkpoint {name}: `stasis checkpoint ls` shows those that this node made"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, container: &str, namespace: &str, age: i64) -> CheckpointEntry {
        CheckpointEntry {
            id: id.into(),
            container: container.into(),
            namespace: namespace.into(),
            size_bytes: 100,
            created_at: 1_000_000_000_000 - age * 1_000_000_000,
            ..CheckpointEntry::default()
        }
    }

    fn check_sparing(spared: Option<&str>, retention: &Retention, all: &[CheckpointEntry], expected: &[&str]) {
        let surplus = retention.surplus(all, 1_000_000_000_000, spared);
        let mut gone: Vec<&str> = surplus.iter().map(|entry| entry.id.as_str()).collect();
        gone.sort_unstable();
        assert_eq!(gone, expected, "{retention:?}");
    }

    fn check(retention: &Retention, all: &[CheckpointEntry], expected: &[&str]) {
        check_sparing(None, retention, all, expected);
    }

    #[test]
    fn the_one_that_was_just_made_stays_and_counts() {
        let all = [entry("a1", "a", "x", 0), entry("a2", "a", "x", 10)];
        let too_large = Retention { node: Keep { count: 0, bytes: 50 }, ..Retention::default() };
        check(&too_large, &all, &["a1", "a2"]);
        check_sparing(Some("a1"), &too_large, &all, &["a2"]);
        let one = Retention { container: Keep { count: 1, bytes: 0 }, ..Retention::default() };
        check_sparing(Some("a1"), &one, &all, &["a2"]);
    }

    #[test]
    fn the_newest_stay_by_count_bytes_and_age() {
        let all = [
            entry("a1", "a", "x", 10),
            entry("a2", "a", "x", 20),
            entry("a3", "a", "x", 30),
            entry("b1", "b", "y", 40),
        ];
        let count = |count| Keep { count, bytes: 0 };
        check(&Retention::default(), &all, &[]);
        check(&Retention { container: count(1), ..Retention::default() }, &all, &["a2", "a3"]);
        check(&Retention { namespace: Keep { count: 0, bytes: 250 }, ..Retention::default() }, &all, &["a3"]);
        check(&Retention { node: count(3), ..Retention::default() }, &all, &["b1"]);
        check(&Retention { max_age: Duration::from_secs(25), ..Retention::default() }, &all, &["a3", "b1"]);
        let pinned = [all[0].clone(), CheckpointEntry { pinned: true, ..all[1].clone() }, all[2].clone()];
        check(&Retention { container: count(1), ..Retention::default() }, &pinned, &["a3"]);
    }

    #[test]
    fn a_checkpoint_is_found_by_id_beginning_path_and_reference() {
        let mut all = vec![entry("abc1", "a", "x", 1), entry("abd2", "a", "x", 2)];
        all[0].path = "/archives/a.tar".into();
        all[1].image = "localhost/a:1".into();
        for (name, expected) in
            [("abc1", "abc1"), ("abc", "abc1"), ("/archives/a.tar", "abc1"), ("localhost/a:1", "abd2")]
        {
            assert_eq!(find(&all, name).unwrap().id, expected);
        }
        assert_eq!(find(&all, "ab").unwrap_err().kind(), Kind::InvalidArgument);
        assert_eq!(find(&all, "").unwrap_err().kind(), Kind::NotFound);
    }
}
