//! A connection to a server of our making: versions, codes, time limits, and the loss of the other side.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::api::{Empty, KillRequest, StateRequest, StateResponse, WaitRequest, WaitResponse};
use containerd_shim_protos::shim_async::{Task, create_task};
use ttrpc::asynchronous::{Server, TtrpcContext};
use ttrpc::error::get_rpc_status;

use super::*;

/// Answers with the code that the signal's number is, and never to a wait.
struct Fake;

#[async_trait]
impl Task for Fake {
    async fn state(&self, context: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let namespaces = context.metadata.get(NAMESPACE_KEY).cloned().unwrap_or_default();
        Ok(StateResponse { id: request.id, bundle: namespaces.join(","), ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let code = Code::from_number(request.signal);
        Err(get_rpc_status(code, "so it is"))
    }

    async fn wait(&self, _: &TtrpcContext, _: WaitRequest) -> ttrpc::Result<WaitResponse> {
        std::future::pending().await
    }
}

trait FromNumber {
    fn from_number(number: u32) -> Code;
}

impl FromNumber for Code {
    fn from_number(number: u32) -> Code {
        protobuf::Enum::from_i32(i32::try_from(number).unwrap()).expect("a code of gRPC")
    }
}

struct Shim {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    server: Server,
}

async fn serve(socket: &Path, version: u32) -> Server {
    let mut services = create_task(Arc::new(Fake));
    let service = services.remove("containerd.task.v3.Task").unwrap();
    services.insert(format!("containerd.task.v{version}.Task"), service);
    let _ = std::fs::remove_file(socket);
    let server = Server::new().bind(&format!("unix://{}", socket.display())).unwrap();
    let mut server = server.register_service(services);
    server.start().await.unwrap();
    server
}

impl Shim {
    async fn start(version: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let server = serve(&socket, version).await;
        Self { _dir: dir, socket, server }
    }

    fn connection(&self, version: u32) -> Arc<Connection> {
        let endpoint = Endpoint::new(&format!("unix://{}", self.socket.display()), version, "ttrpc").unwrap();
        Arc::new(Connection::new(endpoint, "k8s.io"))
    }
}

const LIMIT: Limit = Limit::Of(Duration::from_secs(60));

async fn state(connection: &Connection) -> Result<StateResponse> {
    connection.task("State", &StateRequest { id: "t1".into(), ..Default::default() }, LIMIT).await
}

#[tokio::test]
async fn both_versions_are_spoken_in_the_namespace() {
    for version in [2, 3] {
        let shim = Shim::start(version).await;
        let answer = state(&shim.connection(version)).await.unwrap();
        assert_eq!((answer.id.as_str(), answer.bundle.as_str()), ("t1", "k8s.io"));
        assert!(state(&shim.connection(5 - version)).await.is_err(), "the other version is not served");
    }
}

#[tokio::test]
async fn codes_become_kinds_of_errors() {
    let shim = Shim::start(3).await;
    let connection = shim.connection(3);
    let kind = async |code: Code| {
        let request = KillRequest { signal: code as u32, ..Default::default() };
        let error = connection.task::<Empty>("Kill", &request, LIMIT).await.unwrap_err();
        assert_eq!(error.to_string(), "so it is");
        error
    };
    assert!(matches!(kind(Code::NOT_FOUND).await, Error::NotFound(_)));
    assert!(matches!(kind(Code::ALREADY_EXISTS).await, Error::AlreadyExists(_)));
    assert!(matches!(kind(Code::FAILED_PRECONDITION).await, Error::FailedPrecondition(_)));
    assert!(matches!(kind(Code::INVALID_ARGUMENT).await, Error::InvalidArgument(_)));
    assert!(matches!(kind(Code::UNIMPLEMENTED).await, Error::Unimplemented(_)));
    assert!(matches!(kind(Code::UNAVAILABLE).await, Error::Unavailable(_)));
    assert!(matches!(kind(Code::INTERNAL).await, Error::Other(_)));
    let missing = connection.task::<Empty>("Pause", &Empty::new(), LIMIT).await;
    assert!(
        matches!(missing, Err(Error::Unimplemented(_))),
        "a method that is not there is no missing task: {missing:?}"
    );
}

#[tokio::test]
async fn a_late_answer_is_not_waited_for_and_does_no_harm() {
    let shim = Shim::start(3).await;
    let connection = shim.connection(3);
    let soon = Limit::Of(Duration::from_millis(50));
    let late = connection.task::<WaitResponse>("Wait", &WaitRequest::new(), soon).await;
    assert!(matches!(late, Err(Error::DeadlineExceeded(_))), "{late:?}");
    state(&connection).await.expect("the connection goes on");
}

fn exit(answer: WaitResponse) -> Exit {
    Exit { pid: 0, status: answer.exit_status, timestamp: SystemTime::UNIX_EPOCH }
}

#[tokio::test]
async fn the_loss_of_the_shim_ends_every_wait_and_a_new_one_is_found() {
    let mut shim = Shim::start(3).await;
    let connection = shim.connection(3);
    let watch = ExitWatch::default();
    let ask = || {
        let connection = Arc::clone(&connection);
        async move { connection.task("Wait", &WaitRequest::new(), Limit::None).await.map(exit) }
    };
    let lose = async {
        // The waits are under way: a dropped one, and those below.
        let _ = timeout(Duration::from_millis(50), watch.wait(ask)).await;
        shim.server.shutdown().await.unwrap();
    };
    let (first, second, ()) = tokio::join!(watch.wait(ask), watch.wait(ask), lose);
    assert!(matches!((&first, &second), (Err(Error::ShimLost(_)), Err(Error::ShimLost(_)))), "{first:?} {second:?}");
    assert_eq!(watch.seen(), None);
    assert!(matches!(state(&connection).await, Err(Error::ShimLost(_))), "nobody listens");
    shim.server = serve(&shim.socket, 3).await;
    assert_eq!(state(&connection).await.unwrap().id, "t1");
}
