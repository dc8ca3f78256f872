//! containerd's Task API: requests in, answers out. What they do is in [`crate::container`].

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::*;
use containerd_shim_protos::shim::oci;
use containerd_shim_protos::shim_async;
use protobuf::Message as _;
use protobuf::well_known_types::timestamp::Timestamp;
use ttrpc::r#async::TtrpcContext;

use crate::checkpoint;
use crate::container::{Container, KILL};
use crate::error::Error;
use crate::process::{Exit, State};
use crate::server::{Shim, detached};

/// Version of containerd's shim that Connect names.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The ttrpc service.
#[derive(Debug)]
pub(crate) struct Service(pub(crate) Arc<Shim>);

impl Service {
    /// Runs `work` on a container to its end, even if the client goes away meanwhile.
    async fn on<T, F>(&self, id: &str, work: impl FnOnce(Arc<Shim>, Arc<Container>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let container = self.0.settled_container(id).await?;
        Ok(detached(work(Arc::clone(&self.0), container)).await?)
    }
}

#[async_trait]
impl shim_async::Task for Service {
    async fn state(&self, _: &TtrpcContext, r: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.0.settled_container(&r.id).await?;
        let process = container.process(&r.exec_id)?;
        let state = process.state();
        let status = match state {
            State::Waiting | State::Created { .. } => Status::CREATED,
            State::Running { .. } if container.is_paused() => Status::PAUSED,
            State::Running { .. } => Status::RUNNING,
            State::Stopped { .. } => Status::STOPPED,
        };
        let (exit_status, exited_at) = match state {
            State::Stopped { exit, .. } => (exit.status, timestamp(Some(exit))),
            _ => (0, None),
        };
        let stdio = process.stdio.clone();
        Ok(StateResponse {
            id: r.id,
            exec_id: r.exec_id,
            bundle: container.bundle.dir.to_string_lossy().into_owned(),
            pid: state.pid().unsigned_abs(),
            status: status.into(),
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            exit_status,
            exited_at: exited_at.into(),
            ..Default::default()
        })
    }

    async fn create(&self, _: &TtrpcContext, r: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let shim = Arc::clone(&self.0);
        let container = detached(async move { Container::create(&shim, r).await }).await?;
        Ok(CreateTaskResponse { pid: container.init.state().pid().unsigned_abs(), ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, r: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = self
            .on(&r.id, |shim, container| async move {
                match r.exec_id.as_str() {
                    "" => container.start(&shim).await,
                    exec_id => container.start_exec(&shim, exec_id).await,
                }
            })
            .await?;
        Ok(StartResponse { pid: pid.unsigned_abs(), ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, r: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (pid, exit) = self
            .on(&r.id, |shim, container| async move {
                match r.exec_id.as_str() {
                    "" => container.delete(&shim).await,
                    exec_id => container.delete_exec(exec_id),
                }
            })
            .await?;
        Ok(DeleteResponse {
            pid: pid.unsigned_abs(),
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: timestamp(exit).into(),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, r: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.0.container(&r.id)?.pids()?;
        let info = |pid: i32| ProcessInfo { pid: pid.unsigned_abs(), ..Default::default() };
        Ok(PidsResponse { processes: pids.into_iter().map(info).collect(), ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, r: PauseRequest) -> ttrpc::Result<Empty> {
        self.0.container(&r.id)?.pause()?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, r: ResumeRequest) -> ttrpc::Result<Empty> {
        self.0.container(&r.id)?.resume()?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, r: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let options = match r.options.as_ref().filter(|any| any.type_url.ends_with("runc.v1.CheckpointOptions")) {
            Some(any) => oci::CheckpointOptions::parse_from_bytes(&any.value)
                .map_err(|error| Error::Invalid(format!("the checkpoint options cannot be read: {error}")))?,
            None => oci::CheckpointOptions::new(),
        };
        self.on(&r.id, |shim, container| async move {
            checkpoint::write_images(&shim, &container, r.path.as_ref(), &options).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, r: KillRequest) -> ttrpc::Result<Empty> {
        let container = self.0.settled_container(&r.id).await?;
        match r.exec_id.as_str() {
            "" => container.kill(r.signal, r.all)?,
            exec_id => {
                container.process(exec_id)?.kill(r.signal)?;
                if r.signal == KILL && container.is_paused() {
                    container.resume()?;
                }
            }
        }
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, r: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.0.container(&r.id)?.add_exec(r)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.0.container(&r.id)?.process(&r.exec_id)?.resize(r.width, r.height)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, r: CloseIORequest) -> ttrpc::Result<Empty> {
        if r.stdin {
            self.0.container(&r.id)?.process(&r.exec_id)?.close_stdin()?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, r: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = r.resources.into_option().map(|any| any.value);
        let resources = resources.ok_or_else(|| Error::Invalid("an update without resources".to_owned()))?;
        self.on(&r.id, |shim, container| async move { container.update(&shim, &resources).await }).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, r: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.0.settled_container(&r.id).await?.process(&r.exec_id)?.wait().await;
        let exited_at = timestamp(Some(exit)).into();
        Ok(WaitResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, _: StatsRequest) -> ttrpc::Result<StatsResponse> {
        Err(Error::Unsupported("Stats").into())
    }

    async fn connect(&self, _: &TtrpcContext, r: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // Without a container in hand a client asks for the shim itself.
        let task_pid = self.0.container(&r.id).map_or(0, |container| container.init.state().pid());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: task_pid.unsigned_abs(),
            version: VERSION.to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        // As long as there is work, the request is for a container that shared this shim.
        if self.0.is_idle() {
            self.0.shut_down();
        }
        Ok(Empty::new())
    }
}

fn timestamp(exit: Option<Exit>) -> Option<Timestamp> {
    exit.map(|exit| exit.at.into())
}
