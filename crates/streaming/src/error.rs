//! Why the server could not be set up, or gives no URL.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// What the daemon hears of the server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address cannot be listened on.
    #[error(
        "cannot listen on {address} for exec, attach and port-forward: {source}; see [streaming] in the configuration"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The certificate or its key cannot be used.
    #[error("cannot use {} for TLS: {reason}", path.display())]
    Tls {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Too many URLs were given out and not used.
    #[error("{0} exec, attach and port-forward requests wait for their clients: try again when some have expired")]
    TooManyOpen(usize),
    /// A request that no client could use.
    #[error("{0}")]
    Invalid(&'static str),
}
