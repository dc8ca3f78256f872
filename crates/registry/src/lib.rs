//! Client of OCI registries: pull and push of manifests and blobs with credentials, mirrors and loopback HTTP.
//!
//! A [`Registry`] is made once; a [`Session`] is one pull or push of one repository with one caller's credentials, so that
//! no token is ever lent to another caller. Manifests are checked here (digest, size, shape); the bytes of a blob are handed
//! on as they come and the receiver, who hashes them anyway while it stores them, compares the digest.
//!
//! It knows nothing of storage, layers or local images.
//!
//! Why not an existing client crate: none bounds what it reads of a manifest or a token answer, and the nearest one drops
//! the reason of a refused login, has no identity tokens, no mirror chains and no resumption. What is left is this file's size.

mod auth;
mod error;
mod hosts;
mod http;
mod manifest;
mod pull;
mod push;
mod reference;

use std::path::PathBuf;
use std::sync::Arc;

pub use auth::Auth;
pub use error::{Error, Result};
pub use manifest::{
    DOCKER_CONFIG, DOCKER_INDEX, DOCKER_LAYER_GZIP, DOCKER_MANIFEST, Document, MANIFEST_BYTES_MAX, OCI_CONFIG,
    OCI_INDEX, OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, OCI_MANIFEST, Parsed, Platform, is_sha256, select_platform,
    sha256,
};
pub use reference::{Reference, is_loopback};

use http::{Clients, Connection};

/// Where registries are reached, beyond what their names say.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Directory of `<host>/hosts.toml` files in containerd's format; none: no mirrors.
    pub hosts_dir: Option<PathBuf>,
    /// Hosts (`name` or `name:port`) that are reached by plain HTTP. Loopback addresses always are.
    pub insecure: Vec<String>,
}

/// The way to all registries. Cheap to clone; connections are pooled inside.
#[derive(Debug, Clone)]
pub struct Registry {
    config: Arc<Config>,
    clients: Arc<Clients>,
}

/// What a session is for. It decides the scope of the token that is asked for, and whether mirrors are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading, from mirrors first.
    Pull,
    /// Writing, to the registry itself only.
    Push,
}

/// One pull from, or push to, one repository with one caller's credentials.
#[derive(Debug)]
pub struct Session {
    reference: Reference,
    /// In the order in which they are tried; the registry itself is last.
    connections: Vec<Connection>,
}

impl Registry {
    /// A client with this configuration. Nothing is read or reached yet.
    pub fn new(config: Config) -> Registry {
        Registry { config: Arc::new(config), clients: Arc::default() }
    }

    /// Opens a session for the repository of `reference`. Reads its `hosts.toml`, if there is one, and reaches nothing.
    ///
    /// Credentials go to the registry that the reference names and to the token server that it names; to a mirror only if
    /// `auth` says itself that it is for that host (`server_address`).
    pub fn session(&self, reference: &Reference, auth: Option<&Auth>, access: Access) -> Result<Session> {
        let endpoints = hosts::endpoints(&self.config, reference.registry())?;
        let connections = endpoints
            .into_iter()
            .filter(|endpoint| match access {
                Access::Pull => endpoint.pull,
                Access::Push => endpoint.origin,
            })
            .map(|endpoint| Connection::new(&self.clients, endpoint, reference, auth, access))
            .collect::<Result<Vec<_>>>()?;
        Ok(Session { reference: reference.clone(), connections })
    }
}

impl Session {
    /// The reference that the session was opened for.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }
}
