//! Image references: `redis`, `quay.io/a/b:tag`, `127.0.0.1:5000/x@sha256:…`.
//!
//! Normalised as Docker and containerd do: `redis` is `docker.io/library/redis:latest`, and a tag beside a digest is dropped,
//! since the digest alone decides. Written by hand instead of with oci-spec's regular expression: that one knows no IPv6
//! host and keeps a compiled automaton of megabytes in a resident daemon.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::manifest::is_sha256;

/// Most characters of `registry/repository`, as in the distribution project's grammar.
const NAME_LENGTH_MAX: usize = 255;
/// Most characters of a tag, by the OCI distribution specification.
const TAG_LENGTH_MAX: usize = 128;

/// A normalised reference: a repository, and a tag or a digest in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<String>,
}

impl Reference {
    /// Host, with port if one was given: `docker.io`, `127.0.0.1:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Path in the registry: `library/redis`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Tag; none if there is a digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Digest, `sha256:…`.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// `registry/repository`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The same repository at a digest (`sha256:…`).
    pub fn at_digest(&self, digest: &str) -> Reference {
        Reference { tag: None, digest: Some(digest.to_owned()), ..self.clone() }
    }

    /// What stands in a manifest URL: the digest, else the tag.
    pub(crate) fn selector(&self) -> &str {
        self.digest.as_deref().or(self.tag.as_deref()).unwrap_or("latest")
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        match (&self.digest, &self.tag) {
            (Some(digest), _) => write!(f, "@{digest}"),
            (None, Some(tag)) => write!(f, ":{tag}"),
            (None, None) => Ok(()),
        }
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Reference> {
        parse(text).map_err(|reason| Error::Reference { text: text.to_owned(), reason: reason.to_owned() })
    }
}

fn parse(text: &str) -> std::result::Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err("64 hexadecimal digits are an image ID, not a name");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    if digest.is_some_and(|digest| !is_sha256(digest)) {
        return Err("the digest must be sha256: and 64 lower-case hexadecimal digits");
    }
    let (registry, path) = split_registry(rest);
    // A colon after the last slash begins the tag; one before it belongs to the registry's port.
    let (path, tag) = match path.rsplit_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (path, None),
    };
    if let Some(tag) = tag
        && !is_tag(tag)
    {
        return Err("the tag may have up to 128 letters, digits, '_', '.' and '-', and not begin with '.' or '-'");
    }
    if !is_host(registry) {
        return Err("the registry must be a host name or address, with a port at most");
    }
    let official = registry == "docker.io" && !path.contains('/');
    let repository = if official { format!("library/{path}") } else { path.to_owned() };
    if repository.len() + registry.len() >= NAME_LENGTH_MAX {
        return Err("the name is longer than 255 characters");
    }
    if repository.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("a repository name must be in lower case");
    }
    if !repository.split('/').all(is_component) {
        return Err(
            "each part of a repository name is lower-case letters and digits, with single '.', '_' or '-' between",
        );
    }
    let tag = match (&digest, tag) {
        (Some(_), _) => None,
        (None, tag) => Some(tag.unwrap_or("latest").to_owned()),
    };
    Ok(Reference { registry: registry.to_owned(), repository, tag, digest: digest.map(str::to_owned) })
}

/// Docker's rule: the first part is a registry if it has a dot, a colon or capitals, or is `localhost`.
fn split_registry(text: &str) -> (&str, &str) {
    let (registry, path) = match text.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => ("docker.io", text),
    };
    if registry == "index.docker.io" { ("docker.io", path) } else { (registry, path) }
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= TAG_LENGTH_MAX
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

fn is_host(host: &str) -> bool {
    let (name, port) = split_port(host);
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return false;
    }
    if let Some(v6) = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
        return v6.parse::<std::net::Ipv6Addr>().is_ok();
    }
    name.split('.').all(|label| {
        !label.is_empty()
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    })
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(part: &str) -> bool {
    let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if !edge(part.bytes().next()) || !edge(part.bytes().next_back()) {
        return false;
    }
    part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|between| matches!(between, "" | "." | "_" | "__") || between.bytes().all(|b| b == b'-'))
}

fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (host, None),
    }
}

/// Whether a host (with or without a port) is this machine by its name alone: `localhost`, 127.0.0.0/8 or `[::1]`.
pub fn is_loopback(host: &str) -> bool {
    let (name, _) = split_port(host);
    name == "localhost"
        || name == "[::1]"
        || name.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn check(text: &str, normalised: &str) {
        let parsed: Reference = text.parse().expect(text);
        assert_eq!(parsed.to_string(), normalised);
        let again: Reference = normalised.parse().expect(normalised);
        assert_eq!(again, parsed, "normalising twice changes nothing");
    }

    #[test]
    fn short_names_become_docker_hubs() {
        check("redis", "docker.io/library/redis:latest");
        check("redis:7", "docker.io/library/redis:7");
        check("user/app", "docker.io/user/app:latest");
        check("index.docker.io/library/redis", "docker.io/library/redis:latest");
        check(&format!("redis:7@{DIGEST}"), &format!("docker.io/library/redis@{DIGEST}"));
    }

    #[test]
    fn registries_keep_their_port() {
        check("127.0.0.1:5000/a/b:c", "127.0.0.1:5000/a/b:c");
        check("localhost/a", "localhost/a:latest");
        check("[::1]:5000/a", "[::1]:5000/a:latest");
        check("Registry/a", "Registry/a:latest");
        check(&format!("r.example:443/x__y/z-9@{DIGEST}"), &format!("r.example:443/x__y/z-9@{DIGEST}"));
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        let long = "a/".repeat(130) + "b";
        let id = "0".repeat(64);
        let cases = [
            "",
            ":tag",
            "/x",
            "a//b",
            "UPPER",
            "a:b:c",
            "a:",
            "a:.x",
            "a@sha256:12",
            "../x",
            "a/../b",
            "a b",
            "r.example:99999/a",
            "-r.example/a",
            "a..b",
            "a/b/",
            "[::1/a",
            &long,
            &id,
            "a@sha512:00",
            "r.example/a?x",
            "r.example/a#x",
            "a\n",
        ];
        for text in cases {
            assert!(text.parse::<Reference>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn loopback_is_known_by_name() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:1", "127.9.9.9", "[::1]", "[::1]:80"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example", "128.0.0.1", "r.example", "127.0.0.1.example"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
