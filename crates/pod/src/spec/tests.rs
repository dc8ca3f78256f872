//! Specifications of whole containers, as snapshots, and properties of the checks.

use std::collections::HashMap;
use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::Value;
use stasis_cri_api::runtime::security_profile::ProfileType;
use stasis_cri_api::runtime::{
    Capability, ContainerMetadata, Device, HugepageLimit, ImageSpec, Int64Value, KeyValue, LinuxContainerConfig,
    LinuxPodSandboxConfig, Mount, MountPropagation, NamespaceMode, NamespaceOption, PodSandboxMetadata,
    SecurityProfile,
};

use super::*;

pub(super) fn host() -> HostFacts {
    HostFacts {
        oom_score_adj_floor: 0,
        seccomp: true,
        apparmor: false,
        apparmor_default: false,
        selinux: false,
        kernel: (6, 18),
        capabilities: u64::MAX,
        swap_accounting: true,
        hugetlb: true,
    }
}

pub(super) fn pod() -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: "web".into(),
            uid: "0b8e".into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: "web-1".into(),
        log_directory: "/var/log/pods/default_web_0b8e".into(),
        ..Default::default()
    }
}

fn container() -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: "app".into(), attempt: 0 }),
        image: Some(ImageSpec {
            image: "sha256:aa".into(),
            user_specified_image: "example.org/app:1".into(),
            ..Default::default()
        }),
        log_path: "app/0.log".into(),
        ..Default::default()
    }
}

fn image() -> ImageConfiguration {
    serde_json::from_value(serde_json::json!({
        "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []},
        "config": {
            "User": "app", "Env": ["LANG=C", "PATH=/bin"], "Entrypoint": ["/app"], "Cmd": ["serve"], "WorkingDir": "/srv",
        },
    }))
    .unwrap()
}

fn joined() -> Namespaces {
    let path = |kind: &str| Some(PathBuf::from(format!("/run/stasis/pods/p1/ns/{kind}")));
    Namespaces { net: path("net"), ipc: path("ipc"), uts: path("uts"), pid: PidNamespace::Private }
}

pub(super) fn spec<'a>(
    pod: &'a PodSandboxConfig,
    config: &'a ContainerConfig,
    change: impl FnOnce(&mut ContainerInput<'a>),
) -> Result<Spec> {
    static IMAGE: LazyLock<ImageConfiguration> = LazyLock::new(image);
    static HOST: LazyLock<HostFacts> = LazyLock::new(host);
    let file = |name: &str| Some(PathBuf::from(format!("/run/stasis/pods/p1/{name}")));
    let mut input = ContainerInput {
        id: "c1",
        pod_id: "p1",
        pod,
        config,
        image: &IMAGE,
        passwd: Some(b"root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/:/bin/sh\n"),
        group: Some(b"app:x:1001:\ndisk:x:6:app\n"),
        namespaces: joined(),
        volumes: PathBuf::from("/run/stasis/pods/p1/volumes/c1"),
        cdi: Default::default(),
        cgroups_path: "/kubepods/p1/c1".into(),
        cgroup_v2: true,
        files: PodFiles {
            hosts: file("hosts"),
            hostname: file("hostname"),
            resolv_conf: file("resolv.conf"),
            shm: file("shm"),
        },
        criu_config: PathBuf::from("/run/stasis/pods/p1/criu.conf"),
        host: &HOST,
        privileged_without_host_devices: false,
    };
    change(&mut input);
    container_spec(&input)
}

pub(super) fn with_context(context: LinuxContainerSecurityContext) -> ContainerConfig {
    let linux = LinuxContainerConfig { security_context: Some(context), resources: None };
    ContainerConfig { linux: Some(linux), ..container() }
}

pub(super) fn privileged_pod() -> PodSandboxConfig {
    let context = LinuxSandboxSecurityContext { privileged: true, ..Default::default() };
    PodSandboxConfig {
        linux: Some(LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() }),
        ..pod()
    }
}

/// JSON of a specification in a fixed order; of the seccomp filter only what is short.
fn check(name: &str, spec: &Spec) {
    let mut json = sorted(serde_json::to_value(spec).unwrap());
    if let Some(seccomp) = json["linux"].get_mut("seccomp") {
        let rules = seccomp["syscalls"].as_array().map_or(0, Vec::len);
        seccomp["syscalls"] = format!("{} rules", if rules > 10 { "more than 10" } else { "too few" }).into();
        // The filter of another machine has other architectures.
        seccomp["architectures"] = "those of this machine".into();
    }
    insta::with_settings!({ omit_expression => true, prepend_module_to_snapshot => false }, {
        insta::assert_snapshot!(name, serde_json::to_string_pretty(&json).unwrap());
    });
}

/// Keys in order, and sets, which OCI writes as lists, too.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.into_iter().collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().map(|(k, v)| (k, sorted(v))).collect())
        }
        Value::Array(mut list) if list.iter().any(|v| v.as_str().is_some_and(|s| s.starts_with("CAP_"))) => {
            list.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
            Value::Array(list)
        }
        Value::Array(list) => Value::Array(list.into_iter().map(sorted).collect()),
        other => other,
    }
}

#[test]
fn minimal() {
    check("minimal", &spec(&pod(), &container(), |_| {}).unwrap());
}

#[test]
fn privileged() {
    let config = with_context(LinuxContainerSecurityContext { privileged: true, ..Default::default() });
    let spec_ = spec(&privileged_pod(), &config, |input| input.privileged_without_host_devices = true).unwrap();
    check("privileged", &spec_);
    assert!(spec(&pod(), &config, |_| {}).is_err(), "a privileged container in a pod that is not");
    let with_devices = spec(&privileged_pod(), &config, |_| {}).unwrap();
    let nodes = with_devices.linux().as_ref().unwrap().devices().as_ref().unwrap();
    assert!(nodes.iter().any(|n| n.path().to_str() == Some("/dev/zero")));
}

#[test]
fn full_security_context() {
    let context = LinuxContainerSecurityContext {
        capabilities: Some(Capability {
            add_capabilities: vec!["NET_ADMIN".into()],
            drop_capabilities: vec!["ALL".into()],
            add_ambient_capabilities: vec!["CAP_NET_BIND_SERVICE".into()],
        }),
        run_as_user: Some(Int64Value { value: 1000 }),
        run_as_group: Some(Int64Value { value: 3000 }),
        supplemental_groups: vec![4000],
        readonly_rootfs: true,
        no_new_privs: true,
        masked_paths: vec!["/proc/kcore".into()],
        readonly_paths: vec!["/proc/sys".into()],
        seccomp: Some(SecurityProfile { profile_type: ProfileType::Unconfined.into(), localhost_ref: String::new() }),
        apparmor: Some(SecurityProfile {
            profile_type: ProfileType::Localhost.into(),
            localhost_ref: "localhost/web".into(),
        }),
        ..Default::default()
    };
    let mut config = with_context(context);
    config.linux.as_mut().unwrap().resources = Some(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 1 << 28,
        memory_swap_limit_in_bytes: 1 << 28,
        oom_score_adj: -998,
        cpuset_cpus: "0-1".into(),
        cpuset_mems: "0".into(),
        hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit: 0 }],
        unified: HashMap::from([("memory.high".into(), "1000000".into())]),
    });
    config.tty = true;
    config.command = vec!["/run".into()];
    config.working_dir = "/work".into();
    config.envs = vec![KeyValue { key: "LANG".into(), value: b"de".to_vec() }];
    let labelled = HostFacts { apparmor: true, selinux: true, ..host() };
    let pod = pod();
    check("full_security_context", &spec(&pod, &config, |input| input.host = &labelled).unwrap());
}

#[test]
fn host_namespaces() {
    let spec = spec(&pod(), &container(), |input| {
        input.namespaces = Namespaces { net: None, ipc: None, uts: None, pid: PidNamespace::Host };
        input.files.shm = None;
        input.cgroup_v2 = false;
    });
    check("host_namespaces", &spec.unwrap());
}

#[test]
fn mounts_and_devices() {
    let mount =
        |to: &str, from: &str| Mount { container_path: to.into(), host_path: from.into(), ..Default::default() };
    let mut config = container();
    config.mounts = vec![
        mount("/data/deep/er", "/b"),
        Mount { propagation: MountPropagation::PropagationBidirectional.into(), ..mount("/data//", "/a") },
        Mount { readonly: true, recursive_read_only: true, ..mount("/etc/hosts", "/c/hosts") },
        Mount { readonly: true, mount_options: vec!["noexec".into(), "nosuid".into()], ..mount("/x", "/first") },
        mount("/x", "/last"),
        mount("/dev", "/dev"),
    ];
    config.devices =
        vec![Device { container_path: "/dev/void".into(), host_path: "/dev/null".into(), permissions: "rw".into() }];
    check("mounts_and_devices", &spec(&pod(), &config, |_| {}).unwrap());
    for bad in ["", "data", "/", "/a/../b", "/./"] {
        config.mounts = vec![mount(bad, "/a")];
        assert!(spec(&pod(), &config, |_| {}).is_err(), "{bad:?}");
    }
}

/// Neither the request's annotations nor the image's labels reach the OCI runtime (CVE-2026-53492, CVE-2026-53488).
#[test]
fn annotations_of_the_request_stay_out() {
    let mut config = container();
    config.annotations = HashMap::from([
        ("org.criu.config".into(), "/tmp/evil".into()),
        ("run.oci.keep_original_groups".into(), "1".into()),
        ("io.stasis.x".into(), "y".into()),
    ]);
    config.labels = HashMap::from([("io.kubernetes.cri.sandbox-id".into(), "other".into())]);
    let spec = spec(&pod(), &config, |_| {}).unwrap();
    let annotations = spec.annotations().as_ref().unwrap();
    assert_eq!(annotations["org.criu.config"], "/run/stasis/pods/p1/criu.conf");
    assert_eq!(annotations["io.kubernetes.cri.sandbox-id"], "p1");
    assert_eq!(annotations.len(), 8);
}

#[test]
fn exec_runs_beside_the_first_process() {
    let ambient = Capability { add_ambient_capabilities: vec!["KILL".into()], ..Default::default() };
    let config = with_context(LinuxContainerSecurityContext { capabilities: Some(ambient), ..Default::default() });
    let spec = spec(&pod(), &config, |_| {}).unwrap();
    let process = exec_process(&spec, &["id".to_owned()], true);
    assert_eq!(process.args().as_deref(), Some(&["id".to_owned()][..]));
    assert_eq!(process.terminal(), Some(true));
    assert_eq!(process.user().uid(), 1000);
    assert_eq!(process.cwd(), spec.process().as_ref().unwrap().cwd());
    assert!(process.env().as_ref().unwrap().contains(&"TERM=xterm".to_owned()));
    let sets = process.capabilities().as_ref().unwrap();
    assert!(sets.inheritable().as_ref().unwrap().is_empty());
    assert!(sets.ambient().as_ref().unwrap().is_empty());
    assert!(!sets.bounding().as_ref().unwrap().is_empty());
}

#[test]
fn mount_sources_are_resolved_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().canonicalize().unwrap().join("real");
    std::fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
    let mut config = container();
    let source = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    config.mounts = vec![Mount { container_path: "/x".into(), host_path: source("link"), ..Default::default() }];
    resolve_mount_sources(&mut config).unwrap();
    assert_eq!(config.mounts[0].host_path, real.to_str().unwrap());
    config.mounts[0].host_path = source("absent");
    assert!(resolve_mount_sources(&mut config).unwrap_err().to_string().contains("absent"));
}

#[test]
fn valid_requests_pass() {
    validate_pod(&pod()).unwrap();
    validate_pod(&privileged_pod()).unwrap();
    validate_container(&container()).unwrap();
}

fn pod_error(change: impl FnOnce(&mut PodSandboxConfig)) -> String {
    let mut config = pod();
    change(&mut config);
    validate_pod(&config).expect_err("must be refused").to_string()
}

fn container_error(change: impl FnOnce(&mut ContainerConfig)) -> String {
    let mut config = container();
    change(&mut config);
    validate_container(&config).expect_err("must be refused").to_string()
}

/// The words of the errors that people meet.
#[test]
fn error_texts() {
    let sysctl = |name: &str, value: &str| {
        pod_error(|p| {
            let sysctls = HashMap::from([(name.to_owned(), value.to_owned())]);
            p.linux = Some(LinuxPodSandboxConfig { sysctls, ..Default::default() });
        })
    };
    let texts = [
        pod_error(|p| p.metadata = None),
        pod_error(|p| p.hostname = "a\nb".into()),
        sysctl("kernel.core_pattern", "x"),
        sysctl("net.ipv4.ip_forward", "1+2"),
        container_error(|c| c.image = None),
        container_error(|c| c.log_path = "../../etc/cron.d/x".into()),
        container_error(|c| c.mounts = vec![Mount { container_path: "x".into(), ..Default::default() }]),
        super::cdi::refused(stasis_cdi::Registry::new(Vec::new()).edits(["v.com/gpu=1"]).unwrap_err()).to_string(),
        spec(&pod(), &container(), |i| i.passwd = None).unwrap_err().to_string(),
    ];
    insta::with_settings!({ omit_expression => true, prepend_module_to_snapshot => false }, {
        insta::assert_snapshot!("error_texts", texts.join("\n"));
    });
}

#[test]
fn what_would_touch_the_host_is_refused() {
    let sysctl = |name: &str, options: NamespaceOption| {
        let sysctls = HashMap::from([(name.to_owned(), "1".to_owned())]);
        let context = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let linux = LinuxPodSandboxConfig { sysctls, security_context: Some(context), ..Default::default() };
        validate_pod(&PodSandboxConfig { linux: Some(linux), ..pod() })
    };
    let node = i32::from(NamespaceMode::Node);
    sysctl("net.ipv4.ip_forward", NamespaceOption::default()).unwrap();
    sysctl("kernel.shm_rmid_forced", NamespaceOption::default()).unwrap();
    sysctl("net.ipv4.ip_forward", NamespaceOption { network: node, ..Default::default() }).unwrap_err();
    sysctl("kernel.sem", NamespaceOption { ipc: node, ..Default::default() }).unwrap_err();
    for name in ["vm.swappiness", "kernel.semx", "net/ipv4/x", "net..x", "net.../../x", "net", "fs.mqueue", "net.a\n.b"]
    {
        sysctl(name, NamespaceOption::default()).unwrap_err();
    }
    for permissions in ["", "x", "rr", "rwmr", "RW"] {
        container_error(|c| {
            c.devices = vec![Device {
                container_path: "/dev/x".into(),
                host_path: "/dev/null".into(),
                permissions: permissions.into(),
            }];
        });
    }
    for path in ["/etc/passwd", "..", "a/../../b", "a\0b"] {
        container_error(|c| c.log_path = path.into());
    }
    for key in ["", "A=B", "A\n"] {
        container_error(|c| c.envs = vec![KeyValue { key: key.into(), value: vec![] }]);
    }
}

proptest! {
    /// What passes as a host name can stand in `/etc/hosts` and `/etc/hostname` as one word.
    #[test]
    fn host_names_are_one_word(hostname in "\\PC{0,70}|[a-z0-9.\\-\n:]{0,70}") {
        if validate_pod(&PodSandboxConfig { hostname: hostname.clone(), ..pod() }).is_ok() {
            prop_assert!(hostname.len() <= 64);
            prop_assert!(hostname.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.'));
        }
    }

    /// What passes as a log path stays below the log directory.
    #[test]
    fn log_paths_stay_below(path in "[a./\0]{0,12}") {
        if validate_container(&ContainerConfig { log_path: path.clone(), ..container() }).is_ok() {
            prop_assert!(!path.starts_with('/') && path.split('/').all(|p| p != "..") && !path.contains('\0'));
        }
    }

    /// Whatever mounts a request has, the container keeps a `/proc`, and no destination climbs or comes twice.
    #[test]
    fn destinations_are_clean(paths in proptest::collection::vec("(/(a|b|\\.|proc|dev|sys)?){1,4}", 0..8)) {
        let mount = |p: &String| Mount { container_path: p.clone(), host_path: "/h".into(), ..Default::default() };
        let config = ContainerConfig { mounts: paths.iter().map(mount).collect(), ..container() };
        if let Ok(spec) = spec(&pod(), &config, |_| {}) {
            let all = spec.mounts().clone().unwrap_or_default();
            let mut seen = HashSet::new();
            prop_assert!(all.iter().all(|m| seen.insert(m.destination().clone())));
            prop_assert!(seen.contains(&PathBuf::from("/proc")));
            let depths: Vec<usize> = all.iter().map(|m| m.destination().components().count()).collect();
            prop_assert!(depths.is_sorted());
        }
    }
}
