//! The start of a shim: finds the server of the pod or makes one, and prints its address.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::Mode;
use serde::Serialize;
use serde_json::Value;
use stasis_shim_api::layout;
use stasis_sys::path::read_limited;
use stasis_sys::process::{Setup, prepare};

use crate::args::Args;
use crate::error::Error;

/// Longest path of a unix socket: `sun_path` has 108 bytes, one of them the terminating zero.
const SOCKET_PATH_MAX: usize = 107;

/// Where sockets go whose pod's directory is too long for one.
const SHORT_DIR: &str = "/run/stasis/s";

/// Version of the Task API, and of the answer to `start`, that containerd 2 introduced.
const VERSION: u32 = 3;

/// Annotations of a container's configuration that name its pod: containerd's CRI, and the one for its other clients.
const GROUPING: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.containerd.runc.v2.group"];

/// Largest `config.json` that is read.
const CONFIG_MAX: u64 = 16 << 20;

/// containerd's answer to `start`.
#[derive(Serialize)]
struct BootstrapParams<'a> {
    version: u32,
    address: &'a str,
    protocol: &'a str,
}

/// Prints the address of the pod's server, which it starts if there is none.
pub(crate) fn start(args: &Args) -> Result<(), Error> {
    let dir = std::env::current_dir().map_err(Error::io("finding the working directory"))?;
    let socket = socket_path(args, &pod_dir(args, &dir))?;
    if UnixStream::connect(&socket).is_err() {
        launch(args, &dir, &socket)?;
    }
    let address = format!("unix://{}", socket.display());
    print(
        &serde_json::to_string(&BootstrapParams { version: VERSION, address: &address, protocol: "ttrpc" })
            .map_err(|error| Error::Internal(error.to_string()))?,
    )
}

/// Prints name and version.
pub(crate) fn print_version() -> Result<(), Error> {
    print(&format!("containerd-shim-stasis-v1 {}\n", env!("CARGO_PKG_VERSION")))
}

fn print(text: &str) -> Result<(), Error> {
    io::stdout().write_all(text.as_bytes()).map_err(Error::io("printing"))
}

/// The directory of the pod: the working directory, unless that is the bundle of a container that belongs to another.
fn pod_dir(args: &Args, dir: &Path) -> PathBuf {
    match group_of(dir) {
        Some(group) if group != args.id => dir.parent().unwrap_or(dir).join(group),
        _ => dir.to_path_buf(),
    }
}

fn group_of(bundle: &Path) -> Option<String> {
    let config: Value = serde_json::from_slice(&read_limited(&bundle.join("config.json"), CONFIG_MAX).ok()?).ok()?;
    let group = |name: &&str| config.get("annotations")?.get(*name)?.as_str().map(str::to_owned);
    // It becomes part of a path.
    GROUPING.iter().find_map(group).filter(|group| !group.is_empty() && !group.contains('/') && !group.starts_with('.'))
}

/// The socket in the pod's directory; where its path would be too long, one by the pod's name in a short place.
fn socket_path(args: &Args, pod_dir: &Path) -> Result<PathBuf, Error> {
    let socket = pod_dir.join(layout::SOCKET);
    if socket.as_os_str().len() <= SOCKET_PATH_MAX {
        return Ok(socket);
    }
    let pod = pod_dir.file_name().unwrap_or_default().to_string_lossy();
    let short = Path::new(SHORT_DIR).join(format!("{}-{pod}.sock", args.namespace.replace('/', "_")));
    if short.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(Error::Invalid(format!(
            "neither {} nor {} is short enough for a socket ({SOCKET_PATH_MAX} bytes): use a shorter state directory",
            socket.display(),
            short.display()
        )));
    }
    let made = fs::DirBuilder::new().mode(0o700).recursive(true).create(SHORT_DIR);
    made.map_err(Error::io(format!("creating {SHORT_DIR}")))?;
    Ok(short)
}

/// Starts a server that outlives us and everybody else; the socket exists before it, so nobody has to wait for it.
fn launch(args: &Args, dir: &Path, socket: &Path) -> Result<(), Error> {
    let listener = bind(socket)?;
    let log_path = dir.join(layout::LOG);
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(&log_path);
    let log = log.map_err(Error::io(format!("opening {}", log_path.display())))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("containerd-shim-stasis-v1").args(["-namespace", &args.namespace, "-id", &args.id]);
    if args.debug {
        command.arg("-debug");
    }
    let copy = log.try_clone().map_err(Error::io("opening the log"))?;
    command.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener))).stdout(Stdio::from(copy)).stderr(Stdio::from(log));
    prepare(&mut command, Setup { new_session: true, only_stdio: true, ..Setup::default() });
    let server = command.spawn().map_err(Error::io("starting the shim's server"))?;
    let pid_path = dir.join(layout::PID);
    write_private(&pid_path, &server.id().to_string()).map_err(Error::io(format!("writing {}", pid_path.display())))
}

fn bind(socket: &Path) -> Result<UnixListener, Error> {
    // Nobody answered there, so it is what a dead shim left.
    let _ = fs::remove_file(socket);
    // The mode must be right from the first moment on; this process has one thread and ends soon.
    let before = rustix::process::umask(Mode::XUSR | Mode::RWXG | Mode::RWXO);
    let bound = UnixListener::bind(socket);
    rustix::process::umask(before);
    bound.map_err(Error::io(format!("listening on {}", socket.display())))
}

fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let mut file: File = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Action;

    fn args(id: &str) -> Args {
        let action = Action::Start;
        Args { action, namespace: "k8s.io".to_owned(), id: id.to_owned(), bundle: None, debug: false }
    }

    #[test]
    fn containers_of_a_pod_share_its_shim() {
        let root = tempfile::tempdir().unwrap();
        let bundle = root.path().join("c1");
        fs::create_dir(&bundle).unwrap();
        assert_eq!(pod_dir(&args("c1"), &bundle), bundle);
        let check = |group: &str, expected: &Path| {
            let config = format!(r#"{{"annotations":{{"io.kubernetes.cri.sandbox-id":"{group}"}}}}"#);
            fs::write(bundle.join("config.json"), config).unwrap();
            assert_eq!(pod_dir(&args("c1"), &bundle), expected, "{group}");
        };
        check("p1", &root.path().join("p1"));
        check("c1", &bundle);
        check("../../etc", &bundle);
    }

    #[test]
    fn a_socket_that_cannot_be_bound_is_refused() {
        let long = PathBuf::from("/run").join("x".repeat(200));
        assert!(socket_path(&args("p"), &long).unwrap_err().to_string().contains("shorter state directory"));
        assert_eq!(socket_path(&args("p"), Path::new("/run/p")).unwrap(), Path::new("/run/p/shim.sock"));
    }
}
