//! The HTTP server: a listener, TLS if it is wanted, one request a connection, which is upgraded.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::header::{CONNECTION, CONTENT_TYPE, HeaderName, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use crate::backend::{Backend, Failure, Request, Session, Streams};
use crate::error::Error;
use crate::forward::{self, Target};
use crate::protocol::{Channels, Forward, SPDY_ACCEPTED, SPDY_PROTOCOLS, Transport};
use crate::tokens::Tokens;
use crate::{spdy, websocket};

/// How long a client may take to say what it wants, TLS included.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// Connections at a time; the next ones wait for one to end. Each costs a descriptor, and those of its pipes.
const CONNECTIONS_MAX: usize = 4096;

/// Pause after a failed accept: with no file descriptor left, trying again at once would only burn the processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What WebSocket appends to a client's key (RFC 6455, 1.3).
const WEBSOCKET_GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// How the server listens.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address and port; port 0 takes any.
    pub address: SocketAddr,
    /// Certificate and key, for HTTPS.
    pub tls: Option<Tls>,
    /// A connection on which nothing comes or goes for so long is ended.
    pub idle: Duration,
}

/// Files of a certificate, both PEM.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The certificate, with those that lead to a known authority behind it.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Gives out URLs. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Server(Arc<Inner>);

struct Inner {
    base: String,
    tokens: Tokens,
    backend: Arc<dyn Backend>,
    idle: Duration,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("base", &self.base).finish_non_exhaustive()
    }
}

/// What a request becomes.
enum Upgrade {
    Process { transport: Transport, channels: Channels, request: Request, streams: Streams },
    Forward { forward: Forward, pod: String, ports: Vec<u16> },
}

type Response = http::Response<String>;

impl Server {
    /// Listens. The future serves, for ever.
    ///
    /// # Errors
    /// Where the address or the certificate cannot be used.
    pub async fn bind(
        config: Config,
        backend: Arc<dyn Backend>,
    ) -> Result<(Server, impl Future<Output = ()> + Send + 'static), Error> {
        let failed = |source| Error::Listen { address: config.address, source };
        let acceptor = config.tls.as_ref().map(acceptor).transpose()?;
        let listener = TcpListener::bind(config.address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let scheme = if acceptor.is_some() { "https" } else { "http" };
        let base = format!("{scheme}://{address}");
        let server = Server(Arc::new(Inner { base, tokens: Tokens::default(), backend, idle: config.idle }));
        Ok((server.clone(), server.serve(listener, acceptor)))
    }

    /// A URL for a request: for one client, once, within a minute.
    ///
    /// # Errors
    /// Where the request makes no sense, or too many are open.
    pub fn url(&self, request: Request) -> Result<String, Error> {
        request.check()?;
        let kind = request.kind();
        let token = self.0.tokens.insert(request, Instant::now())?;
        Ok(format!("{}/{kind}/{token}", self.0.base))
    }

    async fn serve(self, listener: TcpListener, acceptor: Option<TlsAcceptor>) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::error!(%error, "cannot accept a streaming connection; trying again");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (server, acceptor) = (self.clone(), acceptor.clone());
            tokio::spawn(async move {
                if let Err(error) = server.connection(stream, acceptor, place).await {
                    tracing::debug!(error, "a streaming connection failed before its request");
                }
            });
        }
    }

    async fn connection(
        self,
        stream: TcpStream,
        acceptor: Option<TlsAcceptor>,
        place: tokio::sync::OwnedSemaphorePermit,
    ) -> Result<(), String> {
        // Keys that are pressed are small and urgent.
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        match acceptor {
            None => self.http(stream, place).await,
            Some(acceptor) => {
                let stream = tokio::time::timeout(REQUEST_LIMIT, acceptor.accept(stream)).await;
                self.http(stream.map_err(|_| "no TLS in time")?.map_err(|error| error.to_string())?, place).await
            }
        }
    }

    async fn http<T>(self, io: T, place: tokio::sync::OwnedSemaphorePermit) -> Result<(), String>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // Held by what the connection becomes.
        let place = Arc::new(place);
        let service = service_fn(|request| {
            let (server, place) = (self.clone(), Arc::clone(&place));
            async move { Ok::<Response, Infallible>(server.answer(request, place)) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(REQUEST_LIMIT)
            .serve_connection(TokioIo::new(io), service)
            .with_upgrades();
        connection.await.map_err(|error| error.to_string())
    }

    fn answer(&self, mut request: http::Request<Incoming>, place: Arc<tokio::sync::OwnedSemaphorePermit>) -> Response {
        let (response, upgrade) = match self.negotiate(&request) {
            Ok(agreed) => agreed,
            Err(refusal) => return refusal,
        };
        let server = self.clone();
        let upgraded = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let _place = place;
            let served = match upgraded.await {
                Ok(io) => server.upgraded(TokioIo::new(io), upgrade).await,
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = served {
                tracing::debug!(error, "a streaming connection ended early");
            }
        });
        response
    }

    /// The answer to a request that is granted, and what it becomes.
    #[allow(clippy::result_large_err, reason = "both are answers, and there is one a connection")]
    fn negotiate(&self, request: &http::Request<Incoming>) -> Result<(Response, Upgrade), Response> {
        if !matches!(*request.method(), Method::GET | Method::POST) {
            return Err(refuse(StatusCode::METHOD_NOT_ALLOWED, "only GET and POST are served"));
        }
        let headers = request.headers();
        let transport = Transport::asked(headers).ok_or_else(|| {
            refuse(StatusCode::BAD_REQUEST, "the request must upgrade the connection to SPDY/3.1 or websocket")
        })?;
        let mut response = switching(transport, headers)?;
        let mut parts = request.uri().path().trim_start_matches('/').splitn(2, '/');
        let (kind, token) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let Some(asked) = self.0.tokens.take(kind, token, Instant::now()) else {
            return Err(refuse(
                StatusCode::NOT_FOUND,
                "this URL is not known: each works once, and for a minute after the CRI call that gave it",
            ));
        };
        let upgrade = match asked {
            Request::PortForward { pod, ports } => {
                let forward = transport.forward(headers).map_err(|known| no_protocol(transport, known))?;
                let (Forward::Spdy(name) | Forward::Channels(Channels { name, .. })) = forward;
                name_protocol(&mut response, transport, name);
                Upgrade::Forward { forward, pod, ports }
            }
            Request::Exec { streams, .. } | Request::Attach { streams, .. } => {
                let channels = transport.channels(headers).map_err(|known| no_protocol(transport, known))?;
                name_protocol(&mut response, transport, channels.name);
                Upgrade::Process { transport, channels, request: asked, streams }
            }
        };
        Ok((response, upgrade))
    }

    async fn upgraded<T>(self, io: T, upgrade: Upgrade) -> Result<(), String>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let idle = self.0.idle;
        match upgrade {
            Upgrade::Process { transport, channels, request, streams } => {
                let start = self.start(request);
                match transport {
                    Transport::Spdy => spdy::serve(io, channels, streams, idle, start).await,
                    Transport::WebSocket => websocket::serve(io, channels, streams, idle, start).await,
                }
            }
            Upgrade::Forward { forward, pod, ports } => {
                let target = Target { backend: Arc::clone(&self.0.backend), pod };
                match forward {
                    Forward::Spdy(name) if name.contains('+') => forward::tunnelled(io, target, idle).await,
                    Forward::Spdy(_) => forward::spdy(io, target, idle).await,
                    Forward::Channels(channels) => forward::channels(io, channels, &ports, target, idle).await,
                }
            }
        }
    }

    async fn start(&self, request: Request) -> Result<Session, Failure> {
        match request {
            Request::Exec { container, command, streams } => self.0.backend.exec(&container, command, streams).await,
            Request::Attach { container, streams } => self.0.backend.attach(&container, streams).await,
            Request::PortForward { .. } => Err(Failure("a port-forward has no process".to_owned())),
        }
    }
}

fn refuse(code: StatusCode, message: &str) -> Response {
    let mut response = Response::new(format!("{message}\n"));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// The peers' answer to a client that offers no protocol of ours.
fn no_protocol(transport: Transport, known: String) -> Response {
    let mut response =
        refuse(StatusCode::FORBIDDEN, &format!("none of the offered sub-protocols is served; these are: {known}"));
    if let (Transport::Spdy, Ok(value)) = (transport, HeaderValue::from_str(&known)) {
        response.headers_mut().insert(SPDY_ACCEPTED, value);
    }
    response
}

#[allow(clippy::result_large_err, reason = "both are answers, and there is one a connection")]
fn switching(transport: Transport, headers: &HeaderMap) -> Result<Response, Response> {
    let mut response = Response::default();
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let mut put = |name: HeaderName, value: HeaderValue| drop(response.headers_mut().insert(name, value));
    put(CONNECTION, HeaderValue::from_static("Upgrade"));
    match transport {
        Transport::Spdy => put(UPGRADE, HeaderValue::from_static("SPDY/3.1")),
        Transport::WebSocket => {
            put(UPGRADE, HeaderValue::from_static("websocket"));
            let accept = headers.get(SEC_WEBSOCKET_KEY).and_then(accept_key);
            let missing = || refuse(StatusCode::BAD_REQUEST, "the request has no Sec-WebSocket-Key");
            put(SEC_WEBSOCKET_ACCEPT, accept.ok_or_else(missing)?);
        }
    }
    Ok(response)
}

/// What proves to a client that we speak WebSocket.
fn accept_key(key: &HeaderValue) -> Option<HeaderValue> {
    let mut digest = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
    digest.update(key.as_bytes());
    digest.update(WEBSOCKET_GUID);
    HeaderValue::from_str(&BASE64_STANDARD.encode(digest.finish())).ok()
}

fn name_protocol(response: &mut Response, transport: Transport, name: &'static str) {
    if !name.is_empty() {
        let header = match transport {
            Transport::Spdy => SPDY_PROTOCOLS,
            Transport::WebSocket => http::header::SEC_WEBSOCKET_PROTOCOL,
        };
        response.headers_mut().insert(header, HeaderValue::from_static(name));
    }
}

fn acceptor(tls: &Tls) -> Result<TlsAcceptor, Error> {
    let failed =
        |path: &Path, reason: &dyn std::fmt::Display| Error::Tls { path: path.to_owned(), reason: reason.to_string() };
    let certificates = CertificateDer::pem_file_iter(&tls.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| failed(&tls.certificate, &error))?;
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|error| failed(&tls.key, &error))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(&tls.certificate, &error))?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(|error| failed(&tls.certificate, &error))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 6455, 1.3.
    #[test]
    fn the_key_of_a_websocket_client_is_answered() {
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(accept_key(&key).unwrap(), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
