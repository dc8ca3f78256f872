//! CDI devices: what a vendor's specification says reaches the container, and nothing else does.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use stasis_cri_api::runtime::{CdiDevice, ContainerConfig, ContainerFilter, Int64Value, StatusRequest};
use stasis_e2e::{Stage, check_on, counts, counts_beyond, ground, shell};
use tonic::Code;
use xtask::cri::{container_config, refusal};
use xtask::node::Setup;

const COUNT: &str = "n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.1; done";

/// How the shell tells EPERM, which is the control group's word. A device without a driver is another error.
const NOT_ALLOWED: &str = "Operation not permitted";

/// A script that opens a device and says what came of it.
fn opening(redirection: &str) -> String {
    format!("(: {redirection}) 2>&1; true")
}

/// Runs a test on a node whose specifications are in a directory of its own.
fn check(name: &str, body: impl AsyncFnOnce(&mut Stage) -> Result<()>) {
    let ground = ground(name);
    let dir = ground.disk.join("cdi");
    fs::create_dir_all(&dir).expect("a directory");
    let setup = Setup { more: format!("[cdi]\nspec_dirs = [{:?}]\n", dir.display().to_string()), ..Setup::default() };
    check_on(ground, setup, &[], body);
}

fn file(stage: &Stage, name: &str) -> PathBuf {
    stage.node.ground.disk.join("cdi").join(name)
}

fn with(name: &str, script: &str, devices: &[&str]) -> ContainerConfig {
    let cdi_devices = devices.iter().map(|name| CdiDevice { name: (*name).to_owned() }).collect();
    ContainerConfig { cdi_devices, ..shell(name, script) }
}

/// A specification with one of everything; the hook leaves a file.
fn write_specs(stage: &Stage) -> Result<PathBuf> {
    let disk = &stage.node.ground.disk;
    let (lib, trace) = (disk.join("lib"), disk.join("hook-ran"));
    fs::create_dir_all(&lib)?;
    fs::write(lib.join("driver"), "a driver")?;
    let spec = json!({
        "cdiVersion": "0.7.0",
        "kind": "vendor.test/thing",
        "annotations": { "for": "people" },
        "containerEdits": {
            "env": ["THING_DRIVER=1", "REPLACED=by the vendor"],
            "mounts": [{ "hostPath": lib, "containerPath": "/opt/lib", "options": ["ro", "nosuid", "nodev", "bind"] }],
        },
        "devices": [
            { "name": "full", "containerEdits": {
                "env": ["THING=full"],
                "deviceNodes": [
                    { "path": "/dev/thing", "hostPath": "/dev/full", "permissions": "rw" },
                    { "path": "/dev/made", "type": "c", "major": 10, "minor": 237, "fileMode": 0o660, "permissions": "r" },
                ],
                "additionalGids": [4242],
                "hooks": [{ "hookName": "createRuntime", "path": "/bin/sh", "args": ["sh", "-c", format!("cat > {}", trace.display())] }],
            } },
            { "name": "none", "containerEdits": { "env": ["THING=none"] } },
        ],
    });
    fs::write(file(stage, "thing.json"), spec.to_string())?;
    let yaml = "---\ncdiVersion: \"0.5.0\"\nkind: \"vendor.test/yaml\"\ndevices:\n  - name: \"0\"\n    containerEdits:\n      env:\n        \
                - FROM=yaml\n      deviceNodes:\n        - path: /dev/yaml\n          hostPath: /dev/null\n";
    fs::write(file(stage, "other.yaml"), yaml)?;
    Ok(trace)
}

#[test]
fn a_container_gets_what_its_cdi_devices_need() {
    check("cdi", async |stage| {
        stage.import(&["busybox"])?;
        let trace = write_specs(stage)?;
        let pod = stage.pod("pod").await?;
        let mut config = with("main", "exec sleep 1000", &["vendor.test/thing=full", "vendor.test/yaml=0"]);
        config.envs.push(stasis_cri_api::runtime::KeyValue { key: "REPLACED".into(), value: "no".into() });
        let context = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut()).unwrap();
        context.run_as_user = Some(Int64Value { value: 1000 });
        context.run_as_group = Some(Int64Value { value: 1000 });
        let container = stage.container(&pod, config).await?;
        let env = "echo $THING_DRIVER $REPLACED $THING $FROM; cat /opt/lib/driver";
        assert_eq!(stage.sh(&container, env).await?, "1 by the vendor full yaml\na driver");
        let nodes = "stat -c '%n %t:%T %u:%g' /dev/thing /dev/made /dev/yaml; stat -c %a /dev/made";
        let expected = "/dev/thing 1:7 1000:1000\n/dev/made a:ed 1000:1000\n/dev/yaml 1:3 1000:1000\n660";
        assert_eq!(stage.sh(&container, nodes).await?, expected);
        assert_eq!(stage.sh(&container, "echo x 2>/dev/null > /dev/thing || echo full").await?, "full");
        // The control of loop devices, which no container has by itself: only reading is allowed.
        assert!(!stage.sh(&container, &opening("< /dev/made")).await?.contains(NOT_ALLOWED));
        assert!(stage.sh(&container, &opening("> /dev/made")).await?.contains(NOT_ALLOWED));
        ensure!(stage.sh(&container, "id -G").await?.split(' ').any(|group| group == "4242"));
        let state: Value = serde_json::from_str(&fs::read_to_string(&trace)?)?;
        assert_eq!(state["id"], container.id, "the hook got the container's state");
        let rules = stage
            .sh(&container, "echo x 2>&1 > /dev/yaml; cat /proc/self/mountinfo | grep ' /opt/lib ' | cut -d ' ' -f 6");
        ensure!(rules.await?.contains("nosuid"));
        stage.remove(&pod).await
    });
}

#[test]
fn cdi_specifications_are_read_when_they_are_needed() {
    check("cdinew", async |stage| {
        stage.import(&["busybox"])?;
        write_specs(stage)?;
        let pod = stage.pod("pod").await?;
        let cdi = async |stage: &mut Stage| -> Result<Value> {
            let status = stage.node.cri.runtime.status(StatusRequest { verbose: true }).await?.into_inner();
            Ok(serde_json::from_str(&status.info["cdi"])?)
        };
        let seen = cdi(stage).await?;
        assert_eq!(seen["devices"], json!(["vendor.test/thing=full", "vendor.test/thing=none", "vendor.test/yaml=0"]));
        assert_eq!(seen["errors"], json!([]));

        let text = fs::read_to_string(file(stage, "other.yaml"))?;
        fs::write(file(stage, "other.yaml"), text.replace("FROM=yaml", "FROM=changed"))?;
        fs::write(file(stage, "bad.json"), r#"{"cdiVersion":"0.7.0","kind":"vendor.test/bad","devises":[]}"#)?;
        let rdt = r#"{"cdiVersion":"0.7.0","kind":"vendor.test/rdt","devices":[{"name":"0","containerEdits":{"intelRdt":{"closID":"x"}}}]}"#;
        fs::write(file(stage, "rdt.json"), rdt)?;
        let container = stage.container(&pod, with("new", "exec sleep 1000", &["vendor.test/yaml=0"])).await?;
        assert_eq!(stage.sh(&container, "echo $FROM").await?, "changed");
        let errors = cdi(stage).await?["errors"].to_string();
        ensure!(errors.contains("bad.json") && errors.contains("devises") && errors.contains("intelRdt"), "{errors}");

        fs::copy(file(stage, "other.yaml"), file(stage, "twice.yaml"))?;
        for (device, expected, words) in [
            ("vendor.test/thing=absent", Code::FailedPrecondition, "vendor.test/thing=absent"),
            ("vendor.test/rdt=0", Code::FailedPrecondition, "intelRdt is not supported"),
            ("vendor.test/bad=0", Code::FailedPrecondition, "bad.json"),
            ("vendor.test/yaml=0", Code::FailedPrecondition, "twice.yaml"),
            ("/dev/null", Code::InvalidArgument, "is not the name of a CDI device"),
        ] {
            let (code, message) = refusal(stage.node.cri.create(&pod, with("bad", "true", &[device])).await)?;
            assert_eq!(code, expected, "{message}");
            ensure!(message.contains(words), "{message}");
        }
        // An annotation names no device, as it did in older kubelets and in forged archives.
        let mut config = with("annotated", "exec sleep 1000", &[]);
        config.annotations.insert("cdi.k8s.io/plugin".into(), "vendor.test/thing=full".into());
        let annotated = stage.container(&pod, config).await?;
        assert_eq!(stage.sh(&annotated, "echo .$THING; ls /dev/thing 2>/dev/null || echo none").await?, ".\nnone");
        assert_eq!(stage.node.cri.list(ContainerFilter::default()).await?.len(), 2);
        stage.remove(&pod).await
    });
}

#[test]
fn a_restored_container_has_the_cdi_devices_of_its_request() {
    check("cdickpt", async |stage| {
        stage.import(&["busybox"])?;
        write_specs(stage)?;
        let pod = stage.pod("first").await?;
        let mut config = with("main", COUNT, &["vendor.test/thing=full"]);
        config.annotations.insert("cdi.k8s.io/plugin".into(), "vendor.test/thing=full".into());
        let container = stage.container(&pod, config).await?;
        counts_beyond(&container, 5).await?;
        let archive = stage.put_away(&pod, &container, "cdi.tar").await?;

        // What the archive had is not given: its mounts are missed, and named.
        let pod = stage.pod("second").await?;
        let restored = container_config("main", &archive, &[]);
        let (code, message) = refusal(stage.node.cri.create(&pod, restored.clone()).await)?;
        assert_eq!(code, Code::InvalidArgument);
        ensure!(message.contains("/opt/lib"), "{message}");
        let devices = |name: &str| vec![CdiDevice { name: name.into() }];
        // Another device of the vendor's brings the mount, but not the node: its use is not allowed.
        let other = ContainerConfig { cdi_devices: devices("vendor.test/thing=none"), ..restored.clone() };
        let other = stage.container(&pod, other).await?;
        counts_beyond(&other, 6).await?;
        stage.sh(&other, "mknod /made c 10 237").await?;
        assert!(stage.sh(&other, &opening("< /made")).await?.contains(NOT_ALLOWED));
        stage.node.cri.remove(&other).await?;

        let same = ContainerConfig { cdi_devices: devices("vendor.test/thing=full"), ..restored };
        let same = stage.container(&pod, same).await?;
        let carried = counts(&same).last().copied().unwrap_or_default();
        counts_beyond(&same, carried + 3).await?;
        assert_eq!(
            stage.sh(&same, "cat /opt/lib/driver; echo; echo 2>/dev/null > /dev/thing || echo full").await?,
            "a driver\nfull"
        );
        assert!(!stage.sh(&same, &opening("< /dev/made")).await?.contains(NOT_ALLOWED));
        stage.remove(&pod).await
    });
}
