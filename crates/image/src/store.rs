//! The images of this node: records in the database, and the list in memory that all readers see.
//!
//! A change goes to the database first, in one transaction that is durable when it returns; then a new list takes the place of
//! the old one. Readers hold whichever list was current and never wait.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use stasis_content::Content;

use crate::error::{Error, Result, state_error};
use crate::image::{CONFIG_BYTES_MAX, Image, Record, digest};

const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");
/// Version of the records that this program writes: one byte in front of the JSON.
const VERSION: u8 = 1;

/// The images of a node: an immutable list.
pub(crate) type List = Arc<Vec<Arc<Image>>>;

#[derive(Debug)]
pub(crate) struct Store {
    db: Arc<Database>,
    pinned: Vec<String>,
    list: RwLock<List>,
    /// Held by whoever changes records, from reading the list to replacing it.
    change: tokio::sync::Mutex<()>,
}

/// Records to write (all of them by their IDs), and IDs to delete.
#[derive(Debug, Default)]
struct Change {
    put: Vec<(Record, Image)>,
    delete: Vec<String>,
}

impl Store {
    /// Reads all records. One whose blobs or layers are not there (a disk that was cleaned by hand) is dropped, with a
    /// warning: the image is then pulled again. One of an unknown version is an error: a downgrade must not lose images.
    pub(crate) fn open(
        db: Arc<Database>,
        pinned: Vec<String>,
        content: &Content,
        has_layer: impl Fn(&str) -> bool,
    ) -> Result<Store> {
        let mut images = Vec::new();
        let mut broken = Vec::new();
        for (id, value) in read_all(&db)? {
            let record = decode(&id, &value)?;
            match load(record, &pinned, content, &has_layer) {
                Ok(image) => images.push(Arc::new(image)),
                Err(reason) => {
                    tracing::warn!(image = id, reason, "dropping an image that is not whole any more; pull it again");
                    broken.push(id);
                }
            }
        }
        let store = Store { db, pinned, list: RwLock::new(Arc::new(images)), change: tokio::sync::Mutex::default() };
        store.write(&Change { delete: broken, ..Change::default() })?;
        Ok(store)
    }

    pub(crate) fn list(&self) -> List {
        self.list.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Records an image. References it has been given are taken from images that had them; an image of the same ID keeps its
    /// other references and repository digests.
    pub(crate) async fn put(self: &Arc<Self>, mut record: Record, config_json: Vec<u8>) -> Result<Arc<Image>> {
        let _change = self.change.lock().await;
        let list = self.list();
        let mut change = Change::default();
        let id = record.config.digest.clone();
        for other in list.iter() {
            if other.id == id {
                merge(&mut record.references, &other.references);
                merge(&mut record.repo_digests, &other.repo_digests);
            } else if other.references.iter().any(|reference| record.references.contains(reference)) {
                let mut rest = (*other.record).clone();
                rest.references.retain(|reference| !record.references.contains(reference));
                let mut image = (**other).clone();
                image.references = rest.references.clone();
                image.pinned = image.references.iter().any(|reference| self.pinned.contains(reference));
                image.record = Arc::new(rest.clone());
                change.put.push((rest, image));
            }
        }
        let image = record.clone().image(&config_json, &self.pinned)?;
        change.put.push((record, image));
        self.apply(change).await?;
        let list = self.list();
        let found = list.iter().find(|image| image.id == id).cloned();
        found.ok_or(Error::NotFound { name: id })
    }

    /// Notes that an image is to be had under a repository digest too.
    pub(crate) async fn add_repo_digest(self: &Arc<Self>, id: &str, repo_digest: String) -> Result<()> {
        let _change = self.change.lock().await;
        let list = self.list();
        let Some(image) = list.iter().find(|image| image.id == id) else { return Ok(()) };
        let mut record = (*image.record).clone();
        merge(&mut record.repo_digests, &[repo_digest]);
        let mut image = (**image).clone();
        image.repo_digests = record.repo_digests.clone();
        image.record = Arc::new(record.clone());
        self.apply(Change { put: vec![(record, image)], delete: Vec::new() }).await
    }

    /// Forgets an image.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str) -> Result<()> {
        let _change = self.change.lock().await;
        self.apply(Change { put: Vec::new(), delete: vec![id.to_owned()] }).await
    }

    /// Writes a change and shows it. Runs to its end even if the caller goes away: what is durable is also seen.
    async fn apply(self: &Arc<Self>, change: Change) -> Result<()> {
        let store = self.clone();
        crate::blocking(move || {
            store.write(&change)?;
            let mut images: BTreeMap<String, Arc<Image>> =
                store.list().iter().map(|image| (image.id.clone(), image.clone())).collect();
            for id in change.delete {
                images.remove(&id);
            }
            for (_, image) in change.put {
                images.insert(image.id.clone(), Arc::new(image));
            }
            let list = Arc::new(images.into_values().collect());
            *store.list.write().unwrap_or_else(std::sync::PoisonError::into_inner) = list;
            Ok(())
        })
        .await
    }

    fn write(&self, change: &Change) -> Result<()> {
        const DOING: &str = "write image records";
        let transaction = self.db.begin_write().map_err(state_error(DOING))?;
        {
            let mut table = transaction.open_table(IMAGES).map_err(state_error(DOING))?;
            for id in &change.delete {
                table.remove(id.as_str()).map_err(state_error(DOING))?;
            }
            for (record, image) in &change.put {
                let value =
                    encode(record).map_err(|e| Error::Record { key: image.id.clone(), reason: e.to_string() })?;
                table.insert(image.id.as_str(), value.as_slice()).map_err(state_error(DOING))?;
            }
        }
        transaction.commit().map_err(state_error(DOING))
    }
}

fn merge(into: &mut Vec<String>, from: &[String]) {
    for item in from {
        if !into.contains(item) {
            into.push(item.clone());
        }
    }
}

fn read_all(db: &Database) -> Result<Vec<(String, Vec<u8>)>> {
    const DOING: &str = "read image records";
    let transaction = db.begin_read().map_err(state_error(DOING))?;
    let table = match transaction.open_table(IMAGES) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        table => table.map_err(state_error(DOING))?,
    };
    let mut records = Vec::new();
    for entry in table.iter().map_err(state_error(DOING))? {
        let (key, value) = entry.map_err(state_error(DOING))?;
        records.push((key.value().to_owned(), value.value().to_vec()));
    }
    Ok(records)
}

fn encode(record: &Record) -> serde_json::Result<Vec<u8>> {
    let mut value = vec![VERSION];
    serde_json::to_writer(&mut value, record)?;
    Ok(value)
}

fn decode(key: &str, value: &[u8]) -> Result<Record> {
    let fail = |reason: String| Error::Record { key: key.to_owned(), reason };
    match value.split_first() {
        Some((&VERSION, json)) => serde_json::from_slice(json).map_err(|e| fail(format!("damaged: {e}"))),
        Some((version, _)) => Err(fail(format!(
            "it has version {version}, this program knows version {VERSION}: use the newer release that wrote it"
        ))),
        None => Err(fail("it is empty".to_owned())),
    }
}

/// The image of a record, if all of it is there.
fn load(
    record: Record,
    pinned: &[String],
    content: &Content,
    has_layer: &impl Fn(&str) -> bool,
) -> std::result::Result<Image, String> {
    for blob in record.blobs() {
        let known = digest(&blob.digest).map_err(|e| e.to_string())?;
        if !content.has(&known) {
            return Err(format!("blob {} is missing", blob.digest));
        }
    }
    if let Some(layer) = record.layers.iter().find(|layer| !has_layer(&layer.chain_id)) {
        return Err(format!("the unpacked layer {} is missing", layer.chain_id));
    }
    let config = digest(&record.config.digest).map_err(|e| e.to_string())?;
    let json = content.read(&config, CONFIG_BYTES_MAX).map_err(|e| e.to_string())?;
    record.image(&json, pinned).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_another_version_is_refused_in_words() {
        let error = decode("sha256:x", &[9, b'{']).expect_err("version 9").to_string();
        assert!(error.contains("version 9") && error.contains("sha256:x"), "{error}");
        assert!(decode("k", &[]).is_err());
        assert!(decode("k", &[VERSION, b'{']).is_err());
    }
}
