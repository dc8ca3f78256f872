//! Tests of the crate against the real runc of `STASIS_ENGINES`, and of its words by a stand-in.

use super::*;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);

fn runc(dir: &Path) -> Runc {
    let engines = std::env::var_os("STASIS_ENGINES")
        .expect("STASIS_ENGINES must name the directory whose bin/ has runc; see `cargo xtask test`");
    let binary = Path::new(&engines).join("bin/runc");
    Runc { binary, root: dir.join("root"), log_dir: dir.to_path_buf(), systemd_cgroup: false }
}

/// A runtime that is a shell script.
fn script(dir: &Path, body: &str) -> Runc {
    let binary = dir.join("runtime");
    fs::write(&binary, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
    Runc { binary, root: "/root-dir".into(), log_dir: dir.to_path_buf(), systemd_cgroup: true }
}

fn words(call: &mut Call) -> String {
    let command = call.command();
    let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
    // Without --root, --log and --log-format, which every call has.
    args[6..].join(" ")
}

#[test]
fn arguments() {
    let dir = tempfile::tempdir().unwrap();
    let runc = script(dir.path(), "");
    let launch = Launch { pid_file: Path::new("/p"), console_socket: Some(Path::new("/s")) };
    let bare = Launch { pid_file: Path::new("/p"), console_socket: None };
    let create = CreateOptions { bundle: Path::new("/b"), launch, no_pivot: true, no_new_keyring: false };
    let check = |mut call: Call, expected: &str| {
        assert_eq!(words(&mut call), format!("--systemd-cgroup {expected}"));
    };
    check(runc.create("c", &create), "create --bundle /b --pid-file /p --console-socket /s --no-pivot c");
    check(runc.kill("c", 15), "kill c 15");
    check(runc.delete("c", true), "delete --force c");
    check(runc.exec("c", Path::new("/x"), &bare), "exec --detach --process /x --pid-file /p c");
    check(runc.update("c", Path::new("/r")), "update --resources /r c");
    let checkpoint = CheckpointOptions {
        image_path: Path::new("/i"),
        work_path: Path::new("/w"),
        leave_running: true,
        tcp_established: false,
        external_unix_sockets: false,
        file_locks: true,
        cgroup_mode: Some(CgroupMode::Ignore),
    };
    check(
        runc.checkpoint("c", &checkpoint),
        "checkpoint --image-path /i --work-path /w --leave-running --file-locks --manage-cgroups-mode ignore c",
    );
    let restore = RestoreOptions {
        bundle: Path::new("/b"),
        image_path: Path::new("/i"),
        work_path: Path::new("/w"),
        launch: bare,
        tcp_established: true,
        file_locks: false,
        cgroup_mode: CgroupMode::Soft,
        no_pivot: false,
    };
    check(
        runc.restore("c", &restore),
        "restore --detach --bundle /b --image-path /i --work-path /w --manage-cgroups-mode soft --tcp-established \
         --pid-file /p c",
    );
}

#[test]
fn features_of_the_real_runtime() {
    let dir = tempfile::tempdir().unwrap();
    let features = Features::parse(&runc(dir.path()).features().run(LIMIT).unwrap()).unwrap();
    assert!(features.mount_options.contains(&"rbind".to_owned()));
    assert_eq!(features.annotations["org.opencontainers.runc.checkpoint.enabled"], "true");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "the log is removed");
}

#[test]
fn an_unknown_container_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let error = runc(dir.path()).state("nobody").run(LIMIT).unwrap_err();
    assert!(error.is_not_found(), "{error}");
    assert!(error.to_string().starts_with("runc state nobody: "), "{error}");
}

#[test]
fn the_last_error_of_the_log_speaks() {
    let dir = tempfile::tempdir().unwrap();
    let log = r#"printf '{"level":"error","msg":"first"}\n{"level":"error","msg":"the cause"}\n{"level":"info","msg":"x"}\nnot json\n' > "$4""#;
    let error = script(dir.path(), &format!("{log}; echo noise >&2; exit 3")).start("c").run(LIMIT).unwrap_err();
    assert_eq!(error.to_string(), "runtime start c: the cause (exit status: 3)");
    let error = script(dir.path(), "echo words >&2; exit 3").start("c").run(LIMIT).unwrap_err();
    assert_eq!(error.to_string(), "runtime start c: words (exit status: 3)");
}

#[test]
fn a_call_that_hangs_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let error = script(dir.path(), "exec sleep 1000").start("c").run(Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
}

#[test]
fn a_missing_binary_says_what_to_do() {
    let runc = Runc { binary: "/no/such/runc".into(), root: "/r".into(), log_dir: "/".into(), systemd_cgroup: false };
    let error = runc.features().run(LIMIT).unwrap_err().to_string();
    assert!(error.contains("/no/such/runc") && error.contains("check that"), "{error}");
}

#[test]
fn process_lists() {
    assert_eq!(parse_pids(b"[1,2]\n").unwrap(), [1, 2]);
    assert!(parse_pids(b"null").unwrap().is_empty());
    assert!(parse_pids(b"PID").is_err());
}
