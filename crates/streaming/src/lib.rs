//! The streaming server: exec, attach and port-forward for the kubelet and crictl, over SPDY/3.1 and WebSocket.
//!
//! CRI's Exec, Attach and PortForward only say what is wanted and get a URL: [`Server::url`]. The client then speaks HTTP
//! to that URL and upgrades the connection. What runs behind a URL is not known here: a [`Backend`] starts it and gives
//! its pipes.
//!
//! ```text
//!   server   listener, TLS, requests, upgrades     tokens  what each URL stands for, once and for a minute
//!    ├─ spdy       exec and attach by streams       ├─ session  one process: its pipes, its end
//!    ├─ websocket  …, by channels of messages       ├─ status   how an end is told
//!    └─ forward    port-forward by either           └─ backend  what the runtime must give
//! ```
//!
//! | transport | sub-protocols |
//! |---|---|
//! | SPDY, exec and attach | `v4.channel.k8s.io`, `v3…`, `v2…`, `channel.k8s.io` |
//! | SPDY, port-forward | `portforward.k8s.io` |
//! | WebSocket, exec and attach | `v5.channel.k8s.io`, `v4…`, `channel.k8s.io`, and their `base64.` forms up to 4; none |
//! | WebSocket, port-forward | `v4.channel.k8s.io`, `v4.base64.channel.k8s.io`, none; `SPDY/3.1+portforward.k8s.io` |

mod backend;
mod error;
mod forward;
mod protocol;
mod server;
mod session;
mod spdy;
mod status;
mod tokens;
mod websocket;

pub use backend::{Backend, Control, Failure, Request, Session, Size, Streams};
pub use error::Error;
pub use server::{Config, Server, Tls};
