//! What a container is and sees: user, capabilities, confinement, files, mounts, namespaces, limits.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use stasis_cri_api::runtime::security_profile::ProfileType;
use stasis_cri_api::runtime::*;
use stasis_e2e::{Stage, check, eventually, shell};
use tonic::Code;
use xtask::cri::{Container, Pod, refusal};
use xtask::node::Setup;

/// containerd's default capabilities.
const DEFAULT_CAPABILITIES: u64 = 0xa804_25fb;
const CAP_NET_ADMIN: u64 = 12;
const CAP_CHOWN: u64 = 0;

const SLEEP: &str = "exec sleep 1000";

#[test]
fn a_container_is_what_its_security_context_says() {
    check("secure", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("pod").await?;
        default_is_confined(stage, &pod).await?;
        users_and_groups(stage, &pod).await?;
        capabilities(stage, &pod).await?;
        seccomp_and_new_privileges(stage, &pod).await?;
        privileged(stage, &pod).await?;
        read_only_root(stage, &pod).await?;
        mounts(stage, &pod).await?;
        limits(stage, &pod).await?;
        terminal(stage, &pod).await?;
        stage.remove(&pod).await
    });
}

/// Starts a sleeping container whose security context was changed.
async fn with(
    stage: &mut Stage,
    pod: &Pod,
    name: &str,
    change: impl FnOnce(&mut LinuxContainerSecurityContext),
) -> Result<Container> {
    let mut config = shell(name, SLEEP);
    change(context(&mut config)?);
    stage.container(pod, config).await
}

fn context(config: &mut ContainerConfig) -> Result<&mut LinuxContainerSecurityContext> {
    let linux = config.linux.as_mut().context("no Linux part")?;
    linux.security_context.as_mut().context("no security context")
}

/// A field of `/proc/1/status`, as seen inside: of the container's own process, not of what is executed beside it.
async fn field(stage: &mut Stage, container: &Container, name: &str) -> Result<String> {
    let status = stage.sh(container, "cat /proc/1/status").await?;
    in_status(&status, name)
}

fn in_status(status: &str, name: &str) -> Result<String> {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(value.with_context(|| format!("no {name} in {status}"))?.split_whitespace().collect::<Vec<_>>().join(" "))
}

async fn set(stage: &mut Stage, container: &Container, name: &str) -> Result<u64> {
    Ok(u64::from_str_radix(&field(stage, container, name).await?, 16)?)
}

async fn default_is_confined(stage: &mut Stage, pod: &Pod) -> Result<()> {
    let container = with(stage, pod, "default", |_| ()).await?;
    assert_eq!(set(stage, &container, "CapEff").await?, DEFAULT_CAPABILITIES);
    assert_eq!(set(stage, &container, "CapBnd").await?, DEFAULT_CAPABILITIES);
    assert_eq!(set(stage, &container, "CapInh").await?, 0);
    assert_eq!(field(stage, &container, "Seccomp").await?, "2", "the default profile filters");
    assert_eq!(stage.sh(&container, "ls /proc/1/fd | xargs").await?, "0 1 2");
    assert_eq!(stage.sh(&container, "cat /proc/kcore | wc -c; ls /sys/firmware | wc -l").await?, "0\n0");
    let written = stage.sh(&container, "echo 1 2>/dev/null > /proc/sys/kernel/panic || echo refused").await?;
    assert_eq!(written, "refused");
    assert_eq!(stage.sh(&container, "mkdir /sys/fs/x 2>/dev/null || echo refused").await?, "refused");
    let devices =
        stage.sh(&container, "ls /dev | grep -Ev '^(fd|stdin|stdout|stderr|core|ptmx|pts|shm|mqueue)$' | xargs");
    assert_eq!(devices.await?, "full null random tty urandom zero");
    let made = stage.sh(&container, "mknod /disk b 8 0 && cat /disk 2>&1 >/dev/null | grep -o 'not permitted'; true");
    assert_eq!(made.await?, "not permitted", "the device filter");
    stage.node.cri.remove(&container).await
}

async fn users_and_groups(stage: &mut Stage, pod: &Pod) -> Result<()> {
    let by_name = with(stage, pod, "name", |context| {
        context.run_as_username = "redis".into();
        context.supplemental_groups = vec![1234, 77];
    });
    let by_name = by_name.await?;
    assert_eq!(field(stage, &by_name, "Uid").await?, "999 999 999 999");
    assert_eq!(field(stage, &by_name, "Gid").await?, "999 999 999 999");
    assert_eq!(groups(&field(stage, &by_name, "Groups").await?), [77, 999, 1234]);
    assert_eq!(set(stage, &by_name, "CapEff").await?, 0, "a user keeps no capabilities of root's");
    assert_eq!(stage.sh(&by_name, "id -un; echo $HOME").await?, "redis\n/data");

    let by_number = with(stage, pod, "number", |context| {
        context.run_as_user = Some(Int64Value { value: 4711 });
        context.run_as_group = Some(Int64Value { value: 4712 });
    });
    let by_number = by_number.await?;
    assert_eq!(field(stage, &by_number, "Uid").await?, "4711 4711 4711 4711");
    assert_eq!(field(stage, &by_number, "Gid").await?, "4712 4712 4712 4712");
    assert_eq!(groups(&field(stage, &by_number, "Groups").await?), [4712]);
    stage.node.cri.remove(&by_name).await?;
    stage.node.cri.remove(&by_number).await
}

fn groups(text: &str) -> Vec<u32> {
    let mut groups: Vec<u32> = text.split(' ').filter_map(|group| group.parse().ok()).collect();
    groups.sort_unstable();
    groups
}

async fn capabilities(stage: &mut Stage, pod: &Pod) -> Result<()> {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let cases = [
        (words(&["NET_ADMIN"]), words(&["CHOWN"]), DEFAULT_CAPABILITIES & !(1 << CAP_CHOWN) | 1 << CAP_NET_ADMIN),
        (words(&["CAP_NET_ADMIN"]), words(&["ALL"]), 1 << CAP_NET_ADMIN),
        (vec![], words(&["ALL"]), 0),
    ];
    for (number, (add, drop, expected)) in cases.into_iter().enumerate() {
        let name = format!("caps-{number}");
        let container = with(stage, pod, &name, |context| {
            context.capabilities =
                Some(Capability { add_capabilities: add, drop_capabilities: drop, ..Capability::default() });
        });
        let container = container.await?;
        assert_eq!(set(stage, &container, "CapEff").await?, expected, "case {number}");
        stage.node.cri.remove(&container).await?;
    }
    Ok(())
}

async fn seccomp_and_new_privileges(stage: &mut Stage, pod: &Pod) -> Result<()> {
    let open = with(stage, pod, "open", |context| {
        context.no_new_privs = true;
        context.seccomp =
            Some(SecurityProfile { profile_type: ProfileType::Unconfined.into(), ..SecurityProfile::default() });
    });
    let open = open.await?;
    assert_eq!(field(stage, &open, "Seccomp").await?, "0");
    assert_eq!(field(stage, &open, "NoNewPrivs").await?, "1");
    stage.node.cri.remove(&open).await
}

async fn privileged(stage: &mut Stage, ordinary: &Pod) -> Result<()> {
    let (code, message) = refusal(with(stage, ordinary, "privileged", |context| context.privileged = true).await)?;
    assert_eq!(code, Code::InvalidArgument);
    assert!(message.contains("privileged"), "{message}");
    let mut config = stage.node.pod_config("privileged");
    let linux = config.linux.as_mut().context("no Linux part")?;
    linux.security_context.as_mut().context("no security context")?.privileged = true;
    let pod = stage.node.cri.run_pod(config).await?;
    let container = with(stage, &pod, "privileged", |context| context.privileged = true).await?;
    let own = in_status(&fs::read_to_string("/proc/self/status")?, "CapEff")?;
    assert_eq!(field(stage, &container, "CapEff").await?, own, "all that this host gives");
    assert_eq!(field(stage, &container, "Seccomp").await?, "0");
    assert_eq!(set(stage, &container, "CapInh").await?, 0);
    let panic = fs::read_to_string("/proc/sys/kernel/panic")?;
    stage.sh(&container, &format!("echo {} > /proc/sys/kernel/panic", panic.trim())).await?;
    stage.remove(&pod).await
}

async fn read_only_root(stage: &mut Stage, pod: &Pod) -> Result<()> {
    let container = with(stage, pod, "read-only", |context| context.readonly_rootfs = true).await?;
    let written =
        stage.sh(&container, "touch /x 2>/dev/null || echo refused; touch /dev/shm/x && echo written").await?;
    assert_eq!(written, "refused\nwritten");
    stage.node.cri.remove(&container).await
}

async fn mounts(stage: &mut Stage, pod: &Pod) -> Result<()> {
    let dir = stage.node.ground.disk.join("mounted");
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("file"), "from the host")?;
    let mount = |path: &str, readonly| Mount {
        container_path: path.into(),
        host_path: dir.display().to_string(),
        readonly,
        ..Mount::default()
    };
    let mut config = shell("mounts", SLEEP);
    config.mounts = vec![mount("/rw", false), mount("/ro", true)];
    let container = stage.container(pod, config).await?;
    let script = "cat /ro/file; echo; touch /ro/x 2>/dev/null || echo refused; echo new > /rw/new";
    assert_eq!(stage.sh(&container, script).await?, "from the host\nrefused");
    assert_eq!(fs::read_to_string(dir.join("new"))?, "new\n");
    stage.node.cri.remove(&container).await
}

async fn limits(stage: &mut Stage, pod: &Pod) -> Result<()> {
    const LIMIT: i64 = 64 << 20;
    let mut config = shell("limits", SLEEP);
    config.linux.as_mut().context("no Linux part")?.resources =
        Some(LinuxContainerResources { memory_limit_in_bytes: LIMIT, ..LinuxContainerResources::default() });
    let container = stage.container(pod, config).await?;
    let groups = fs::read_to_string(stage.process(&container).await?.join("cgroup"))?;
    let path = |controller: &str| {
        let line = groups.lines().find(|line| line.split(':').nth(1).is_some_and(|names| names == controller))?;
        line.splitn(3, ':').nth(2).map(|path| path.trim_start_matches('/').to_owned())
    };
    let file = match path("memory") {
        Some(path) => Path::new("/sys/fs/cgroup/memory").join(path).join("memory.limit_in_bytes"),
        None => Path::new("/sys/fs/cgroup").join(path("").context("no cgroup")?).join("memory.max"),
    };
    assert_eq!(fs::read_to_string(file)?.trim(), LIMIT.to_string());

    // The kernel ends what exceeds it, and the status says so.
    let mut config = shell("greedy", "x=a; while :; do x=$x$x; done");
    config.linux.as_mut().context("no Linux part")?.resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: LIMIT,
        memory_swap_limit_in_bytes: LIMIT,
        ..LinuxContainerResources::default()
    });
    let greedy = stage.container(pod, config).await?;
    let status = stage.exited(&greedy).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    stage.node.cri.remove(&greedy).await?;
    stage.node.cri.remove(&container).await
}

async fn terminal(stage: &mut Stage, pod: &Pod) -> Result<()> {
    let mut config = shell("terminal", "tty; echo to err >&2; exec sleep 1000");
    config.tty = true;
    let container = stage.container(pod, config).await?;
    let lines = async || Ok(Some(fs::read_to_string(&container.log)?).filter(|text| text.lines().count() == 2));
    let text = eventually("what the terminal shows", lines).await?;
    assert!(text.contains(" stdout F /dev/pts/0"), "{text}");
    assert!(text.contains(" stdout F to err"), "a terminal is one stream: {text}");
    stage.node.cri.remove(&container).await
}

#[test]
fn a_pod_shares_what_it_says() {
    check("shares", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        files_of_the_pod(stage).await?;
        shared_processes(stage).await?;
        modes_of_the_host(stage).await
    });
}

async fn files_of_the_pod(stage: &mut Stage) -> Result<()> {
    let mut config = stage.node.pod_config("files");
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.0.0.10".into()],
        searches: vec!["a.svc".into(), "svc".into()],
        options: vec!["ndots:5".into()],
    });
    let pod = stage.node.cri.run_pod(config).await?;
    let (one, two) = (stage.script(&pod, "one", SLEEP).await?, stage.script(&pod, "two", SLEEP).await?);
    assert_eq!(stage.sh(&one, "hostname; cat /etc/hostname").await?, "files\nfiles");
    let expected = "search a.svc svc\nnameserver 10.0.0.10\noptions ndots:5";
    assert_eq!(stage.sh(&one, "cat /etc/resolv.conf").await?, expected);
    let ip = stage.node.cri.pod_address(&pod.id).await?;
    let hosts = stage.sh(&one, "cat /etc/hosts").await?;
    assert!(hosts.lines().any(|line| line == format!("{ip}\tfiles")), "{hosts}");
    assert!(stage.sh(&one, "ip -o -4 addr show eth0").await?.contains(&ip));
    stage.sh(&one, "echo shared > /dev/shm/word").await?;
    assert_eq!(stage.sh(&two, "cat /dev/shm/word").await?, "shared");
    assert_eq!(stage.sh(&one, "df -k /dev/shm | tail -n 1 | xargs | cut -d ' ' -f 2").await?, "65536");
    // One network, and processes of their own.
    assert_eq!(
        stage.sh(&one, "readlink /proc/self/ns/net").await?,
        stage.sh(&two, "readlink /proc/self/ns/net").await?
    );
    assert_eq!(stage.sh(&one, "cat /proc/1/comm").await?, "sleep");
    stage.remove(&pod).await
}

async fn shared_processes(stage: &mut Stage) -> Result<()> {
    let mut config = stage.node.pod_config("processes");
    set_mode(&mut config, |options| options.set_pid(NamespaceMode::Pod))?;
    let pod = stage.node.cri.run_pod(config).await?;
    let mut configs = [shell("one", "exec sleep 1111"), shell("two", "exec sleep 2222")];
    for config in &mut configs {
        let options = context(config)?.namespace_options.as_mut().context("no namespaces")?;
        options.set_pid(NamespaceMode::Pod);
    }
    let [one, two] = configs;
    let one = stage.container(&pod, one).await?;
    let two = stage.container(&pod, two).await?;
    let seen = stage.sh(&two, "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done").await?;
    assert!(seen.contains("sleep 1111") && seen.contains("sleep 2222"), "{seen}");
    assert!(!stage.sh(&two, "cat /proc/1/comm").await?.starts_with("sleep"), "the first process is the pod's init");
    // What loses its parent is the init's to reap; and one container's end is not the other's.
    stage.sh(&two, "(sleep 0.1 &) ; true").await?;
    stage.node.cri.stop(&one, 0).await?;
    eventually("no zombie", async || {
        let states = stage.sh(&two, "cat /proc/[0-9]*/stat 2>/dev/null | cut -d ' ' -f 3 | xargs").await?;
        Ok((!states.contains('Z')).then_some(()))
    })
    .await?;
    assert_eq!(stage.node.cri.status(&two).await?.state(), ContainerState::ContainerRunning);
    stage.remove(&pod).await
}

async fn modes_of_the_host(stage: &mut Stage) -> Result<()> {
    let mut config = stage.node.pod_config("host");
    set_mode(&mut config, |options| {
        options.set_network(NamespaceMode::Node);
        options.set_pid(NamespaceMode::Node);
        options.set_ipc(NamespaceMode::Node);
    })?;
    let pod = stage.node.cri.run_pod(config).await?;
    assert_eq!(stage.node.cri.pod_address(&pod.id).await?, "");
    let mut config = shell("host", SLEEP);
    let options = context(&mut config)?.namespace_options.as_mut().context("no namespaces")?;
    options.set_network(NamespaceMode::Node);
    options.set_pid(NamespaceMode::Node);
    options.set_ipc(NamespaceMode::Node);
    let container = stage.container(&pod, config).await?;
    let process = stage.process(&container).await?;
    for (name, shared) in [("net", true), ("pid", true), ("ipc", true), ("uts", true), ("mnt", false)] {
        let inside = fs::metadata(process.join("ns").join(name))?.ino();
        let own = fs::metadata(Path::new("/proc/self/ns").join(name))?.ino();
        assert_eq!(inside == own, shared, "{name}");
    }
    stage.remove(&pod).await
}

fn set_mode(config: &mut PodSandboxConfig, change: impl FnOnce(&mut NamespaceOption)) -> Result<()> {
    let context = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    change(context.and_then(|context| context.namespace_options.as_mut()).context("no namespaces")?);
    Ok(())
}
