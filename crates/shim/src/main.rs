//! The shim of one pod: containerd's Task and Sandbox services over its processes, and the checkpoint of a container.
//!
//! It runs as long as the pod does, whatever becomes of the daemon, so it is small and single-threaded: one process a pod
//! that owns the stdio, logs, exit statuses and namespaces of its containers. It knows nothing of CRI, images or networks.

mod args;
mod bundle;
mod careful;
mod checkpoint;
mod cleanup;
mod container;
mod dump;
mod error;
mod extension;
mod io;
mod journal;
mod process;
mod reaper;
mod restore;
mod sandbox;
mod server;
mod start;
mod tar;
mod task;

use std::process::ExitCode;

use args::{Action, Args};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let program = arguments.next();
    let arguments: Vec<String> = arguments.map(|argument| argument.to_string_lossy().into_owned()).collect();
    if tar::is_called(program.as_ref()) {
        return tar::main(&arguments);
    }
    if arguments.first().is_some_and(|first| first == checkpoint::WORKER_COMMAND) {
        return dump::main();
    }
    let done = Args::parse(&arguments).and_then(|args| match args.action {
        Action::Version => start::print_version(),
        Action::Start => start::start(&args),
        Action::Delete => cleanup::delete(&args),
        Action::Serve => server::serve(&args),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            journal::line(format_args!("{error}"));
            ExitCode::FAILURE
        }
    }
}
