//! The programs of shims: found by runtime name, started, and called to clean up after a dead one.
//!
//! Command line, environment and input are containerd's (its `pkg/shim`, `core/runtime/v2/binary.go`).

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension};
use protobuf::well_known_types::any::Any as AnyMessage;
use protobuf::{Message as _, MessageField};
use rustix::process::Signal;
use stasis_sys::capture::{Captured, Limits, capture};
use stasis_sys::process::{Setup, prepare};

use crate::bundle::{Bootstrap, blocking};
use crate::connection::Endpoint;
use crate::{Any, Config, Error, Exit, Result};

/// A shim is to be ready within this; it does no container's work yet. Generous, for a machine under load.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Cleaning up after a dead shim kills its container and takes off its mounts.
const DELETE_LIMIT: Duration = Duration::from_secs(60);

/// An address and little more is said at the start.
const STDOUT_MAX: usize = 64 * 1024;

/// Of what a shim complains, this much reaches the error.
const STDERR_TAIL: usize = 4 * 1024;

/// The version of the shim protocol that containerd announces, the same since its 1.7.
const MAX_SHIM_VERSION: &str = "2";

/// Where to look for programs if the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The name of a shim's program: `io.containerd.runc.v2` is `containerd-shim-runc-v2`.
fn program_name(runtime: &str) -> Result<String> {
    let parts: Vec<&str> = runtime.split('.').collect();
    match parts[..] {
        [.., name, version] if parts.len() > 2 && !name.is_empty() && !version.is_empty() && !runtime.contains('/') => {
            Ok(format!("containerd-shim-{name}-{version}"))
        }
        _ => Err(Error::InvalidArgument(format!(
            "{runtime:?} is no runtime: a name like io.containerd.runc.v2, or the absolute path of a shim, is needed"
        ))),
    }
}

/// Finds a shim's program as containerd does; a path is taken as it is.
pub(crate) fn find(runtime: &str, config: &Config) -> Result<PathBuf> {
    if runtime.starts_with('/') {
        let path = PathBuf::from(runtime);
        let found = is_program(&path).then_some(path);
        return found.ok_or_else(|| Error::Start(format!("{runtime} is no program: no shim can be started from it")));
    }
    let name = program_name(runtime)?;
    let path = search_path(config);
    let dirs = config.shim_dirs.iter().cloned().chain(std::env::split_paths(&path));
    let found = dirs.map(|dir| dir.join(&name)).find(|path| path.is_absolute() && is_program(path));
    found.ok_or_else(|| {
        let dirs: Vec<_> = config.shim_dirs.iter().map(|dir| dir.display().to_string()).collect();
        Error::Start(format!(
            "runtime {runtime}: its program {name} is neither in [{}] nor in PATH {}: install it, or give its absolute path",
            dirs.join(", "),
            path.display()
        ))
    })
}

/// Whether a runtime, by name or path, is our own shim.
pub(crate) fn is_ours(runtime: &str) -> bool {
    const PROGRAM: &str = "containerd-shim-stasis-v1";
    match runtime.strip_prefix('/') {
        Some(path) => Path::new(path).file_name() == Some(OsStr::new(PROGRAM)),
        None => program_name(runtime).is_ok_and(|name| name == PROGRAM),
    }
}

/// Starts a shim in its bundle. It may say that one which runs already is to serve.
pub(crate) async fn start(
    binary: &Path,
    id: &str,
    bundle: &Path,
    options: Option<&Any>,
    config: &Config,
) -> Result<Endpoint> {
    let mut command = command(binary, id, bundle, config);
    command.arg("start");
    // A start that outlived the daemon could bring up a shim after the next daemon had cleared its pod away.
    prepare(&mut command, Setup { parent_death_signal: Some(Signal::KILL), ..Setup::default() });
    let input = bootstrap_params(id, options, config)?;
    let doing = format!("starting the shim {} for {id}", binary.display());
    let output = run(command, input, START_LIMIT, &doing).await?;
    parse_answer(&output.stdout).map_err(|error| {
        let stderr = String::from_utf8_lossy(&output.stderr);
        Error::Start(format!("{doing}: {error} {}", stderr.trim()).trim_end().to_owned())
    })
}

/// Has a dead shim's program kill and unmount what the shim left behind.
pub(crate) async fn delete(binary: &Path, id: &str, bundle: &Path, config: &Config) -> Result<Exit> {
    let mut command = command(binary, id, bundle, config);
    command.arg("-bundle").arg(bundle).arg("delete");
    let doing = format!("cleaning up after the dead shim {} of {id}", binary.display());
    let output = run(command, Vec::new(), DELETE_LIMIT, &doing).await?;
    let answer = DeleteResponse::parse_from_bytes(&output.stdout)
        .map_err(|error| Error::Start(format!("{doing}: its answer cannot be understood: {error}")))?;
    Ok(Exit { pid: answer.pid, status: answer.exit_status, timestamp: to_time(&answer.exited_at) })
}

fn command(binary: &Path, id: &str, bundle: &Path, config: &Config) -> Command {
    let mut command = Command::new(binary);
    command.current_dir(bundle).env_clear().env("PATH", search_path(config));
    command.envs(config.env.iter().map(|(name, value)| (name, value)));
    command.env("GOMAXPROCS", "2").env("MAX_SHIM_VERSION", MAX_SHIM_VERSION);
    command.env("TTRPC_ADDRESS", format!("{}.ttrpc", config.address)).env("GRPC_ADDRESS", &config.address);
    command.env("NAMESPACE", &config.namespace);
    command.args(["-namespace", &config.namespace, "-address", &config.address]);
    // Shims of old publish events through this program; ours has nothing to receive them with.
    command.args(["-publish-binary", PUBLISH_NOTHING, "-id", id]);
    command
}

const PUBLISH_NOTHING: &str = "/bin/true";

async fn run(mut command: Command, input: Vec<u8>, time: Duration, doing: &str) -> Result<Captured> {
    let limits = Limits { time, stdout: STDOUT_MAX, stderr_tail: STDERR_TAIL };
    let words = doing.to_owned();
    let output = blocking(move || {
        capture(&mut command, &input, &limits).map_err(|failure| Error::Start(format!("{words}: it {failure}")))
    });
    let output = output.await?;
    if output.status.success() {
        return Ok(output);
    }
    let said = String::from_utf8_lossy(if output.stderr.is_empty() { &output.stdout } else { &output.stderr });
    Err(Error::Start(format!("{doing}: {}: {}", output.status, said.trim())))
}

/// The input of `start` since containerd 2.3; shims before that read no more than the runtime's options out of it.
fn bootstrap_params(id: &str, options: Option<&Any>, config: &Config) -> Result<Vec<u8>> {
    let extension = |options: &Any| Extension { value: MessageField::some(to_message(options)), ..Default::default() };
    let params = BootstrapParams {
        instance_id: id.into(),
        namespace: config.namespace.clone(),
        containerd_grpc_address: config.address.clone(),
        containerd_ttrpc_address: format!("{}.ttrpc", config.address),
        containerd_binary: PUBLISH_NOTHING.into(),
        extensions: options.map(extension).into_iter().collect(),
        ..Default::default()
    };
    params.write_to_bytes().map_err(|error| Error::InvalidArgument(format!("the runtime options of {id}: {error}")))
}

/// The answer of `start`: an address alone, JSON (containerd 1.7 to 2.2), or protobuf (since 2.3).
fn parse_answer(answer: &[u8]) -> Result<Endpoint> {
    let text = std::str::from_utf8(answer).unwrap_or_default().trim();
    if text.starts_with('{') {
        let said: Bootstrap = serde_json::from_str(text)
            .map_err(|error| Error::Start(format!("its answer {text:?} cannot be understood: {error}")))?;
        return Endpoint::new(&said.address, said.version, &said.protocol);
    }
    if text.contains("://") && !text.contains(char::is_control) {
        return Endpoint::new(text, 2, "ttrpc");
    }
    match BootstrapResult::parse_from_bytes(answer) {
        Ok(said) if !said.address.is_empty() => {
            Endpoint::new(&said.address, u32::try_from(said.version).unwrap_or_default(), &said.protocol)
        }
        _ => Err(Error::Start(format!("its answer {:?} is no address", String::from_utf8_lossy(answer)))),
    }
}

pub(crate) fn to_message(any: &Any) -> AnyMessage {
    AnyMessage { type_url: any.type_url.clone(), value: any.value.clone(), ..Default::default() }
}

pub(crate) fn to_time(time: &MessageField<protobuf::well_known_types::timestamp::Timestamp>) -> SystemTime {
    let since_epoch = Duration::new(time.seconds.try_into().unwrap_or(0), time.nanos.try_into().unwrap_or(0));
    SystemTime::UNIX_EPOCH + since_epoch
}

fn search_path(config: &Config) -> OsString {
    let given = config.env.iter().find(|(name, _)| name == "PATH").map(|(_, value)| value.clone());
    given.or_else(|| std::env::var_os("PATH")).unwrap_or_else(|| DEFAULT_PATH.into())
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
#[path = "binary_tests.rs"]
mod tests;
