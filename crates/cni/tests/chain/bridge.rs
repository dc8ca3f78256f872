//! The real plugins: a bridge with addresses of host-local and mapped ports, from the pod's side and from the host's.
//!
//! Needs root and, in the environment, `STASIS_ENGINES`: a prefix with `cni/{bridge,host-local,portmap}` and
//! `bin/{iptables,busybox}`.

use std::fs;
use std::io::Read as _;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::node::{Node, pod};
use serde_json::json;
use stasis_cni::{Cni, Config, PodNetwork, PortMapping};
use stasis_sys::process::{Setup, prepare};

/// One of the ranges for examples (RFC 5737), so that no real network is shadowed.
const SUBNET: &str = "198.51.100.0/24";

/// The first one that host-local gives out of it; `.1` is the gateway's.
const ADDRESS: &str = "198.51.100.2";

fn engines() -> PathBuf {
    std::env::var_os("STASIS_ENGINES").expect("set STASIS_ENGINES: a prefix with cni/bridge and bin/iptables").into()
}

fn path() -> String {
    format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", engines().join("bin").display())
}

/// Runs a program of the engines inside a namespace.
fn inside(netns: &Path, program: &str, args: &[&str]) -> Output {
    let mut command = Command::new(engines().join("bin").join(program));
    command.args(args).env("PATH", path());
    let namespace = fs::File::open(netns).unwrap();
    prepare(&mut command, Setup { namespaces: vec![namespace.into()], ..Setup::default() }).output().unwrap()
}

/// The bridge goes with it.
struct Bridge {
    name: String,
}

impl Bridge {
    fn exists(&self) -> bool {
        Path::new("/sys/class/net").join(&self.name).exists()
    }
}

/// Lines of the NAT rules that name a port.
fn rules(port: u16) -> Vec<String> {
    let output = Command::new(engines().join("bin/iptables-save")).args(["-t", "nat"]).output().unwrap();
    let all = String::from_utf8_lossy(&output.stdout).into_owned();
    all.lines().filter(|line| line.contains(&port.to_string())).map(str::to_owned).collect()
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let busybox = engines().join("bin/busybox");
        let _ = Command::new(&busybox).args(["ip", "link", "set", &self.name, "down"]).output();
        let _ = Command::new(&busybox).args(["ip", "link", "del", &self.name]).output();
    }
}

#[tokio::test]
async fn a_pod_on_a_bridge_is_reached_and_disconnected() {
    let node = Node::new();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let bridge = Bridge { name: format!("stasis{port}") };
    let data = node.path("addresses");
    node.configure("1.0.0", json!([
        {"type": "bridge", "bridge": bridge.name, "isGateway": true, "ipMasq": false, "hairpinMode": true,
         "ipam": {"type": "host-local", "dataDir": data, "ranges": [[{"subnet": SUBNET}]], "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}},
    ]));
    let config = Config { bin_dirs: vec![engines().join("cni")], path: Some(path().into()), ..node.config() };
    let cni = Cni::new(config.clone());
    cni.status().unwrap();

    let mut pod = pod(&node);
    pod.port_mappings =
        vec![PortMapping { host_port: port, container_port: 80, protocol: "tcp".into(), host_ip: String::new() }];
    // Whatever this finds, the rules of the host are taken back.
    let connected = tokio::spawn(look_at_the_pod(cni, pod.clone(), port)).await;

    // A daemon that comes back, a namespace that is gone.
    stasis_sys::mount::unmount_all_below(&pod.netns).unwrap();
    let later = Cni::new(config);
    let deleted = later.del(&pod.id, Some(&pod.netns)).await;
    connected.expect("the pod is connected");
    deleted.unwrap();
    let reserved =
        fs::read_dir(data.join("test")).unwrap().filter(|file| file.as_ref().unwrap().file_name() == ADDRESS);
    assert_eq!((reserved.count(), rules(port)), (0, Vec::new()));
    later.del(&pod.id, None).await.unwrap();
    assert!(bridge.exists() && later.cached().is_empty());
    assert!(data.join("test").is_dir(), "the addresses were given out from here");
}

async fn look_at_the_pod(cni: Cni, pod: PodNetwork, port: u16) {
    let added = cni.add(&pod).await.unwrap();
    assert_eq!(added.ips, [ADDRESS.parse::<IpAddr>().unwrap()]);
    assert!(added.interfaces.iter().any(|interface| interface.name == "eth0" && !interface.sandbox.is_empty()));
    let shown = inside(&pod.netns, "busybox", &["ip", "addr", "show", "eth0"]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains(ADDRESS), "{shown:?}");
    assert!(!rules(port).is_empty(), "the port is mapped");
    assert_eq!(ask_the_pod(&pod.netns, added.ips[0]), "hello");
    cni.check(&pod.id, &pod.netns).await.unwrap();
}

/// Serves one line inside the pod and fetches it from outside.
fn ask_the_pod(netns: &Path, ip: IpAddr) -> String {
    let netns = fs::File::open(netns).unwrap();
    let mut server = Command::new(engines().join("bin/busybox"));
    server.args(["nc", "-l", "-p", "80", "-e", "/bin/echo", "-n", "hello"]);
    let server = prepare(&mut server, Setup { namespaces: vec![netns.into()], ..Setup::default() }).spawn().unwrap();
    let _server = KillOnDrop(server);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
    loop {
        // Until the server listens.
        match TcpStream::connect((ip, 80)) {
            Ok(mut stream) => {
                let mut text = String::new();
                stream.read_to_string(&mut text).unwrap();
                return text;
            }
            Err(error) => assert!(std::time::Instant::now() < end, "the pod does not answer: {error}"),
        }
    }
}

struct KillOnDrop(std::process::Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
