//! The records of pods and containers in `meta.redb`: one transaction a change, durable when the call returns.
//!
//! A value is one version byte and the protobuf of the record. A version from the future is refused in words rather
//! than misread.

use std::sync::Arc;

use prost::Message;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::watch;

use crate::checkpoint::CheckpointEntry;
use crate::error::{Error, Result};
use crate::record::{ContainerRecord, PodRecord};

const PODS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("pods");
const CONTAINERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("containers");

/// One byte of version and JSON.
const CHECKPOINTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("checkpoints");

/// Version of the records that this program writes.
const VERSION: u8 = 1;

#[derive(Debug)]
pub(crate) struct Store {
    db: Arc<Database>,
    failed: watch::Sender<bool>,
}

impl Store {
    /// Takes the tables of an open database, making them if they are not there.
    pub(crate) fn open(db: Arc<Database>) -> Result<Self> {
        let transaction = db.begin_write().map_err(redb::Error::from)?;
        transaction.open_table(PODS).map_err(redb::Error::from)?;
        transaction.open_table(CONTAINERS).map_err(redb::Error::from)?;
        transaction.open_table(CHECKPOINTS).map_err(redb::Error::from)?;
        transaction.commit().map_err(redb::Error::from)?;
        Ok(Self { db, failed: watch::Sender::new(false) })
    }

    pub(crate) fn pods(&self) -> Result<Vec<PodRecord>> {
        self.all(PODS)
    }

    pub(crate) fn containers(&self) -> Result<Vec<ContainerRecord>> {
        self.all(CONTAINERS)
    }

    pub(crate) async fn put_pod(&self, record: &PodRecord) -> Result<()> {
        self.put(PODS, record.id.clone(), encode(record)).await
    }

    pub(crate) async fn put_container(&self, record: &ContainerRecord) -> Result<()> {
        self.put(CONTAINERS, record.id.clone(), encode(record)).await
    }

    /// Forgets a pod and its containers.
    pub(crate) async fn delete_pod(&self, id: &str, containers: Vec<String>) -> Result<()> {
        let id = id.to_owned();
        self.write(move |transaction| {
            let mut table = transaction.open_table(CONTAINERS)?;
            for container in &containers {
                table.remove(container.as_str())?;
            }
            transaction.open_table(PODS)?.remove(id.as_str())?;
            Ok(())
        })
        .await
    }

    pub(crate) async fn delete_container(&self, id: &str) -> Result<()> {
        self.delete(CONTAINERS, id.to_owned()).await
    }

    pub(crate) fn checkpoints(&self) -> Result<Vec<CheckpointEntry>> {
        let entry = |(key, value): (String, Vec<u8>)| {
            let entry = value.split_first().filter(|(version, _)| **version == VERSION);
            entry.and_then(|(_, json)| serde_json::from_slice(json).ok()).ok_or_else(|| {
                Error::internal(format!(
                    "the row of checkpoint {key} cannot be read: was it written by a newer program?"
                ))
            })
        };
        self.rows(CHECKPOINTS)?.into_iter().map(entry).collect()
    }

    pub(crate) async fn put_checkpoint(&self, entry: &CheckpointEntry) -> Result<()> {
        let mut value = vec![VERSION];
        serde_json::to_writer(&mut value, entry).map_err(|error| Error::internal(error.to_string()))?;
        self.put(CHECKPOINTS, entry.id.clone(), value).await
    }

    pub(crate) async fn delete_checkpoint(&self, id: &str) -> Result<()> {
        self.delete(CHECKPOINTS, id.to_owned()).await
    }

    fn all<R: Message + Default>(&self, table: TableDefinition<'static, &str, &[u8]>) -> Result<Vec<R>> {
        self.rows(table)?.into_iter().map(|(key, value)| decode(&key, &value)).collect()
    }

    fn rows(&self, table: TableDefinition<'static, &str, &[u8]>) -> Result<Vec<(String, Vec<u8>)>> {
        let read = || -> std::result::Result<Vec<(String, Vec<u8>)>, redb::Error> {
            let table = self.db.begin_read()?.open_table(table)?;
            let mut rows = Vec::new();
            for row in table.iter()? {
                let (key, value) = row?;
                rows.push((key.value().to_owned(), value.value().to_owned()));
            }
            Ok(rows)
        };
        Ok(read()?)
    }

    async fn delete(&self, table: TableDefinition<'static, &str, &[u8]>, key: String) -> Result<()> {
        self.write(move |transaction| {
            transaction.open_table(table)?.remove(key.as_str())?;
            Ok(())
        })
        .await
    }

    async fn put(&self, table: TableDefinition<'static, &str, &[u8]>, key: String, value: Vec<u8>) -> Result<()> {
        self.write(move |transaction| {
            transaction.open_table(table)?.insert(key.as_str(), value.as_slice())?;
            Ok(())
        })
        .await
    }

    /// One transaction, off the async threads: a commit waits for the disk.
    async fn write(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> std::result::Result<(), redb::Error> + Send + 'static,
    ) -> Result<()> {
        let db = Arc::clone(&self.db);
        let written = tokio::task::spawn_blocking(move || {
            let transaction = db.begin_write()?;
            change(&transaction)?;
            transaction.commit()?;
            Ok::<_, redb::Error>(())
        });
        let written =
            written.await.map_err(|error| Error::internal(format!("the state database's writer failed: {error}")))?;
        if matches!(written, Err(redb::Error::Io(_) | redb::Error::PreviousIo)) {
            self.failed.send_replace(true);
        }
        Ok(written?)
    }

    /// Waits until a write has failed. The database then takes no more until it is opened anew.
    pub(crate) async fn failure(&self) {
        // An error means that the store is gone, and nobody writes any more.
        let _ = self.failed.subscribe().wait_for(|failed| *failed).await;
    }
}

fn encode(record: &impl Message) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    bytes.extend_from_slice(&record.encode_to_vec());
    bytes
}

fn decode<R: Message + Default>(key: &str, value: &[u8]) -> Result<R> {
    match value.split_first() {
        Some((&VERSION, body)) => {
            R::decode(body).map_err(|error| Error::internal(format!("the record of {key} cannot be read: {error}")))
        }
        Some((version, _)) => Err(Error::internal(format!(
            "the record of {key} has version {version}, this program knows {VERSION}: it was written by a newer one"
        ))),
        None => Err(Error::internal(format!("the record of {key} is empty"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(path: &std::path::Path) -> Arc<Database> {
        Arc::new(Database::create(path).expect("a database"))
    }

    #[tokio::test]
    async fn records_survive_a_reopen() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("meta.redb");
        let pod = PodRecord { id: "p".into(), handler: "runc".into(), ready: true, ..Default::default() };
        let container = ContainerRecord { id: "c".into(), pod_id: "p".into(), exit_code: 7, ..Default::default() };
        {
            let store = Store::open(database(&path)).expect("a store");
            store.put_pod(&pod).await.expect("put");
            store.put_container(&container).await.expect("put");
            store.put_container(&ContainerRecord { id: "gone".into(), ..Default::default() }).await.expect("put");
            store.delete_container("gone").await.expect("delete");
        }
        let store = Store::open(database(&path)).expect("a store");
        assert_eq!(store.pods().expect("pods"), vec![pod]);
        assert_eq!(store.containers().expect("containers"), vec![container]);
    }

    #[test]
    fn a_record_of_another_version_is_refused_in_words() {
        let error = decode::<PodRecord>("abc", &[VERSION + 1, 0]).expect_err("refused");
        assert!(error.to_string().contains("newer"), "{error}");
        assert!(decode::<PodRecord>("abc", &[]).is_err());
    }

    /// A database whose disk can be made to fail.
    #[derive(Debug, Default)]
    struct Disk(redb::backends::InMemoryBackend, Arc<std::sync::atomic::AtomicBool>);

    impl redb::StorageBackend for Disk {
        fn len(&self) -> std::io::Result<u64> {
            self.0.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
            self.0.read(offset, out)
        }

        fn set_len(&self, len: u64) -> std::io::Result<()> {
            self.0.set_len(len)
        }

        fn sync_data(&self) -> std::io::Result<()> {
            self.0.sync_data()
        }

        fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
            match self.1.load(std::sync::atomic::Ordering::Relaxed) {
                true => Err(std::io::ErrorKind::StorageFull.into()),
                false => self.0.write(offset, data),
            }
        }
    }

    #[tokio::test]
    async fn a_write_that_fails_is_told() {
        let disk = Disk::default();
        let full = Arc::clone(&disk.1);
        let store =
            Store::open(Arc::new(Database::builder().create_with_backend(disk).expect("opens"))).expect("opens");
        store.put_pod(&PodRecord::default()).await.expect("there is room");
        assert!(tokio::time::timeout(std::time::Duration::ZERO, store.failure()).await.is_err(), "nothing failed yet");
        full.store(true, std::sync::atomic::Ordering::Relaxed);
        let error = store.put_pod(&PodRecord::default()).await.expect_err("there is no room");
        assert_eq!(error.kind(), crate::error::Kind::ResourceExhausted);
        store.failure().await;
    }
}
