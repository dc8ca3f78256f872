//! SPDY/3.1, the server's side: framing, header compression, streams and flow control over any byte stream.
//!
//! It knows nothing of HTTP, of Kubernetes, or of what the streams are for. Only what a server of `exec`, `attach` and
//! `port-forward` needs is here: clients open streams, the server replies or refuses; there is no server push.
//!
//! ```text
//!   octets of a control frame                    octets of a data frame
//!   1 VERSION(15)=3  TYPE(16)                    0 STREAM(31)
//!   FLAGS(8)  LENGTH(24)                         FLAGS(8)  LENGTH(24)
//!   LENGTH octets                                LENGTH octets
//! ```
//!
//! [`serve`] gives a [`Connection`], which accepts streams, and a future that moves the bytes: it must be polled as long
//! as the connection lives. A [`Stream`] reads and writes; its shutdown is the half-close of SPDY (FLAG_FIN).
//!
//! # Memory
//!
//! A stream holds at most [`Limits::window`] bytes that were received and [`SEND_BUFFER`] bytes to be sent, a connection
//! at most [`Limits::session_window`] bytes that were received; both whatever the peer does. A peer that keeps to flow
//! control never sends more. One that does not (Go's `spdystream`, which `kubectl` and the kubelet use, knows no flow
//! control at all) is held back by TCP: the connection is not read on until there is room.
//!
//! In the other direction a window is enforced as soon as the peer shows that it has flow control, by a SETTINGS frame
//! with a window or a WINDOW_UPDATE. Until then TCP alone holds us back: to enforce the initial window of a peer that
//! will never enlarge it would stop every stream after 64 KiB.

mod connection;
mod error;
mod frame;
mod headers;
mod state;
mod stream;
#[cfg(test)]
mod tests;

pub use connection::{Connection, serve};
pub use error::Error;
pub use headers::Headers;
pub use state::{Limits, SEND_BUFFER};
pub use stream::{Incoming, Stream};
