//! Stdio: CRI logs, FIFOs and terminals.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};

use common::*;
use stasis_shim_api::{CRI_LOG_LINE_MAX, METHOD_REOPEN_LOG, ReopenLogRequest};

async fn reopen(pod: &Pod, id: &str) -> ttrpc::Result<()> {
    let payload = serde_json::to_vec(&ReopenLogRequest { id: id.to_owned() }).unwrap();
    call(pod, METHOD_REOPEN_LOG, payload).await.map(drop)
}

#[tokio::test]
async fn long_lines_are_written_in_pieces_and_the_last_has_no_end() {
    let pod = Pod::start().await;
    pod.run("c1", &Plan::script("head -c 40000 /dev/zero | tr '\\0' x; echo; printf 'no end'")).await;
    assert_eq!(pod.wait("c1", "").await, 0);
    let log = fs::read_to_string(pod.log_path("c1")).unwrap();
    let lines: Vec<Vec<&str>> = log.lines().map(|line| line.splitn(4, ' ').skip(2).collect()).collect();
    let shape: Vec<(&str, usize)> = lines.iter().map(|line| (line[0], line[1].len())).collect();
    let rest = 40000 - 2 * CRI_LOG_LINE_MAX;
    assert_eq!(shape, [("P", CRI_LOG_LINE_MAX), ("P", CRI_LOG_LINE_MAX), ("F", rest), ("F", 6)]);
}

#[tokio::test]
async fn a_log_is_complete_once_wait_returns() {
    let pod = Pod::start().await;
    for round in 0..5 {
        let id = format!("c{round}");
        pod.run(&id, &Plan::script("seq 1 20000")).await;
        pod.wait(&id, "").await;
        let log = pod.log(&id);
        assert!(log.ends_with("\n20000\n"), "the end is {:?}", &log[log.len().saturating_sub(20)..]);
        assert_eq!(log.lines().count(), 20000);
    }
}

#[tokio::test]
async fn a_rotated_log_begins_anew_without_a_lost_line() {
    let pod = Pod::start().await;
    pod.run("c1", &Plan::script("i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo $i; sleep 0.01; done")).await;
    let mut rotated = Vec::new();
    for round in 0..3 {
        pod.log_says("c1", "\n").await;
        let old = pod.scratch().join(format!("old-{round}"));
        fs::rename(pod.log_path("c1"), &old).unwrap();
        reopen(&pod, "c1").await.unwrap();
        rotated.push(old);
        eventually("more output", || pod.log("c1").lines().count() > 10).await;
    }
    pod.wait("c1", "").await;
    let mut text: String = rotated.iter().map(|old| messages(&fs::read_to_string(old).unwrap())).collect();
    text.push_str(&pod.log("c1"));
    let expected: String = (1..=300).map(|i| format!("{i}\n")).collect();
    assert_eq!(text, expected);
    assert_eq!(code(&reopen(&pod, "nobody").await.unwrap_err()), Code::NOT_FOUND);
}

#[tokio::test]
async fn a_fast_writer_neither_fills_memory_nor_delays_others() {
    let pod = Pod::start().await;
    let log = format!("file://{}", pod.log_path("c1").display());
    pod.run("c1", &Plan { stdout: Some(log), ..Plan::script("yes 0123456789012345678901234567890123456789") }).await;
    let size = || fs::metadata(pod.log_path("c1")).map_or(0, |meta| meta.len());
    eventually("100 MB of output", || size() > 100 << 20).await;
    let status = fs::read_to_string(format!("/proc/{}/status", pod.shim_pid())).unwrap();
    let resident = |status: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    assert!(resident(&status) < 16 << 10, "{} KiB resident", resident(&status));
    let (output, status) = pod.exec("c1", "echo still here").await;
    assert_eq!((output.as_str(), status), ("still here\n", 0));
    pod.kill("c1", 9).await.unwrap();
    pod.wait("c1", "").await;
}

#[tokio::test]
async fn a_full_disk_does_not_stop_the_container() {
    let pod = Pod::start().await;
    let small = pod.scratch().join("small");
    fs::create_dir(&small).unwrap();
    stasis_sys::mount::tmpfs(&small, 256 << 10, 0o700, &[]).unwrap();
    let log = format!("cri://{}", small.join("0.log").display());
    let script = "seq 1 200000; echo done > /tmp/done; sleep 1000";
    pod.run("c1", &Plan { stdout: Some(log), ..Plan::script(script) }).await;
    let done = pod.scratch().join("layers/c1/upper/tmp/done");
    eventually("the container to go on", || done.exists()).await;
    let said = || pod.shim_log().matches("output is dropped").count();
    eventually("a word in the shim's log", || said() > 0).await;
    assert_eq!(said(), 1);
}

#[tokio::test]
async fn the_output_of_an_exec_is_complete() {
    let pod = Pod::start().await;
    pod.run("c1", &Plan::script("sleep 1000")).await;
    for _ in 0..10 {
        let (output, status) = pod.exec("c1", "seq 1 5000; exit 9").await;
        assert_eq!(status, 9);
        assert!(output.ends_with("\n5000\n") && output.lines().count() == 5000);
    }
    let left: Vec<_> = fs::read_dir(pod.bundle("c1")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("exec")), "{left:?}");
}

#[tokio::test]
async fn a_child_that_keeps_the_output_open_does_not_hold_up_wait() {
    let pod = Pod::start().await;
    pod.run("c1", &Plan::script("sleep 1000")).await;
    let fifo = pod.fifo("out");
    let (mut reader, _keeper) = open_reader(&fifo);
    let path = fifo.to_string_lossy();
    pod.add_exec("c1", "e", "sleep 1000 & echo said; exit 2", ("", &path, "")).await.unwrap();
    pod.start_process("c1", "e").await.unwrap();
    assert_eq!(pod.wait("c1", "e").await, 2);
    let mut said = [0; 16];
    let length = reader.read(&mut said).unwrap();
    assert_eq!(&said[..length], b"said\n");
}

#[tokio::test]
async fn a_reader_that_is_gone_does_not_block_an_exec() {
    let pod = Pod::start().await;
    pod.run("c1", &Plan::script("sleep 1000")).await;
    let fifo = pod.fifo("out");
    let path = fifo.to_string_lossy();
    // Three times what the FIFO and the pipe hold.
    pod.add_exec("c1", "e", "head -c 400000 /dev/zero; exit 6", ("", &path, "")).await.unwrap();
    pod.start_process("c1", "e").await.unwrap();
    assert_eq!(pod.wait("c1", "e").await, 6);
    assert!(pod.shim_log().contains("nobody reads it"));
}

#[tokio::test]
async fn input_reaches_a_process_until_it_is_closed() {
    let pod = Pod::start().await;
    let stdin = pod.fifo("in");
    let plan = Plan {
        stdin: stdin.to_string_lossy().into_owned(),
        ..Plan::script("while read l; do echo got $l; done; exit 8")
    };
    pod.run("c1", &plan).await;
    for word in ["one", "two"] {
        // A client that comes and goes: the input does not end with it.
        let mut writer = OpenOptions::new().write(true).open(&stdin).unwrap();
        writeln!(writer, "{word}").unwrap();
        drop(writer);
        pod.log_says("c1", &format!("got {word}\n")).await;
    }
    assert_eq!(pod.state("c1").await.unwrap().status.unwrap(), Status::RUNNING);
    let close = CloseIORequest { id: "c1".into(), stdin: true, ..Default::default() };
    pod.task.close_io(context(), &close).await.unwrap();
    assert_eq!(pod.wait("c1", "").await, 8);
}

#[tokio::test]
async fn a_terminal_has_a_size_and_one_stream() {
    let pod = Pod::start().await;
    let stdin = pod.fifo("in");
    let plan = Plan {
        terminal: true,
        stdin: stdin.to_string_lossy().into_owned(),
        ..Plan::script("stty -echo; echo ready; read l; stty size; echo $l >&2; readlink /proc/self/fd/0; exit 3")
    };
    pod.run("c1", &plan).await;
    pod.log_says("c1", "ready").await;
    let resize = ResizePtyRequest { id: "c1".into(), width: 132, height: 40, ..Default::default() };
    pod.task.resize_pty(context(), &resize).await.unwrap();
    let mut writer = OpenOptions::new().write(true).open(&stdin).unwrap();
    writeln!(writer, "typed").unwrap();
    assert_eq!(pod.wait("c1", "").await, 3);
    // Whether the terminal adds carriage returns is runc's business.
    let log = pod.log("c1").replace('\r', "");
    assert!(log.contains("40 132\ntyped\n/dev/pts/0\n"), "{log:?}");
    assert!(!fs::read_to_string(pod.log_path("c1")).unwrap().contains("stderr"));

    pod.run("c2", &Plan::script("sleep 1000")).await;
    let resize = ResizePtyRequest { id: "c2".into(), width: 1, height: 1, ..Default::default() };
    assert_eq!(code(&pod.task.resize_pty(context(), &resize).await.unwrap_err()), Code::FAILED_PRECONDITION);
}
