//! The daemon's socket: connecting to it, and calling it with a time limit.

use std::future::Future;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use stasis_cri_api::runtime::image_service_client::ImageServiceClient;
use stasis_cri_api::runtime::runtime_service_client::RuntimeServiceClient;
use stasis_cri_api::runtime::{VersionRequest, VersionResponse};
use stasis_cri_api::stasis::admin_client::AdminClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::cli::Global;
use crate::failure::{Failure, Result, innermost};

/// Name under which the daemon introduces itself (CRI `Version`).
const RUNTIME_NAME: &str = "stasis";

/// Time for a call that moves no data, unless `--timeout` says otherwise.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Largest message: the answer of ExecSync holds up to 16 MiB of each of two streams.
const MESSAGE_MAX: usize = 33 << 20;

/// A connection to the daemon.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    pub(crate) images: ImageServiceClient<Channel>,
    pub(crate) admin: AdminClient<Channel>,
    pub(crate) version: VersionResponse,
    timeout: Option<Duration>,
}

impl Client {
    /// Connects, and makes sure that stasisd is at the other end.
    pub(crate) async fn connect(global: &Global) -> Result<Self> {
        let path = socket_path(&global.address)?;
        let timeout = global.timeout.map(|s| Duration::from_secs(s.into()));
        let stream = open(&path).await?;
        let channel = channel(stream).await.map_err(|e| not_cri(&path, &e))?;
        let mut runtime = RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE_MAX);
        let version = limited("ask for the version", Some(timeout.unwrap_or(CALL_TIMEOUT)), async {
            match runtime.version(VersionRequest { version: "v1".into() }).await {
                Ok(answer) => Ok(answer.into_inner()),
                Err(status) => Err(Failure::NotCri { path: path.clone(), reason: reason(&status) }),
            }
        })
        .await?;
        if version.runtime_name != RUNTIME_NAME {
            let runtime = format!("{} {}", version.runtime_name, version.runtime_version);
            return Err(Failure::OtherRuntime { path, runtime: runtime.trim_end().to_owned() });
        }
        Ok(Self {
            runtime,
            images: ImageServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE_MAX),
            admin: AdminClient::new(channel).max_decoding_message_size(MESSAGE_MAX),
            version,
            timeout,
        })
    }

    /// A call that moves no data. `what` completes "cannot …".
    pub(crate) async fn call<T>(
        &self,
        what: impl Into<String>,
        call: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> Result<T> {
        self.call_within(what, Some(CALL_TIMEOUT), call).await
    }

    /// A call that may take `default`, or as long as it takes; `--timeout` goes before.
    pub(crate) async fn call_within<T>(
        &self,
        what: impl Into<String>,
        default: Option<Duration>,
        call: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> Result<T> {
        let what = what.into();
        let answer = async { call.await.map(Response::into_inner).map_err(|s| Failure::daemon(&what, &s)) };
        limited(&what, self.timeout.or(default), answer).await
    }

    /// Something made of several messages, such as a stream, within `--timeout` if that is given.
    pub(crate) async fn within<T>(&self, what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        limited(what, self.timeout, work).await
    }

    /// `--timeout`, in seconds; 0 if it is not given.
    pub(crate) fn timeout_seconds(&self) -> u32 {
        self.timeout.map_or(0, |t| u32::try_from(t.as_secs()).unwrap_or(u32::MAX))
    }
}

/// `work`, or a failure after `limit`.
pub(crate) async fn limited<T>(
    what: &str,
    limit: Option<Duration>,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let Some(limit) = limit else { return work.await };
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done,
        Err(_) => Err(Failure::TimedOut { what: what.to_owned(), seconds: limit.as_secs() }),
    }
}

/// The path of a socket, of `unix:///path`, `unix:/path` or `/path`.
fn socket_path(address: &str) -> Result<PathBuf> {
    let path = match address.strip_prefix("unix:") {
        Some(rest) => rest.strip_prefix("//").unwrap_or(rest),
        None => address,
    };
    match Path::new(path).is_absolute() {
        true => Ok(PathBuf::from(path)),
        false => Err(Failure::Address { address: address.to_owned() }),
    }
}

async fn open(path: &Path) -> Result<UnixStream> {
    let error = match UnixStream::connect(path).await {
        Ok(stream) => return Ok(stream),
        Err(error) => error,
    };
    let path = path.to_owned();
    Err(match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Failure::NoSocket { path },
        io::ErrorKind::PermissionDenied => Failure::Permission { path },
        // A file that is no socket refuses connections, too.
        io::ErrorKind::ConnectionRefused => match std::fs::metadata(&path) {
            Ok(metadata) if !metadata.file_type().is_socket() => Failure::NotASocket { path },
            _ => Failure::Refused { path },
        },
        _ => Failure::Connect { path, source: error },
    })
}

/// One connection, which is not made again when it breaks: a command is short, and the error would be lost.
async fn channel(stream: UnixStream) -> std::result::Result<Channel, tonic::transport::Error> {
    let mut stream = Some(TokioIo::new(stream));
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let stream = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionAborted));
            async move { stream }
        }))
        .await
}

fn not_cri(path: &Path, error: &dyn std::error::Error) -> Failure {
    Failure::NotCri { path: path.to_owned(), reason: innermost(error) }
}

fn reason(status: &Status) -> String {
    use std::error::Error as _;
    match status.source() {
        Some(source) => innermost(source),
        None if status.message().is_empty() => status.code().description().to_owned(),
        None => status.message().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn global(address: &str) -> Global {
        Global { address: address.into(), timeout: Some(5), output: Default::default(), quiet: false }
    }

    async fn failure(address: &str) -> String {
        Client::connect(&global(address)).await.expect_err("nobody is there").text()
    }

    #[test]
    fn addresses() {
        for address in ["unix:///a/b", "unix:/a/b", "/a/b"] {
            assert_eq!(socket_path(address).unwrap(), Path::new("/a/b"));
        }
        for address in ["", "a/b", "unix://a/b", "tcp://127.0.0.1:1", "http://x"] {
            assert!(socket_path(address).is_err(), "{address}");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn each_wrong_socket_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let shown = |text: String| text.replace(dir.path().to_str().unwrap(), "/dir");
        std::fs::write(path("file"), "").unwrap();
        // A socket that nobody listens at. (A listener that is dropped may live on for a moment in a child that
        // another test forks.)
        let stale = tokio::net::UnixSocket::new_stream().unwrap();
        stale.bind(path("stale")).unwrap();
        // A socket with somebody who speaks something else.
        let other = tokio::net::UnixListener::bind(path("other")).unwrap();
        let talker = tokio::spawn(async move {
            use tokio::io::AsyncWriteExt as _;
            while let Ok((mut stream, _)) = other.accept().await {
                let _ = stream.write_all(b"220 mail.example.org ESMTP\r\n").await;
            }
        });
        let mut texts = Vec::new();
        for name in ["absent", "file", "stale"] {
            texts.push(shown(failure(path(name).to_str().unwrap()).await));
        }
        let talking = shown(failure(path("other").to_str().unwrap()).await);
        assert!(talking.starts_with("error: /dir/other does not speak CRI: "), "{talking}");
        texts.push(failure("tcp://1.2.3.4").await);
        talker.abort();
        insta::assert_snapshot!(texts.join("\n"), @r#"
        error: there is no socket at /dir/absent
        hint: is stasisd running? Start it with `systemctl start stasis`, or give its socket with --address
        error: /dir/file is not a socket
        hint: give the socket of stasisd with --address, or unset STASIS_ADDRESS
        error: nothing answers at /dir/stale
        hint: is stasisd running? Start it with `systemctl start stasis`, or give its socket with --address
        error: "tcp://1.2.3.4" is not the address of a socket
        hint: give --address unix:///path/of/the/socket
        "#);
    }
}
