//! The ttrpc connection to one shim: requests, their time limits, and what becomes of their errors.
//!
//! All tasks of a shim share one connection. When it breaks, requests under way fail with [`Error::ShimLost`] and the
//! next one connects anew: a broken connection is not yet a dead shim.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use protobuf::Message;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;
use ttrpc::asynchronous::{Client, transport::Socket};
use ttrpc::{Code, Request, Response};

use crate::{Error, Exit, Result};

/// A shim that does not take a connection on a local socket within this is stuck.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// The shim's own deadline for a request is later than ours by this, so that ours is the one that is met.
const SHIM_GRACE: Duration = Duration::from_secs(1);

/// What ttrpc's Go server says to a request whose number is lower than that of one before it.
const OUT_OF_ORDER: &str = "StreamID cannot be re-used and must increment";

/// In which metadata key containerd's namespace travels.
const NAMESPACE_KEY: &str = "containerd-namespace-ttrpc";

/// Sandbox API, the same in all versions.
pub(crate) const SANDBOX_SERVICE: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// How long a request may take.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Limit {
    /// After this it fails with [`Error::DeadlineExceeded`].
    Of(Duration),
    /// As long as it takes: it waits for an event.
    None,
}

/// Where a shim listens, and which Task API it speaks there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) address: String,
    pub(crate) version: u32,
}

impl Endpoint {
    /// Checks what a shim, or a caller, said of it.
    pub(crate) fn new(address: &str, version: u32, protocol: &str) -> Result<Self> {
        if !address.starts_with("unix://") {
            return Err(Error::Start(format!("the shim listens on {address:?}: only unix:// sockets are supported")));
        }
        if !matches!(version, 2 | 3) {
            return Err(Error::Start(format!(
                "the shim at {address} speaks Task API version {version}: 2 and 3 are known"
            )));
        }
        if !protocol.eq_ignore_ascii_case("ttrpc") {
            return Err(Error::Start(format!("the shim at {address} speaks {protocol:?}: only ttrpc is supported")));
        }
        Ok(Self { address: address.into(), version })
    }

    /// Name of the Task service; its messages are the same in both versions.
    fn task_service(&self) -> &'static str {
        if self.version == 2 { "containerd.task.v2.Task" } else { "containerd.task.v3.Task" }
    }
}

/// A connection to one shim, made at the first request and again after it broke.
pub(crate) struct Connection {
    pub(crate) endpoint: Endpoint,
    namespace: String,
    /// The client, and how many there were before it.
    client: Mutex<(u64, Option<Client>)>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Connection").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Connection {
    pub(crate) fn new(endpoint: Endpoint, namespace: &str) -> Self {
        Self { endpoint, namespace: namespace.into(), client: Mutex::new((0, None)) }
    }

    /// A request to the Task service.
    pub(crate) async fn task<A: Message>(&self, method: &str, request: &impl Message, limit: Limit) -> Result<A> {
        self.call(self.endpoint.task_service(), method, request, limit).await
    }

    /// A request to the Sandbox service.
    pub(crate) async fn sandbox<A: Message>(&self, method: &str, request: &impl Message, limit: Limit) -> Result<A> {
        self.call(SANDBOX_SERVICE, method, request, limit).await
    }

    async fn call<A: Message>(&self, service: &str, method: &str, request: &impl Message, limit: Limit) -> Result<A> {
        let broken = |error| Error::Other(format!("{method} with the shim at {}: {error}", self.endpoint.address));
        let payload = request.write_to_bytes().map_err(broken)?;
        let answer = self.call_raw(service, method, payload, limit).await?;
        A::parse_from_bytes(&answer).map_err(broken)
    }

    /// A request whose payload is no protobuf, or not ours to know.
    pub(crate) async fn call_raw(
        &self,
        service: &str,
        method: &str,
        payload: Vec<u8>,
        limit: Limit,
    ) -> Result<Vec<u8>> {
        let (generation, client) = self.client().await?;
        let mut request = Request::new();
        request.set_service(service.into());
        request.set_method(method.into());
        request.set_payload(payload);
        request.set_metadata(ttrpc::context::to_pb(HashMap::from([(
            NAMESPACE_KEY.to_owned(),
            vec![self.namespace.clone()],
        )])));
        if let Limit::Of(limit) = limit {
            request.set_timeout_nano((limit + SHIM_GRACE).as_nanos().try_into().unwrap_or(i64::MAX));
        }
        // In a task of its own: a request that is dropped in the middle of its writing would take the connection, which
        // others use, down with it.
        let mut asked = tokio::spawn(async move { ask(&client, request).await });
        let answer = match limit {
            Limit::None => (&mut asked).await,
            Limit::Of(limit) => timeout(limit, &mut asked).await.map_err(|_| {
                let (address, seconds) = (&self.endpoint.address, limit.as_secs());
                Error::DeadlineExceeded(format!("{method}: the shim at {address} did not answer within {seconds} s"))
            })?,
        };
        let answer = answer.map_err(|error| Error::Other(format!("{method}: the request ended early: {error}")))?;
        match answer {
            Ok(response) => Ok(response.payload),
            Err(ttrpc::Error::RpcStatus(status)) => Err(from_status(&status)),
            // Everything else means that no answer came over this connection.
            Err(error) => {
                self.forget(generation);
                Err(self.lost(method, &error))
            }
        }
    }

    async fn client(&self) -> Result<(u64, Client)> {
        if let (generation, Some(client)) = &*self.slot() {
            return Ok((*generation, client.clone()));
        }
        let path = self.endpoint.address.trim_start_matches("unix://");
        let stream =
            timeout(CONNECT_LIMIT, connect(path)).await.map_err(|_| self.lost("connect", &"it does not accept"))?;
        let stream = stream.map_err(|error| self.lost("connect", &error))?;
        let mut slot = self.slot();
        // Somebody else may have been faster; one connection is enough.
        let client = slot.1.get_or_insert_with(|| Client::new(Socket::new(stream))).clone();
        Ok((slot.0, client))
    }

    fn forget(&self, generation: u64) {
        let mut slot = self.slot();
        if slot.0 == generation {
            *slot = (generation + 1, None);
        }
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, (u64, Option<Client>)> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lost(&self, method: &str, error: &dyn std::fmt::Display) -> Error {
        Error::ShimLost(format!("{method}: no connection to the shim at {}: {error}", self.endpoint.address))
    }
}

/// Makes a request until it arrives in order. Requests that begin at once can be written in another order than that of
/// their numbers, and a shim written in Go then refuses the late one unread.
async fn ask(client: &Client, request: Request) -> ttrpc::Result<Response> {
    loop {
        match client.request(request.clone()).await {
            Err(ttrpc::Error::RpcStatus(status)) if status.message() == OUT_OF_ORDER => {}
            answer => return answer,
        }
    }
}

/// A path, or after `@` a name in the abstract namespace (foreign shims of old).
async fn connect(path: &str) -> std::io::Result<UnixStream> {
    match path.strip_prefix('@') {
        None => UnixStream::connect(path).await,
        Some(name) => {
            use std::os::linux::net::SocketAddrExt as _;
            let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
            let stream = std::os::unix::net::UnixStream::connect_addr(&address)?;
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)
        }
    }
}

fn from_status(status: &ttrpc::Status) -> Error {
    let message = status.message().to_owned();
    match status.code() {
        // What ttrpc's Rust server says of a method that its service lacks.
        Code::NOT_FOUND if message.starts_with('/') && message.ends_with(" is not supported") => {
            Error::Unimplemented(message)
        }
        Code::NOT_FOUND => Error::NotFound(message),
        Code::ALREADY_EXISTS => Error::AlreadyExists(message),
        Code::FAILED_PRECONDITION => Error::FailedPrecondition(message),
        Code::INVALID_ARGUMENT | Code::OUT_OF_RANGE => Error::InvalidArgument(message),
        Code::UNIMPLEMENTED => Error::Unimplemented(message),
        Code::DEADLINE_EXCEEDED => Error::DeadlineExceeded(message),
        Code::UNAVAILABLE => Error::Unavailable(message),
        _ => Error::Other(message),
    }
}

/// The connections in use, so that tasks of one shim share theirs.
#[derive(Debug, Default)]
pub(crate) struct Connections(Mutex<HashMap<String, Weak<Connection>>>);

impl Connections {
    pub(crate) fn get(&self, endpoint: Endpoint, namespace: &str) -> Arc<Connection> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, connection| connection.strong_count() > 0);
        if let Some(connection) = known.get(&endpoint.address).and_then(Weak::upgrade)
            && connection.endpoint == endpoint
        {
            return connection;
        }
        let connection = Arc::new(Connection::new(endpoint, namespace));
        known.insert(connection.endpoint.address.clone(), Arc::downgrade(&connection));
        connection
    }
}

type Outcome = Option<Result<Exit>>;

/// The wait for one process's end: however many callers wait, and whichever of them give up, the shim is asked once.
#[derive(Debug, Default)]
pub(crate) struct ExitWatch(Mutex<Option<watch::Receiver<Outcome>>>);

impl ExitWatch {
    /// Waits; `ask` begins the request if none is under way, and anew after one has failed.
    pub(crate) async fn wait<F>(&self, ask: impl FnOnce() -> F) -> Result<Exit>
    where
        F: Future<Output = Result<Exit>> + Send + 'static,
    {
        let mut outcome = {
            let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match &*slot {
                Some(outcome) if !matches!(&*outcome.borrow(), Some(Err(_))) => outcome.clone(),
                _ => {
                    let (sender, receiver) = watch::channel(None);
                    let asking = ask();
                    tokio::spawn(async move { sender.send(Some(asking.await)) });
                    slot.insert(receiver).clone()
                }
            }
        };
        match outcome.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(outcome)) => outcome.clone(),
            _ => Err(Error::Other("the wait for a process ended early".into())),
        }
    }

    /// The end, if it was seen.
    pub(crate) fn seen(&self) -> Option<Exit> {
        let slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slot.as_ref().and_then(|outcome| outcome.borrow().clone()).and_then(Result::ok)
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
