//! Which servers stand for a registry, and in what order: containerd's `hosts.toml`, and the defaults without one.
//!
//! ```toml
//! server = "https://registry-1.docker.io"     # optional: the registry itself, tried last
//! [host."https://mirror.example"]              # mirrors for pulls, in the order of the file
//! capabilities = ["pull", "resolve"]
//! skip_verify = false
//! ca = "/etc/ssl/mirror.pem"                   # or a list
//! override_path = false                        # true: the path of the URL already holds /v2
//! ```
//! A `header` or `client` entry is refused in words, not ignored: without it the registry would answer something puzzling.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use reqwest::Url;
use serde::Deserialize;

use crate::Config;
use crate::error::{Error, Result};
use crate::reference::is_loopback;

/// Most bytes of a `hosts.toml`; a real one has a few hundred.
const HOSTS_FILE_BYTES_MAX: u64 = 1 << 20;

/// A server that holds a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// Up to and including `/v2`, without a slash at the end.
    pub(crate) base: String,
    /// Host and port as people write them, for messages.
    pub(crate) host: String,
    /// Whether this is the registry itself, which the caller's credentials are meant for.
    pub(crate) origin: bool,
    /// Whether manifests and blobs may be read here.
    pub(crate) pull: bool,
    /// How its certificate is judged.
    pub(crate) trust: Trust,
}

/// How a server's certificate is judged. The key of the pool of HTTP clients.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Trust {
    /// No TLS at all, and no proxy when the host is this machine.
    Plain {
        /// By its name, the host is this machine.
        loopback: bool,
    },
    /// The system's certificate authorities and these files.
    Authorities(Vec<PathBuf>),
    /// Any certificate, because `skip_verify` says so.
    Anyone,
}

#[derive(Deserialize)]
struct HostsFile {
    server: Option<String>,
    #[serde(flatten)]
    root: HostEntry,
    #[serde(default)]
    host: BTreeMap<String, toml::Spanned<HostEntry>>,
}

#[derive(Deserialize, Default)]
struct HostEntry {
    capabilities: Option<Vec<String>>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    override_path: bool,
    ca: Option<OneOrMore>,
    client: Option<toml::Value>,
    header: Option<toml::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(PathBuf),
    More(Vec<PathBuf>),
}

/// The servers of a registry in the order in which they are tried; the registry itself is last and always there.
pub(crate) fn endpoints(config: &Config, registry: &str) -> Result<Vec<Endpoint>> {
    if let Some(dir) = &config.hosts_dir {
        for name in directory_names(registry) {
            let path = dir.join(&name).join("hosts.toml");
            match read_limited(&path) {
                Ok(text) => return from_file(config, registry, &path, &text),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::HostsFile { path, reason: e.to_string() }),
            }
        }
    }
    Ok(vec![default_origin(config, registry)])
}

/// containerd looks for `host:port`, then `host_port_`, then `_default`.
fn directory_names(registry: &str) -> Vec<String> {
    let mut names = vec![registry.to_owned()];
    if let Some((host, port)) = registry.rsplit_once(':')
        && !port.ends_with(']')
    {
        names.push(format!("{host}_{port}_"));
    }
    names.push("_default".to_owned());
    names
}

fn read_limited(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?.take(HOSTS_FILE_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

fn default_origin(config: &Config, registry: &str) -> Endpoint {
    // Docker Hub's API does not live under its name.
    let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
    let loopback = is_loopback(host);
    let plain = loopback || config.insecure.iter().any(|insecure| insecure == registry);
    let scheme = if plain { "http" } else { "https" };
    let trust = if plain { Trust::Plain { loopback } } else { Trust::Authorities(Vec::new()) };
    Endpoint { base: format!("{scheme}://{host}/v2"), host: host.to_owned(), origin: true, pull: true, trust }
}

fn from_file(config: &Config, registry: &str, path: &Path, text: &str) -> Result<Vec<Endpoint>> {
    let fail = |reason: String| Error::HostsFile { path: path.to_owned(), reason };
    let file: HostsFile = toml::from_str(text).map_err(|e| fail(e.to_string()))?;
    let mut mirrors: Vec<_> = file.host.into_iter().collect();
    mirrors.sort_by_key(|(_, entry)| entry.span().start);

    let mut endpoints = Vec::new();
    for (url, entry) in mirrors {
        let capabilities = entry.get_ref().capabilities.clone();
        let pulls = capabilities.is_none_or(|c| ["pull", "resolve"].iter().all(|need| c.iter().any(|has| has == need)));
        if pulls {
            endpoints.push(endpoint(&url, entry.into_inner(), false).map_err(fail)?);
        }
    }
    let origin = match &file.server {
        Some(server) => endpoint(server, file.root, true).map_err(fail)?,
        None => default_origin(config, registry),
    };
    // A mirror entry for the registry's own address configures that address; it is no second party.
    for mirror in endpoints.iter_mut().filter(|mirror| mirror.base == origin.base) {
        mirror.origin = true;
    }
    if !endpoints.iter().any(|endpoint| endpoint.origin) {
        endpoints.push(origin);
    }
    Ok(endpoints)
}

fn endpoint(text: &str, entry: HostEntry, origin: bool) -> std::result::Result<Endpoint, String> {
    if entry.client.is_some() || entry.header.is_some() {
        return Err(format!(
            "{text}: client certificates and extra headers are not supported yet; remove `client` and `header`"
        ));
    }
    let with_scheme = match text.contains("://") {
        true => text.to_owned(),
        false if is_loopback(text.split('/').next().unwrap_or(text)) => format!("http://{text}"),
        false => format!("https://{text}"),
    };
    let url = Url::parse(&with_scheme).map_err(|e| format!("{text} is not a URL: {e}"))?;
    let name = url.host_str().ok_or_else(|| format!("{text} names no host"))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(format!("{text}: credentials do not belong into a host file"));
    }
    let host = match url.port() {
        Some(port) => format!("{name}:{port}"),
        None => name.to_owned(),
    };
    let trust = match url.scheme() {
        "http" => Trust::Plain { loopback: is_loopback(&host) },
        "https" if entry.skip_verify => Trust::Anyone,
        "https" => Trust::Authorities(match entry.ca {
            None => Vec::new(),
            Some(OneOrMore::One(path)) => vec![path],
            Some(OneOrMore::More(paths)) => paths,
        }),
        other => return Err(format!("{text}: {other} is not http or https")),
    };
    let host_in_url = if origin && host == "docker.io" { "registry-1.docker.io".to_owned() } else { host };
    let path = url.path().trim_end_matches('/');
    let suffix = if entry.override_path || path.ends_with("/v2") { "" } else { "/v2" };
    let base = format!("{}://{host_in_url}{path}{suffix}", url.scheme());
    Ok(Endpoint { base, host: host_in_url, origin, pull: true, trust })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bases(config: &Config, registry: &str) -> Vec<String> {
        endpoints(config, registry).expect("endpoints").into_iter().map(|e| e.base).collect()
    }

    fn with_file(host: &str, text: &str) -> (tempfile::TempDir, Config) {
        let dir = tempfile::tempdir().expect("directory");
        std::fs::create_dir(dir.path().join(host)).expect("host directory");
        std::fs::write(dir.path().join(host).join("hosts.toml"), text).expect("hosts.toml");
        let config = Config { hosts_dir: Some(dir.path().to_owned()), ..Config::default() };
        (dir, config)
    }

    #[test]
    fn without_a_file_the_name_decides() {
        let config = Config { insecure: vec!["plain.example:5000".into()], ..Config::default() };
        assert_eq!(bases(&config, "docker.io"), ["https://registry-1.docker.io/v2"]);
        assert_eq!(bases(&config, "quay.io"), ["https://quay.io/v2"]);
        assert_eq!(bases(&config, "127.0.0.1:5000"), ["http://127.0.0.1:5000/v2"]);
        assert_eq!(bases(&config, "plain.example:5000"), ["http://plain.example:5000/v2"]);
    }

    #[test]
    fn mirrors_come_in_the_order_of_the_file_and_the_server_last() {
        let text = r#"
            server = "https://docker.io"
            [host."https://z.example"]
            [host."https://a.example/proxy"]
            capabilities = ["pull", "resolve"]
            skip_verify = true
            [host."https://push.example"]
            capabilities = ["push"]
            [host."http://m.example:8080/v2/cache"]
            override_path = true
        "#;
        let (_dir, config) = with_file("docker.io", text);
        let found = endpoints(&config, "docker.io").expect("endpoints");
        let bases: Vec<&str> = found.iter().map(|e| e.base.as_str()).collect();
        assert_eq!(
            bases,
            [
                "https://z.example/v2",
                "https://a.example/proxy/v2",
                "http://m.example:8080/v2/cache",
                "https://registry-1.docker.io/v2"
            ]
        );
        assert_eq!(found.iter().map(|e| e.origin).collect::<Vec<_>>(), [false, false, false, true]);
        assert_eq!(found[1].trust, Trust::Anyone);
    }

    #[test]
    fn the_registry_itself_may_be_configured_as_a_host() {
        let (_dir, config) = with_file("r.example:444", "[host.\"https://r.example:444\"]\nca = \"/ca.pem\"\n");
        let found = endpoints(&config, "r.example:444").expect("endpoints");
        assert_eq!(found.len(), 1);
        assert!(found[0].origin);
        assert_eq!(found[0].trust, Trust::Authorities(vec!["/ca.pem".into()]));
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        for text in [
            "server = 1",
            "[host.\"https://m.example\"]\nclient = \"/key.pem\"",
            "server = \"ftp://x\"",
            "server = \"https://u:p@x\"",
        ] {
            let (_dir, config) = with_file("_default", text);
            let error = endpoints(&config, "any.example").expect_err(text).to_string();
            assert!(error.contains("_default/hosts.toml"), "{error}");
        }
    }
}
