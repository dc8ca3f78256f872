//! Shims' programs: names, search, answers, and failures of real processes.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use super::*;

fn config(dir: &Path) -> Config {
    Config { shim_dirs: vec![dir.to_owned()], address: "/run/x.sock".into(), ..Config::default() }
}

/// A shim of our making: a shell script.
fn script(dir: &Path, name: &str, body: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn names_become_programs() {
    assert_eq!(program_name("io.containerd.runc.v2").unwrap(), "containerd-shim-runc-v2");
    assert_eq!(program_name("io.containerd.kata-fc.v2").unwrap(), "containerd-shim-kata-fc-v2");
    for bad in ["", "runc", "runc.v2", "a..b", "a.b.", "../x.runc.v2", "io.containerd./bin/sh.v1"] {
        assert!(matches!(program_name(bad), Err(Error::InvalidArgument(_))), "{bad:?}");
    }
}

#[test]
fn our_shim_is_known_by_name_and_path() {
    assert!(is_ours("io.containerd.stasis.v1") && is_ours("/opt/x/containerd-shim-stasis-v1"));
    assert!(!is_ours("io.containerd.runc.v2") && !is_ours("/opt/containerd-shim-stasis-v1/shim") && !is_ours(""));
}

#[test]
fn the_configured_directory_comes_before_the_path() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut config = config(first.path());
    config.env = vec![("PATH".into(), second.path().into())];
    let error = find("io.containerd.x.v1", &config).unwrap_err().to_string();
    assert!(error.contains("containerd-shim-x-v1") && error.contains(first.path().to_str().unwrap()), "{error}");
    let in_path = script(second.path(), "containerd-shim-x-v1", "");
    assert_eq!(find("io.containerd.x.v1", &config).unwrap(), in_path);
    fs::write(first.path().join("containerd-shim-x-v1"), "not executable").unwrap();
    assert_eq!(find("io.containerd.x.v1", &config).unwrap(), in_path);
    let in_dir = script(first.path(), "containerd-shim-x-v1", "");
    assert_eq!(find("io.containerd.x.v1", &config).unwrap(), in_dir);
    assert_eq!(find(in_path.to_str().unwrap(), &config).unwrap(), in_path);
    assert!(find("/no/such/shim", &config).is_err());
}

#[test]
fn every_form_of_answer_is_understood() {
    let v3 = Endpoint::new("unix:///run/s", 3, "ttrpc").unwrap();
    let v2 = Endpoint { version: 2, ..v3.clone() };
    assert_eq!(parse_answer(b"unix:///run/s\n").unwrap(), v2);
    assert_eq!(parse_answer(br#"{"version":3,"address":"unix:///run/s","protocol":"ttrpc"}"#).unwrap(), v3);
    let result =
        BootstrapResult { version: 3, address: "unix:///run/s".into(), protocol: "ttrpc".into(), ..Default::default() };
    assert_eq!(parse_answer(&result.write_to_bytes().unwrap()).unwrap(), v3);
    let refused: [&[u8]; 6] = [
        b"",
        b"hello",
        b"vsock://3:1024",
        br#"{"version":3,"address":"unix:///run/s","protocol":"grpc"}"#,
        br#"{"version":4,"address":"unix:///run/s","protocol":"ttrpc"}"#,
        br#"{"version":3"#,
    ];
    for answer in refused {
        assert!(parse_answer(answer).is_err(), "{}", String::from_utf8_lossy(answer));
    }
}

#[tokio::test]
async fn a_shim_is_started_as_containerd_does() {
    let dir = tempfile::tempdir().unwrap();
    let say = r#"{ echo "$@"; pwd; env | sort; cat | tr -d '\000-\037'; } >said; echo unix:///run/s"#;
    let shim = script(dir.path(), "shim", say);
    let mut config = config(dir.path());
    config.env = vec![("EXTRA".into(), "1".into())];
    let options = Any { type_url: "some/Options".into(), value: b"v".to_vec() };
    let endpoint = start(&shim, "t1", dir.path(), Some(&options), &config).await.unwrap();
    assert_eq!((endpoint.address.as_str(), endpoint.version), ("unix:///run/s", 2));
    let said = fs::read_to_string(dir.path().join("said")).unwrap();
    let args = "-namespace k8s.io -address /run/x.sock -publish-binary /bin/true -id t1 start\n";
    assert!(said.starts_with(args), "{said}");
    let pwd = format!("\n{}\n", dir.path().display());
    let env = ["\nEXTRA=1\n", "\nGRPC_ADDRESS=/run/x.sock\n", "\nMAX_SHIM_VERSION=2\n", "\nNAMESPACE=k8s.io\n"];
    for part in env.into_iter().chain(["\nTTRPC_ADDRESS=/run/x.sock.ttrpc\n", &pwd, "some/Options"]) {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    assert!(!said.contains("CARGO"), "our own environment does not reach a shim: {said}");
}

#[tokio::test]
async fn a_failing_start_is_told_in_the_shims_words() {
    let dir = tempfile::tempdir().unwrap();
    let shim = script(dir.path(), "shim", "echo no cgroup for me >&2; exit 7");
    let error = start(&shim, "t1", dir.path(), None, &config(dir.path())).await.unwrap_err().to_string();
    assert!(error.contains("no cgroup for me") && error.contains("7") && error.contains("t1"), "{error}");
    let mute = script(dir.path(), "mute", "echo I forgot the address >&2");
    let error = start(&mute, "t1", dir.path(), None, &config(dir.path())).await.unwrap_err().to_string();
    assert!(error.contains("is no address") && error.contains("I forgot"), "{error}");
}
