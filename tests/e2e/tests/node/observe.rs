//! What operators see of the daemon: its own metrics, its log, its state, and a configuration that is read anew.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use stasis_cri_api::runtime::*;
use stasis_e2e::{Stage, check, counts_beyond, eventually, shell};
use tonic::{Code, Request};
use xtask::cri::{container_config, refusal};
use xtask::node::Setup;
use xtask::process::{SHORT, run};

/// The trace of one call, and the span of the caller.
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

#[test]
fn operators_see_calls_checkpoints_and_state() {
    // The address is free now; that nobody takes it until the daemon does is likely enough.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let setup = Setup { more: format!("[metrics]\naddress = \"{address}\"\n"), ..Setup::default() };
    check("observe", setup, async |stage| {
        stage.import(&["busybox", "counter"])?;
        let pod = stage.pod("observe").await?;
        let counter = container_config("counter", stasis_e2e::COUNTER, &[]);
        let container = stage.container(&pod, counter).await?;
        counts_beyond(&container, 3).await?;
        stage.node.cri.checkpoint(&container, &stage.archive("a.tar")).await?;
        let absent = ContainerStatusRequest { container_id: "f".repeat(64), verbose: false };
        stage.node.cri.runtime.container_status(absent).await.unwrap_err();
        let text = scrape(&address.to_string())?;
        assert!(text.ends_with("# EOF\n"), "{text}");
        for line in [
            "stasis_rpc_total{rpc=\"RunPodSandbox\",code=\"OK\"} 1",
            "stasis_rpc_total{rpc=\"ContainerStatus\",code=\"NOT_FOUND\"} 1",
            "stasis_rpc_duration_seconds_count{rpc=\"CheckpointContainer\"} 1",
            "stasis_checkpoints_total{result=\"done\"} 1",
            "stasis_checkpoint_frozen_seconds_count 1",
            "stasis_containers{state=\"running\"} 1",
            "stasis_pods{state=\"ready\"} 1",
            "stasis_images 2",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
        }

        let dump: Value = serde_json::from_str(&stage.stasis(&["debug", "dump"])?)?;
        assert_eq!(dump["pods"][0]["id"], pod.id);
        assert_eq!(dump["containers"][0]["state"], "running");
        assert!(dump["containers"][0]["task"]["pid"].as_u64() > Some(1), "{dump}");
        assert_eq!(dump["calls"][0]["method"], "Dump", "{dump}");

        let mut traced = Request::new(StopContainerRequest { container_id: container.id.clone(), timeout: 0 });
        let header = format!("00-{TRACE}-b7ad6b7169203331-01");
        traced.metadata_mut().insert("traceparent", header.parse()?);
        stage.node.cri.runtime.stop_container(traced).await?;
        let log = fs::read_to_string(stage.node.ground.log())?;
        let line = log.lines().find(|line| line.contains("StopContainer")).context("no line about the call")?;
        assert!(line.contains(TRACE) && line.contains("b7ad6b7169203331"), "{line}");
        stage.remove(&pod).await
    });
}

fn scrape(address: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address).context("connect to the metrics")?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    assert!(head.starts_with("HTTP/1.1 200 OK") && head.contains("application/openmetrics-text"), "{head}");
    Ok(body.to_owned())
}

#[test]
fn a_part_of_the_configuration_takes_effect_on_sighup() {
    check("reload", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("reload").await?;
        let container = stage.container(&pod, shell("main", "sleep 100000")).await?;
        let file = stage.node.ground.disk.join("config.toml");
        let before = fs::read_to_string(&file)?;

        fs::write(
            &file,
            before.replace("level = \"checkpoint_restore\"", "level = \"none\"\nmax_timeout_seconds = 9"),
        )?;
        hang_up(stage, "was read anew").await?;
        let (code, message) = refusal(stage.node.cri.checkpoint(&container, &stage.archive("a.tar")).await)?;
        assert_eq!((code, message.as_str()), (Code::Unknown, "checkpoint/restore support not available"));

        fs::write(&file, "nonsense = 1\n")?;
        hang_up(stage, "the old one stays").await?;
        refusal(stage.node.cri.checkpoint(&container, &stage.archive("a.tar")).await)?;

        fs::write(
            &file,
            before.replace("[engines]", "[limits]\nshutdown_grace_seconds = 21\n\n[engines]\npath = []\n"),
        )?;
        // The same key twice is a mistake as well.
        hang_up(stage, "the old one stays").await?;
        fs::write(&file, before.replace("driver = \"cgroupfs\"", "driver = \"auto\""))?;
        hang_up(stage, "wait for a restart").await?;
        stage.node.cri.checkpoint(&container, &stage.archive("a.tar")).await.context("allowed again")?;

        let mut command = Command::new(stage.places.daemon());
        command.arg("--config").arg(&file).args(["--state", "/elsewhere", "config", "dump"]);
        let dump = run(&mut command, SHORT)?;
        let number = before.lines().position(|line| line.starts_with("level = ")).context("no level")? + 1;
        for line in [
            "state = \"/elsewhere\"  # --state".to_owned(),
            format!("level = \"checkpoint_restore\"  # {}:{number}", file.display()),
            "max_concurrent_downloads = 3  # default".to_owned(),
        ] {
            assert!(dump.lines().any(|have| have == line), "{line} in\n{dump}");
        }
        fs::write(&file, before)?;
        stage.remove(&pod).await
    });
}

/// Sends SIGHUP and waits until the daemon has said something new with these words.
async fn hang_up(stage: &mut Stage, words: &str) -> Result<()> {
    let said =
        |stage: &Stage| Ok::<_, anyhow::Error>(fs::read_to_string(stage.node.ground.log())?.matches(words).count());
    let before = said(stage)?;
    let pid = Pid::from_raw(stage.node.pid().try_into()?).context("no process ID")?;
    kill_process(pid, Signal::HUP)?;
    eventually(words, async || Ok((said(stage)? > before).then_some(()))).await
}
