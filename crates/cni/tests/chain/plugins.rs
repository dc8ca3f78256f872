//! Plugins that misbehave, and ones that tell what they were given: shell scripts in a real namespace.

use std::fs;
use std::time::Duration;

use crate::node::{Node, pod};
use serde_json::{Value, json};
use stasis_cni::{Bandwidth, Cni, Config, Error, PluginFailure, PortMapping};

/// A result like any other.
const RESULT: &str = r#"{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"/ns"}],"ips":[{"address":"10.9.8.7/24","interface":0}]}"#;

/// A plugin that writes down each call, environment and input, and answers an ADD with [`RESULT`].
fn recorder(node: &Node, name: &str) {
    node.plugin(name, &format!(
        r#"{{ echo "{name} $CNI_COMMAND"; env | sort; cat; echo; }} >>{log}; [ $CNI_COMMAND != ADD ] || echo '{RESULT}'"#,
        log = node.log().display()
    ));
}

/// The commands in the order in which the recorders were called: `one ADD`, `two ADD`, ….
fn calls(node: &Node) -> Vec<String> {
    let log = fs::read_to_string(node.log()).unwrap_or_default();
    let is_call = |line: &&str| {
        line.split(' ').count() == 2 && line.split(' ').nth(1).is_some_and(|word| word.chars().all(char::is_uppercase))
    };
    log.lines().filter(is_call).map(str::to_owned).collect()
}

/// What the recorders were given on their standard input.
fn inputs(node: &Node) -> Vec<Value> {
    let log = fs::read_to_string(node.log()).unwrap_or_default();
    log.lines().filter(|line| line.starts_with('{')).map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn failure(error: Error) -> PluginFailure {
    match error {
        Error::Plugin(failure) => *failure,
        other => panic!("no failure of a plugin: {other}"),
    }
}

#[tokio::test]
async fn a_chain_passes_results_on_and_is_deleted_backwards() {
    let node = Node::new();
    recorder(&node, "one");
    recorder(&node, "two");
    node.configure("1.1.0", json!([{"type": "one"}, {"type": "two", "own": 1}]));
    let pod = pod(&node);
    let added = node.cni().add(&pod).await.unwrap();
    assert_eq!(added.ips, ["10.9.8.7".parse::<std::net::IpAddr>().unwrap()]);
    node.cni().check(&pod.id, &pod.netns).await.unwrap();
    node.cni().del(&pod.id, Some(&pod.netns)).await.unwrap();
    assert_eq!(calls(&node), ["one ADD", "two ADD", "one CHECK", "two CHECK", "two DEL", "one DEL"]);

    let result: Value = serde_json::from_str(RESULT).unwrap();
    let inputs = inputs(&node);
    assert_eq!(inputs[0], json!({"cniVersion": "1.1.0", "name": "test", "type": "one"}));
    let second = json!({"cniVersion": "1.1.0", "name": "test", "type": "two", "own": 1, "prevResult": result});
    assert_eq!(inputs[1], second);
    assert!(inputs[2..].iter().all(|input| input["prevResult"] == result));
}

#[tokio::test]
async fn a_plugin_sees_the_pod_and_nothing_of_our_environment() {
    let node = Node::new();
    recorder(&node, "one");
    node.configure("1.0.0", json!([{"type": "one"}]));
    let pod = pod(&node);
    node.cni().add(&pod).await.unwrap();
    let log = fs::read_to_string(node.log()).unwrap();
    let args = format!(
        "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-1;K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID=u-1",
        pod.id
    );
    let mut names: Vec<&str> = log.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
    names.retain(|name| !["PWD", "SHLVL", "_", "OLDPWD"].contains(name) && !name.starts_with('{'));
    assert_eq!(names, ["CNI_ARGS", "CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_PATH", "PATH"]);
    assert!(log.lines().any(|line| line == args), "{log}");
    assert!(log.contains(&format!("CNI_NETNS={}\n", pod.netns.display())) && log.contains("CNI_IFNAME=eth0\n"));
    node.cni().del(&pod.id, Some(&pod.netns)).await.unwrap();
}

#[tokio::test]
async fn arguments_reach_the_plugins_that_want_them() {
    let node = Node::new();
    recorder(&node, "plain");
    recorder(&node, "ports");
    let wants = json!({"portMappings": true, "bandwidth": true, "dns": true, "ipRanges": false});
    node.configure("1.0.0", json!([{"type": "plain"}, {"type": "ports", "capabilities": wants}]));
    let mut pod = pod(&node);
    let mapping = PortMapping { host_port: 8080, container_port: 80, protocol: "tcp".into(), host_ip: String::new() };
    pod.port_mappings = vec![mapping.clone(), PortMapping { host_ip: "127.0.0.1".into(), ..mapping }];
    pod.bandwidth = Some(Bandwidth { ingress_rate: 1000, ingress_burst: 2000, ..Bandwidth::default() });
    pod.capability_args.insert("ipRanges".into(), json!([[{"subnet": "10.0.0.0/24"}]]));
    node.cni().add(&pod).await.unwrap();
    let inputs = inputs(&node);
    assert_eq!(inputs[0].get("runtimeConfig"), None);
    assert_eq!(inputs[1].get("capabilities"), None, "section 3: it must not be set");
    let ports = json!([
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"},
    ]);
    let bandwidth = json!({"ingressRate": 1000, "ingressBurst": 2000, "egressRate": 0, "egressBurst": 0});
    assert_eq!(inputs[1]["runtimeConfig"], json!({"portMappings": ports, "bandwidth": bandwidth}));
    node.cni().del(&pod.id, None).await.unwrap();
}

#[tokio::test]
async fn a_failed_add_is_taken_back_and_told_in_the_plugins_words() {
    let node = Node::new();
    recorder(&node, "one");
    let error = r#"{"cniVersion":"1.0.0","code":101,"msg":"no free address","details":"10.0.0.0/30 is full"}"#;
    node.plugin(
        "full",
        &format!(
            "echo full $CNI_COMMAND >>{}; [ $CNI_COMMAND = DEL ] || {{ echo trying >&2; echo '{error}'; exit 1; }}",
            node.log().display()
        ),
    );
    recorder(&node, "three");
    node.configure("1.0.0", json!([{"type": "one"}, {"type": "full"}, {"type": "three"}]));
    let pod = pod(&node);
    let failure = failure(node.cni().add(&pod).await.unwrap_err());
    assert_eq!((failure.plugin.as_str(), failure.command.as_str(), failure.code), ("full", "ADD", Some(101)));
    assert_eq!((failure.message.as_str(), failure.stderr.as_str()), ("no free address", "trying"));
    let words = failure.to_string();
    for part in ["full", "ADD", "test", &pod.id, "no free address", "10.0.0.0/30 is full", "101", "trying"] {
        assert!(words.contains(part), "{part:?} is not in {words:?}");
    }
    assert_eq!(calls(&node), ["one ADD", "full ADD", "three DEL", "full DEL", "one DEL"]);
    assert!(node.cni().cached().is_empty());
}

#[tokio::test]
async fn what_cannot_be_taken_back_is_kept_for_another_try() {
    let node = Node::new();
    let broken = node.path("broken");
    fs::write(&broken, "").unwrap();
    node.plugin("bad", &format!("[ $CNI_COMMAND = DEL ] && [ ! -e {} ] && exit 0; exit 3", broken.display()));
    recorder(&node, "two");
    node.configure("1.0.0", json!([{"type": "bad"}, {"type": "two"}]));
    let pod = pod(&node);
    let failure = failure(node.cni().add(&pod).await.unwrap_err());
    assert!(failure.message.contains("3") && failure.not_undone.contains("DEL"), "{failure}");
    assert_eq!(node.cni().cached(), [pod.id.as_str()]);
    assert!(matches!(node.cni().add(&pod).await, Err(Error::InvalidArgument(_))), "not before it was deleted");
    assert!(node.cni().del(&pod.id, Some(&pod.netns)).await.is_err());
    assert_eq!(calls(&node), ["two DEL", "two DEL"], "one failing plugin does not keep the others from deleting");
    fs::remove_file(&broken).unwrap();
    node.cni().del(&pod.id, Some(&pod.netns)).await.unwrap();
    assert!(node.cni().cached().is_empty());
    node.cni().del(&pod.id, Some(&pod.netns)).await.expect("a second time is no error");
}

#[tokio::test]
async fn a_hanging_plugin_is_killed_and_its_words_are_kept() {
    let node = Node::new();
    node.plugin("slow", "[ $CNI_COMMAND = DEL ] && exit; echo waiting for a lock >&2; sleep 1000; echo never");
    node.configure("1.0.0", json!([{"type": "slow"}]));
    let cni = Cni::new(Config { plugin_timeout: Duration::from_millis(300), ..node.config() });
    let failure = failure(cni.add(&pod(&node)).await.unwrap_err());
    assert!(failure.message.contains("killed after 0.3 s"), "{failure}");
    assert_eq!((failure.stderr.as_str(), failure.not_undone.as_str()), ("waiting for a lock", ""));
}

#[tokio::test]
async fn garbage_is_no_result() {
    let node = Node::new();
    node.configure("1.0.0", json!([{"type": "odd"}]));
    for (script, wanted) in [
        ("echo hello", "hello"),
        ("true", "not a JSON object"),
        ("echo '[]'", "not a JSON object"),
        (r#"echo '{"ips":[{"address":"nowhere"}]}'"#, "nowhere"),
        ("echo '{\"oops\"'; exit 1", "oops"),
        ("yes", "more than"),
    ] {
        node.plugin("odd", &format!("[ $CNI_COMMAND = DEL ] && exit; {script}"));
        let failure = failure(node.cni().add(&pod(&node)).await.unwrap_err());
        assert!(failure.message.contains(wanted), "{script}: {failure}");
        assert!(node.cni().cached().is_empty());
    }
}

#[tokio::test]
async fn what_was_added_is_deleted_as_it_was_added_whatever_changes() {
    let node = Node::new();
    recorder(&node, "one");
    recorder(&node, "other");
    node.configure("1.0.0", json!([{"type": "one", "own": 1}]));
    let mut pod = pod(&node);
    pod.uid = "u-2".into();
    let added = node.cni().add(&pod).await.unwrap();

    node.configure("1.0.0", json!([{"type": "other"}]));
    let later = node.cni();
    assert_eq!(later.cached(), [pod.id.as_str()]);
    assert_eq!(later.result(&pod.id).await.unwrap(), Some(added));
    fs::remove_file(node.conf_file()).unwrap();
    later.del(&pod.id, Some(&node.path("gone"))).await.unwrap();
    assert_eq!(calls(&node), ["one ADD", "one DEL"]);
    assert_eq!(inputs(&node)[1]["own"], 1);
    let log = fs::read_to_string(node.log()).unwrap();
    assert!(log.contains("CNI_NETNS=\n") && log.matches("K8S_POD_UID=u-2").count() == 2, "{log}");
    assert_eq!(later.result(&pod.id).await.unwrap(), None);
}

#[tokio::test]
async fn garbage_collection_deletes_the_invalid_and_names_the_valid() {
    let node = Node::new();
    recorder(&node, "one");
    node.configure("1.1.0", json!([{"type": "one"}]));
    let (keep, mut go) = (pod(&node), pod(&node));
    go.id = "gone-pod".into();
    let cni = node.cni();
    cni.add(&keep).await.unwrap();
    cni.add(&go).await.unwrap();
    cni.gc(std::slice::from_ref(&keep.id)).await.unwrap();
    assert_eq!(cni.cached(), [keep.id.as_str()]);
    assert_eq!(calls(&node), ["one ADD", "one ADD", "one DEL", "one GC"]);
    let valid = json!([{"containerID": keep.id, "ifname": "eth0"}]);
    assert_eq!(inputs(&node)[3]["cni.dev/valid-attachments"], valid);
    cni.del(&keep.id, None).await.unwrap();
}

#[tokio::test]
async fn bad_arguments_reach_no_plugin() {
    let node = Node::new();
    recorder(&node, "one");
    node.configure("1.0.0", json!([{"type": "one"}]));
    let cni = node.cni();
    let good = pod(&node);
    for bad in [
        stasis_cni::PodNetwork { id: "../x".into(), ..good.clone() },
        stasis_cni::PodNetwork { name: "a;K8S_POD_UID=x".into(), ..good.clone() },
        stasis_cni::PodNetwork { netns: "/etc/passwd".into(), ..good.clone() },
        stasis_cni::PodNetwork { netns: node.path("none"), ..good.clone() },
    ] {
        assert!(matches!(cni.add(&bad).await, Err(Error::InvalidArgument(_))), "{bad:?}");
    }
    assert!(cni.del("../x", None).await.is_err());
    assert!(calls(&node).is_empty() && cni.cached().is_empty());
}

#[tokio::test]
async fn readiness_names_what_is_missing() {
    let node = Node::new();
    let cni = node.cni();
    assert!(cni.status().unwrap_err().reason.contains("install a network add-on"));
    assert!(matches!(cni.add(&pod(&node)).await, Err(Error::NotReady(_))));
    node.configure("1.0.0", json!([{"type": "one"}, {"type": "absent"}]));
    recorder(&node, "one");
    let reason = cni.status().unwrap_err().reason;
    assert!(reason.contains("absent") && reason.contains("test"), "{reason}");
    recorder(&node, "absent");
    let info = cni.status().unwrap();
    assert_eq!((info.name.as_str(), info.cni_version.as_str(), info.file), ("test", "1.0.0", node.conf_file()));
    assert_eq!(info.plugins, ["one", "absent"]);
}
