//! Why a connection ended that should not have.

use std::io;
use std::time::Duration;

/// Why a connection broke off.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The peer sent what SPDY/3.1 does not allow.
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// The peer's headers are larger than is taken, compressed or not.
    #[error("the peer sent headers of more than {0} bytes")]
    HeadersTooLarge(usize),
    /// Nothing came and nothing went for too long.
    #[error("nothing was sent or received for {} s", .0.as_secs())]
    Idle(Duration),
}
