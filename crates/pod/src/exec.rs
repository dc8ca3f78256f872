//! ExecSync: one command in a running container, its output collected.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use stasis_cri_api::runtime::ExecSyncResponse;
use stasis_task::{ExecSpec, Io, Process};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tracing::warn;

use crate::error::{Error, IoContext as _, Kind, Result};
use crate::pods::{Container, Pods};
use crate::spec;
use crate::state::{Operation, admit};

/// Most output of one command that is kept for each stream: what fits a gRPC answer of 16 MiB with both streams, as in
/// containerd. What exceeds it is dropped, so that a command cannot fill the daemon's memory.
const OUTPUT_MAX: usize = 8 * 1024 * 1024 - 64 * 1024;
/// Longest time that a command may run if the caller sets none.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(3600);
/// How long the output may stay open after the command's end: a child may hold it.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
const SIGKILL: u32 = 9;

impl Pods {
    /// Runs a command in a running container and returns its output and exit code: CRI ExecSync.
    ///
    /// # Errors
    /// `FailedPrecondition` unless the container runs; `DeadlineExceeded` after `timeout` seconds (0: an hour), the
    /// command is killed then. It is killed, too, when the caller gives up.
    pub async fn exec_sync(&self, id: &str, command: Vec<String>, timeout: i64) -> Result<ExecSyncResponse> {
        let container = self.container(id)?;
        let pods = self.clone();
        let timeout = match timeout {
            seconds @ 1.. => Duration::from_secs(seconds.unsigned_abs()),
            _ => TIMEOUT_DEFAULT,
        };
        let (caller, gone) = oneshot::channel();
        let answer = self.detached(async move { pods.exec(&container, &command, timeout, gone).await }).await;
        drop(caller);
        answer
    }

    async fn exec(
        &self,
        container: &Arc<Container>,
        command: &[String],
        timeout: Duration,
        gone: oneshot::Receiver<()>,
    ) -> Result<ExecSyncResponse> {
        if command.is_empty() {
            return Err(Error::invalid("the command is empty"));
        }
        admit(Operation::Exec, container.record().phase(), &container.id)?;
        let task = container
            .task()
            .ok_or_else(|| Error::new(Kind::Unavailable, format!("container {} has no shim any more", container.id)))?;
        let bundle = self.bundle(&container.pod_id, &container.id);
        let exec_id = stasis_sys::file::random_id();
        let streams = Streams::open(&bundle.join(format!("exec-{exec_id}")))?;
        let process = spec::exec_process(&read_spec(&bundle)?, command, false);
        let process = serde_json::to_vec(&process)
            .map_err(|error| Error::internal(format!("cannot write the process of the command: {error}")))?;
        let io = Io {
            stdout: streams.path("stdout").to_string_lossy().into_owned(),
            stderr: streams.path("stderr").to_string_lossy().into_owned(),
            ..Io::default()
        };
        let process = task.exec(&exec_id, ExecSpec { process, io }).await?;
        let result = run(&*process, streams, timeout, gone).await;
        if let Err(error) = process.delete().await
            && !error.is_not_found()
        {
            warn!(container = container.id, %error, "cannot delete the process of a command");
        }
        result.map_err(|error| error.context(format_args!("command {command:?} in container {}", container.id)))
    }
}

/// The specification that a container was made with.
pub(crate) fn read_spec(bundle: &Path) -> Result<oci_spec::runtime::Spec> {
    let path = bundle.join("config.json");
    let text = std::fs::read(&path).doing(format_args!("read {}", path.display()))?;
    serde_json::from_slice(&text)
        .map_err(|error| Error::internal(format!("the OCI spec {} cannot be read: {error}", path.display())))
}

/// Runs it to its end, or until the time is over or the caller is `gone`.
async fn run(
    process: &dyn Process,
    streams: Streams,
    timeout: Duration,
    gone: oneshot::Receiver<()>,
) -> Result<ExecSyncResponse> {
    process.start().await?;
    let (stdout, stderr) = streams.collect();
    let ended = tokio::select! {
        exit = process.wait() => Ok(exit?),
        () = tokio::time::sleep(timeout) => Err(Error::new(
            Kind::DeadlineExceeded,
            format!("did not end within {} s and was killed", timeout.as_secs_f64()),
        )),
        _ = gone => Err(Error::new(Kind::Unavailable, "was killed as its caller gave up")),
    };
    let exit = match ended {
        Ok(exit) => exit,
        Err(error) => {
            let _ = process.kill(SIGKILL).await;
            let _ = process.wait().await;
            return Err(error);
        }
    };
    Ok(ExecSyncResponse {
        stdout: stdout.finish().await,
        stderr: stderr.finish().await,
        exit_code: i32::try_from(exit.status).unwrap_or(-1),
    })
}

/// The FIFOs of one command. Their directory goes once the shim has opened its ends, or when the command does not start.
struct Streams {
    dir: FifoDir,
    stdout: pipe::Receiver,
    stderr: pipe::Receiver,
}

/// A directory that is removed when this is dropped.
struct FifoDir(PathBuf);

impl Drop for FifoDir {
    fn drop(&mut self) {
        // What stays goes with the bundle.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Streams {
    fn open(dir: &Path) -> Result<Self> {
        std::fs::create_dir(dir).doing(format_args!("make {}", dir.display()))?;
        let dir = FifoDir(dir.to_owned());
        let open = |name| {
            let path = dir.0.join(name);
            rustix::fs::mknodat(
                rustix::fs::CWD,
                &path,
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
                0,
            )
            .map_err(std::io::Error::from)
            .and_then(|()| pipe::OpenOptions::new().open_receiver(&path))
            .doing(format_args!("make the FIFO {}", path.display()))
        };
        let (stdout, stderr) = (open("stdout")?, open("stderr")?);
        Ok(Self { dir, stdout, stderr })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.0.join(name)
    }

    /// Begins to read both streams.
    fn collect(self) -> (Output, Output) {
        (Output::read(self.stdout), Output::read(self.stderr))
    }
}

/// A stream that is being read.
struct Output {
    bytes: Arc<std::sync::Mutex<Vec<u8>>>,
    reader: tokio::task::JoinHandle<()>,
}

impl Output {
    fn read(mut pipe: pipe::Receiver) -> Self {
        let bytes = Arc::new(std::sync::Mutex::new(Vec::new()));
        let kept = Arc::clone(&bytes);
        let reader = tokio::spawn(async move {
            let mut chunk = vec![0; 64 * 1024];
            while let Ok(count @ 1..) = pipe.read(&mut chunk).await {
                let mut kept = kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let room = OUTPUT_MAX - kept.len();
                kept.extend_from_slice(&chunk[..count.min(room)]);
            }
        });
        Self { bytes, reader }
    }

    /// What was read until the end of the stream, or until a short time after the command's end.
    async fn finish(mut self) -> Vec<u8> {
        if tokio::time::timeout(DRAIN_LIMIT, &mut self.reader).await.is_err() {
            self.reader.abort();
        }
        std::mem::take(&mut *self.bytes.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}
