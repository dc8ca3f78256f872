//! What shims tell on their own: containerd's events service, of which the end of memory alone is listened to.

use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::events::task::TaskOOM;
use containerd_shim_protos::shim_async::{Events, create_events};
use protobuf::Message as _;
use tracing::debug;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::bundle::blocking;
use crate::{Error, Result};

/// Topic of the one event that no request could ask for.
const OUT_OF_MEMORY: &str = "/tasks/oom";

type OnOutOfMemory = Box<dyn Fn(&str) + Send + Sync>;

/// The running service. Its socket goes with the value.
pub struct EventServer {
    path: PathBuf,
    _server: Server,
}

impl std::fmt::Debug for EventServer {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("EventServer").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Drop for EventServer {
    fn drop(&mut self) {
        // It may have been replaced; then the next daemon replaces that one.
        let _ = fs::remove_file(&self.path);
    }
}

/// See [`ShimRuntime::serve_events`](crate::ShimRuntime::serve_events).
pub(crate) async fn serve(address: &str, out_of_memory: OnOutOfMemory) -> Result<EventServer> {
    let path = PathBuf::from(address.trim_start_matches("unix://"));
    let at = path.clone();
    let listener = blocking(move || {
        listen(&at).map_err(|error| Error::io("cannot listen for events of shims at", at.display(), error))
    })
    .await?;
    let failed = |error: &dyn std::fmt::Display| Error::io("cannot serve events of shims at", path.display(), error);
    let listener = Listener::try_from(listener).map_err(|error| failed(&error))?;
    let mut server = Server::new().add_listener(listener).register_service(create_events(Arc::new(Ear(out_of_memory))));
    server.start().await.map_err(|error| failed(&error))?;
    Ok(EventServer { path, _server: server })
}

/// Takes the place of a socket that an earlier daemon left; nobody but root can connect at any moment.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
    let private = path.with_extension("new");
    match fs::remove_dir_all(&private) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => fs::DirBuilder::new().mode(0o700).create(&private)?,
    }
    let made = private.join("s");
    let listener = UnixListener::bind(&made).and_then(|listener| {
        listener.set_nonblocking(true)?;
        fs::set_permissions(&made, fs::Permissions::from_mode(0o600))?;
        fs::rename(&made, path)?;
        Ok(listener)
    });
    fs::remove_dir_all(&private)?;
    listener
}

struct Ear(OnOutOfMemory);

#[async_trait]
impl Events for Ear {
    async fn forward(&self, _: &ttrpc::asynchronous::TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = &request.envelope;
        if envelope.topic == OUT_OF_MEMORY {
            match TaskOOM::parse_from_bytes(&envelope.event.value) {
                Ok(event) => (self.0)(&event.container_id),
                Err(error) => debug!(%error, "an event of a shim cannot be understood"),
            }
        }
        Ok(Empty::new())
    }
}
