//! The files that a pod shares with its containers: `/etc/hosts`, `/etc/hostname`, `/etc/resolv.conf`.
//!
//! They are written by us from the request, never taken from an image or an archive.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use stasis_cri_api::runtime::{DnsConfig, NamespaceMode, PodSandboxConfig};

use crate::error::{IoContext as _, Result};

/// Directory of these files below the pod's.
const DIRECTORY: &str = "files";
/// Largest host file that is taken over; the kubelet's own are far smaller.
const HOST_FILE_MAX: u64 = 1024 * 1024;

/// Paths of a pod's files on the host.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    pub(crate) hosts: PathBuf,
    pub(crate) hostname: PathBuf,
    pub(crate) resolv_conf: PathBuf,
}

impl Paths {
    pub(crate) fn of(pod_dir: &Path) -> Self {
        let dir = pod_dir.join(DIRECTORY);
        Self { hosts: dir.join("hosts"), hostname: dir.join("hostname"), resolv_conf: dir.join("resolv.conf") }
    }
}

/// Whether the pod uses the host's network.
pub(crate) fn host_network(config: &PodSandboxConfig) -> bool {
    namespaces(config).is_some_and(|options| options.network() == NamespaceMode::Node)
}

/// The pod's namespace options, if the request has any.
pub(crate) fn namespaces(config: &PodSandboxConfig) -> Option<&stasis_cri_api::runtime::NamespaceOption> {
    config.linux.as_ref()?.security_context.as_ref()?.namespace_options.as_ref()
}

/// The host name of the pod: the request's, else the host's.
pub(crate) fn hostname(config: &PodSandboxConfig) -> String {
    if config.hostname.is_empty() {
        rustix::system::uname().nodename().to_string_lossy().into_owned()
    } else {
        config.hostname.clone()
    }
}

/// Writes the files of a pod whose addresses are `ips`.
pub(crate) fn write(pod_dir: &Path, config: &PodSandboxConfig, ips: &[IpAddr]) -> Result<()> {
    let paths = Paths::of(pod_dir);
    let dir = pod_dir.join(DIRECTORY);
    std::fs::create_dir_all(&dir).doing(format_args!("make {}", dir.display()))?;
    let hostname = hostname(config);
    let hosts = if host_network(config) { host_file("/etc/hosts") } else { hosts(&hostname, ips) };
    let resolv_conf = match &config.dns_config {
        Some(dns) => resolv_conf(dns),
        None => host_file("/etc/resolv.conf"),
    };
    let files = [(paths.hosts, hosts), (paths.hostname, format!("{hostname}\n")), (paths.resolv_conf, resolv_conf)];
    for (path, text) in files {
        std::fs::write(&path, text).doing(format_args!("write {}", path.display()))?;
    }
    Ok(())
}

/// A file of the host, or nothing where it has none.
fn host_file(path: &str) -> String {
    stasis_sys::path::read_limited(Path::new(path), HOST_FILE_MAX)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

fn hosts(hostname: &str, ips: &[IpAddr]) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for ip in ips {
        let _ = writeln!(text, "{ip}\t{hostname}");
    }
    text
}

fn resolv_conf(dns: &DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_names_every_address() {
        let text = hosts("web-0", &["10.1.2.3".parse().expect("ip"), "fd00::3".parse().expect("ip")]);
        assert!(text.ends_with("10.1.2.3\tweb-0\nfd00::3\tweb-0\n"), "{text}");
    }

    #[test]
    fn resolv_conf_has_the_lines_of_the_request() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["a.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(resolv_conf(&dns), "search a.svc svc\nnameserver 10.0.0.10\noptions ndots:5\n");
    }
}
