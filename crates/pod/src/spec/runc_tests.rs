//! What runc makes of our specifications: real containers, in the host's network, IPC and UTS namespaces.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use stasis_cri_api::runtime::{Capability, Int64Value};

use super::tests::{spec, with_context};
use super::*;

/// Time within which a container that only prints something must have ended.
const LIMIT: Duration = Duration::from_secs(60);

/// A bundle with a busybox root, its runc state, and the container, which goes when this is dropped.
struct Bundle {
    dir: tempfile::TempDir,
    runc: PathBuf,
    id: String,
}

impl Bundle {
    fn new(name: &str) -> Self {
        let engines = std::env::var_os("STASIS_ENGINES")
            .expect("STASIS_ENGINES must name the directory with bin/runc and bin/busybox (cargo xtask test sets it)");
        let bin = Path::new(&engines).join("bin");
        let dir = tempfile::tempdir().unwrap();
        for name in ["bin", "proc", "dev", "sys", "tmp", "srv", "etc"] {
            std::fs::create_dir_all(dir.path().join("rootfs").join(name)).unwrap();
        }
        std::fs::copy(bin.join("busybox"), dir.path().join("rootfs/bin/busybox")).unwrap();
        Self { dir, runc: bin.join("runc"), id: format!("stasis-spec-{name}-{}", std::process::id()) }
    }

    fn runc(&self) -> Command {
        let mut command = Command::new(&self.runc);
        command.arg("--root").arg(self.dir.path().join("state")).current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    /// Runs the specification and returns what it printed.
    fn run(&self, spec: &Spec) -> String {
        std::fs::write(self.dir.path().join("config.json"), serde_json::to_vec(spec).unwrap()).unwrap();
        let mut child =
            self.runc().args(["run", &self.id]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let start = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if start.elapsed() > LIMIT {
                child.kill().unwrap();
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
        assert!(status.success(), "runc: {status}: {}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).unwrap()
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        // Fails where the container is gone already, as it should be.
        let _ = self.runc().args(["delete", "--force", &self.id]).stderr(Stdio::null()).status();
    }
}

const REPORT: &str = "/bin/busybox id -u; /bin/busybox id -G; /bin/busybox pwd; echo $HOSTNAME; \
    /bin/busybox grep -E '^(Cap(Inh|Prm|Eff|Bnd|Amb)|Seccomp|NoNewPrivs):' /proc/self/status; \
    /bin/busybox head -c 1 /proc/keys | /bin/busybox wc -c; /bin/busybox test -w /sys/kernel && echo writable";

fn report(name: &str, pod: &PodSandboxConfig, context: LinuxContainerSecurityContext) -> String {
    let bundle = Bundle::new(name);
    let mut config = with_context(context);
    config.command = ["/bin/busybox", "sh", "-c", REPORT].map(str::to_owned).to_vec();
    config.command[3].push_str("; true");
    let spec = spec(pod, &config, |input| {
        input.namespaces = Namespaces { net: None, ipc: None, uts: None, pid: PidNamespace::Private };
        input.files = PodFiles::default();
        input.cgroup_v2 = false;
        input.cgroups_path = format!("/{}", bundle.id);
        input.host = Box::leak(Box::new(HostFacts::detect()));
    });
    bundle.run(&spec.unwrap())
}

#[test]
fn a_confined_container_is_what_was_asked() {
    let caps = Capability {
        drop_capabilities: vec!["ALL".into()],
        add_capabilities: vec!["KILL".into()],
        ..Default::default()
    };
    let context = LinuxContainerSecurityContext {
        run_as_user: Some(Int64Value { value: 1000 }),
        run_as_group: Some(Int64Value { value: 3000 }),
        supplemental_groups: vec![4000],
        capabilities: Some(caps),
        no_new_privs: true,
        readonly_rootfs: true,
        ..Default::default()
    };
    let expected = [
        "1000",
        "3000 6 4000",
        "/srv",
        "web-1",
        "CapInh:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000020",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "0",
    ];
    let report = report("confined", &super::tests::pod(), context);
    assert_eq!(report.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn a_privileged_container_runs_unconfined() {
    let context = LinuxContainerSecurityContext {
        privileged: true,
        run_as_user: Some(Int64Value { value: 0 }),
        ..Default::default()
    };
    let report = report("privileged", &super::tests::privileged_pod(), context);
    let line = |start: &str| report.lines().find(|l| l.starts_with(start)).unwrap_or_default().to_owned();
    assert_eq!(line("Seccomp:"), "Seccomp:\t0", "{report}");
    assert_eq!(line("CapInh:"), "CapInh:\t0000000000000000", "{report}");
    assert!(report.contains("writable"), "{report}");
}
