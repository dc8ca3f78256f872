//! Serving until a signal, and the orderly end: no new calls, the running ones get their time, containers keep running.

use std::time::Duration;

use anyhow::Context as _;
use sd_notify::NotifyState;
use stasis_cri::Parts;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tonic::transport::Server;

use crate::config::Config;
use crate::listen::Socket;
use crate::reload::Reload;

/// Exit status of a daemon that a second signal ended before it was done.
const IMPATIENT_EXIT: i32 = 1;

/// Time for the last answers to leave, and for clients to close their connections.
const ANSWER_GRACE: Duration = Duration::from_millis(500);

/// SIGTERM, SIGINT and SIGHUP, caught from the start on: one that comes during start-up is not lost.
#[derive(Debug)]
pub(crate) struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
}

impl Signals {
    /// Catches all of them. Must be called inside the tokio runtime.
    pub(crate) fn catch() -> anyhow::Result<Self> {
        let catch = |kind| signal(kind).context("cannot catch signals");
        let (term, int) = (catch(SignalKind::terminate())?, catch(SignalKind::interrupt())?);
        Ok(Self { term, int, hup: catch(SignalKind::hangup())? })
    }

    /// Waits for the next one that ends the daemon, and names it.
    pub(crate) async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}

/// Serves CRI and the administration on `socket` until the first signal that ends it, then ends in order. A second one
/// ends at once. SIGHUP has the configuration read anew.
pub(crate) async fn until_signalled(
    mut reload: Reload,
    read: impl Fn() -> anyhow::Result<Config>,
    parts: Parts,
    socket: Socket,
    mut signals: Signals,
) -> anyhow::Result<()> {
    let pods = parts.pods.clone();
    let services = stasis_cri::services(parts);
    if let Some(address) = reload.current().metrics.address {
        let services = services.clone();
        let address = crate::metrics::serve(address, move || services.metrics()).await?;
        tracing::info!(%address, "serving metrics");
    }
    let (stop, stopped) = oneshot::channel::<()>();
    let mut server =
        tokio::spawn(Server::builder().serve_with_incoming_shutdown(services, socket.connections(), async {
            // An error means that the sender is gone: that is an end, too.
            let _ = stopped.await;
        }));
    tracing::info!(socket = %reload.current().socket().display(), version = env!("CARGO_PKG_VERSION"), "serving");
    notify(NotifyState::Ready);

    loop {
        tokio::select! {
            ended = &mut server => {
                ended.context("the server ended abnormally")?.context("cannot serve")?;
                anyhow::bail!("the server ended by itself");
            }
            () = pods.broken() => anyhow::bail!(
                "a write to the state database failed, and it takes no more until it is opened anew; containers keep \
                 running. Is the disk full?"
            ),
            _ = signals.hup.recv() => reload.apply(read()).await,
            _ = signals.term.recv() => {
                tracing::info!(signal = "SIGTERM", "ending; containers keep running");
                break;
            }
            _ = signals.int.recv() => {
                tracing::info!(signal = "SIGINT", "ending; containers keep running");
                break;
            }
        }
    }
    notify(NotifyState::Stopping);
    drop(stop);
    let grace = Duration::from_secs(reload.current().limits.shutdown_grace_seconds);
    let drained = async {
        pods.drained().await;
        // Clients keep their connections open; what they still wait for is an answer on its way.
        let _ = tokio::time::timeout(ANSWER_GRACE, server).await;
    };
    tokio::select! {
        ended = tokio::time::timeout(grace, drained) => {
            if ended.is_err() {
                tracing::warn!(seconds = grace.as_secs(), "operations still run; ending without them");
            }
        }
        name = signals.next() => give_up(name),
    }
    tracing::info!("ended");
    Ok(())
}

/// Ends the process now, as somebody asked twice. Records are durable; what was half done is cleared at the next start.
fn give_up(signal: &str) -> ! {
    tracing::warn!(signal, "second signal: ending at once");
    std::process::exit(IMPATIENT_EXIT)
}

/// Tells systemd, if it started us. Nobody listening is no error.
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot notify the service manager");
    }
}
