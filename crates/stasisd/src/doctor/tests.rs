//! What the doctor says of hosts that lack something.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use stasis_cgroup::Mode;

use super::*;

/// A host with only these files.
struct Host(tempfile::TempDir);

impl Host {
    fn with(files: &[(&str, &str)]) -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        for (path, text) in files {
            let path = host.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        host
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn root(&self) -> &Path {
        self.0.path()
    }
}

#[track_caller]
fn check(finding: &Finding, level: Level, found: &str, consequence: &str) {
    assert_eq!(finding.level(), level, "{finding:?}");
    assert!(finding.found.contains(found), "{finding:?}");
    assert!(finding.consequence.contains(consequence), "{finding:?}");
    assert_eq!(finding.consequence.is_empty(), level == Level::Ok, "{finding:?}");
}

#[test]
fn the_kernel_is_judged_by_its_files() {
    let bare = Host::with(&[("proc/self/status", "CapEff:\t0000000000000000\n"), ("proc/self/oom_score_adj", "-5\n")]);
    check(&kernel::overlayfs(bare.root(), Path::new("/")), Level::Error, "not in", "modprobe overlay");
    check(&kernel::userfaultfd(bare.root()), Level::Warning, "not available", "no lazy restore");
    check(&kernel::seccomp(bare.root()), Level::Error, "no filters", "CONFIG_SECCOMP_FILTER");
    check(&kernel::oom_score_adj(bare.root()), Level::Warning, "own value -5", "CAP_SYS_RESOURCE");
    check(&kernel::apparmor(bare.root()), Level::Ok, "not enabled", "");
    check(&kernel::selinux(bare.root()), Level::Ok, "not enabled", "");

    let full = Host::with(&[
        ("proc/self/status", "CapEff:\t000001ffffffffff\n"),
        ("proc/filesystems", "nodev\toverlay\n"),
        ("proc/sys/kernel/seccomp/actions_avail", "kill_process errno allow\n"),
        ("proc/sys/vm/unprivileged_userfaultfd", "0\n"),
        ("sys/module/apparmor/parameters/enabled", "Y\n"),
        ("usr/sbin/apparmor_parser", ""),
        ("sys/fs/selinux/enforce", "1"),
    ]);
    check(&kernel::overlayfs(full.root(), full.root()), Level::Ok, "available", "");
    check(&kernel::userfaultfd(full.root()), Level::Ok, "available", "");
    check(&kernel::seccomp(full.root()), Level::Ok, "filters available", "");
    check(&kernel::oom_score_adj(full.root()), Level::Ok, "may be lowered", "");
    check(&kernel::apparmor(full.root()), Level::Ok, "enabled", "");
    std::fs::remove_file(full.root().join("usr/sbin/apparmor_parser")).unwrap();
    check(&kernel::apparmor(full.root()), Level::Warning, "apparmor_parser is missing", "package apparmor");
    check(&kernel::selinux(full.root()), Level::Ok, "enforcing", "");
}

#[test]
fn missing_controllers_are_named() {
    let controllers = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let all = controllers(&["cpu", "cpuset", "memory", "pids"]);
    check(&kernel::judge_cgroup(Mode::V2, &all), Level::Ok, "v2: cpu", "");
    check(&kernel::judge_cgroup(Mode::V1, &all), Level::Warning, "v1", "missing controllers: freezer");
    check(&kernel::judge_cgroup(Mode::V2, &controllers(&["cpu"])), Level::Warning, "v2", "memory, pids, cpuset");
}

#[test]
fn missing_programs_are_named_with_the_remedy() {
    let host = Host::with(&[]);
    let mut config = Config::default();
    config.engines.runc = host.path("no-runc");
    config.engines.criu = host.path("no-criu");
    config.shim.path = Some(host.path("no-shim"));
    config.cni.conf_dir = host.path("net.d");
    config.cni.bin_dirs = vec![host.path("bin")];
    let engines = Engines::locate(&config);
    check(&programs::runc(&config, &engines), Level::Error, "not found", "set [engines] runc");
    check(&programs::criu(&config, &engines), Level::Warning, "not found", "4.2.1 or later");
    check(&programs::shim(&config, &engines), Level::Error, "not found", "correct [shim] path");
    check(&programs::network(&config, &engines), Level::Warning, "not ready", "only pods in the host's network run: ");

    config.checkpoint.level = crate::config::Level::None;
    check(&programs::criu(&config, &engines), Level::Ok, "not looked for", "");
}

#[test]
fn the_network_is_judged_by_its_configuration_and_programs() {
    let conf = r#"{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"ptp","ipam":{"type":"host-local"}}]}"#;
    let host = Host::with(&[("net.d/10-a.conflist", conf), ("bin/ptp", "")]);
    let mut config = Config::default();
    config.cni.conf_dir = host.path("net.d");
    config.cni.bin_dirs = vec![host.path("bin")];
    let engines = Engines::locate(&config);
    check(&programs::network(&config, &engines), Level::Warning, "not ready", "host-local");
    fs::write(host.path("bin/host-local"), "").unwrap();
    fs::set_permissions(host.path("bin/host-local"), fs::Permissions::from_mode(0o755)).unwrap();
    check(&programs::network(&config, &engines), Level::Ok, "network pods (1.0.0): ptp", "");
}

#[test]
fn broken_engines_are_told_from_missing_ones() {
    let host = Host::with(&[("runc", "#!/bin/sh\necho broken >&2\nexit 3\n"), ("criu", "#!/bin/sh\necho other\n")]);
    let mut config = Config::default();
    config.engines.runc = host.path("runc");
    config.engines.criu = host.path("criu");
    let engines = Engines::locate(&config);
    check(&programs::runc(&config, &engines), Level::Error, "does not answer", "broken");
    check(&programs::criu(&config, &engines), Level::Warning, "does not answer", "other");
}

#[test]
fn the_real_engines_are_found_and_named() {
    let prefix =
        std::env::var_os("STASIS_ENGINES").expect("STASIS_ENGINES must name the prefix with bin/runc and bin/criu");
    let mut config = Config::default();
    config.engines.path = vec![PathBuf::from(prefix).join("bin")];
    let engines = Engines::locate(&config);
    check(&programs::runc(&config, &engines), Level::Ok, "runc", "");
    check(&programs::criu(&config, &engines), Level::Ok, "4.", "");
}

#[test]
fn the_report_names_every_subject_with_its_mark() {
    let findings = [
        at(Path::new("/bin/x"), fine("x", "1.0")),
        warning("y", "old", "less works; update"),
        error("z", "missing", "nothing works; install"),
    ];
    let expected = "\
ok      x             1.0  /bin/x
warning y             old
                      less works; update
ERROR   z             missing
                      nothing works; install
";
    assert_eq!(report(&findings), expected);
}

#[test]
fn everything_is_looked_at_on_this_host() {
    let findings = examine(&Config::default());
    let mut subjects: Vec<_> = findings.iter().map(|finding| finding.subject.as_str()).collect();
    subjects.sort_unstable();
    subjects.dedup();
    assert_eq!(subjects.len(), findings.len(), "a subject appears twice");
    assert!(findings.iter().all(|finding| (finding.level() == Level::Ok) == finding.consequence.is_empty()));
}
