//! Clients that are attached to a container: many, slow, and gone.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use common::*;
use stasis_shim_api::{ATTACHED, AttachRequest, METHOD_ATTACH};

/// A client's ends.
struct Client {
    stdin: Option<File>,
    stdout: File,
    stderr: File,
}

async fn attach_as(pod: &Pod, id: &str, name: &str, input: Option<bool>) -> ttrpc::Result<Client> {
    let fifo = |stream: &str| pod.fifo(&format!("{name}.{stream}"));
    let reader = |path: &PathBuf| OpenOptions::new().read(true).custom_flags(0o4000).open(path).unwrap();
    let (stdin, stdout, stderr) = (input.map(|_| fifo("in")), fifo("out"), fifo("err"));
    let (out, err) = (reader(&stdout), reader(&stderr));
    // Opened in both directions it needs nobody at the other end.
    let input_end = stdin.as_ref().map(|path| OpenOptions::new().read(true).write(true).open(path).unwrap());
    let request = AttachRequest {
        id: id.to_owned(),
        stdin: stdin.clone(),
        stdout: Some(stdout),
        stderr: Some(stderr),
        ends_stdin: input.unwrap_or(false),
    };
    call(pod, METHOD_ATTACH, serde_json::to_vec(&request).unwrap()).await?;
    // With the shim at the other end it can be a writer alone.
    let writer = stdin.map(|path| OpenOptions::new().write(true).open(path).unwrap());
    drop(input_end);
    Ok(Client { stdin: writer, stdout: out, stderr: err })
}

/// Reads until the text is as wanted, or the end.
async fn read_until(file: &mut File, wanted: impl Fn(&str) -> bool) -> String {
    let mut text = String::new();
    let mut buffer = vec![0; 1 << 16];
    let mut ended = false;
    eventually("output for a client", || {
        // All that is there: the writer does not wait.
        loop {
            match file.read(&mut buffer) {
                Ok(0) => ended = true,
                Ok(length) => text.push_str(&String::from_utf8_lossy(&buffer[..length])),
                Err(error) => {
                    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                    return wanted(&text);
                }
            }
            if ended || wanted(&text) {
                return true;
            }
        }
    })
    .await;
    text
}

fn descriptors(pod: &Pod) -> usize {
    fs::read_dir(format!("/proc/{}/fd", pod.shim_pid())).unwrap().count()
}

fn plan(script: &str) -> Plan {
    Plan { stdin: ATTACHED.to_owned(), ..Plan::script(script) }
}

#[tokio::test]
async fn several_clients_get_the_same_output_and_share_the_input() {
    let pod = Pod::start().await;
    pod.run("c1", &plan("while read l; do echo out $l; echo err $l >&2; done; echo end; exit 4")).await;
    let mut first = attach_as(&pod, "c1", "first", Some(false)).await.unwrap();
    let mut second = attach_as(&pod, "c1", "second", Some(true)).await.unwrap();
    writeln!(first.stdin.as_mut().unwrap(), "one").unwrap();
    for client in [&mut first, &mut second] {
        assert_eq!(read_until(&mut client.stdout, |text| text.ends_with('\n')).await, "out one\n");
        assert_eq!(read_until(&mut client.stderr, |text| text.ends_with('\n')).await, "err one\n");
    }
    // The end of this client's input is not the container's.
    first.stdin = None;
    writeln!(second.stdin.as_mut().unwrap(), "two").unwrap();
    assert_eq!(read_until(&mut first.stdout, |text| text.ends_with('\n')).await, "out two\n");
    // The end of that one's is.
    second.stdin = None;
    assert_eq!(pod.wait("c1", "").await, 4);
    for client in [&mut first, &mut second] {
        assert!(read_until(&mut client.stdout, |_| false).await.ends_with("end\n"));
    }
    assert_eq!(pod.log("c1"), "out one\nerr one\nout two\nerr two\nend\n");
}

#[tokio::test]
async fn a_client_that_does_not_read_delays_nobody_and_is_told_what_it_missed() {
    // Twice what a client's FIFO holds, at a pace that a client which reads keeps up with.
    const ROUNDS: usize = 50;
    const LINES: usize = 10_000;
    let pod = Pod::start().await;
    let script = format!(
        "read go; i=0; while [ $i -lt {ROUNDS} ]; do seq 1 {LINES}; sleep 0.05; i=$((i+1)); done; \
         echo done; read go; echo on; sleep 1000"
    );
    pod.run("c1", &plan(&script)).await;
    let mut slow = attach_as(&pod, "c1", "slow", Some(false)).await.unwrap();
    let mut quick = attach_as(&pod, "c1", "quick", None).await.unwrap();
    writeln!(slow.stdin.as_mut().unwrap(), "go").unwrap();
    let all = read_until(&mut quick.stdout, |text| text.ends_with("done\n")).await;
    assert_eq!(all.lines().count(), ROUNDS * LINES + 1);
    pod.log_says("c1", "done\n").await;
    assert!(pod.log("c1") == all);
    let begin = read_until(&mut slow.stdout, |text| text.len() > 900_000).await;
    assert!(all.starts_with(&begin) && begin.len() < all.len());
    // It goes on with a notice and whole lines.
    writeln!(slow.stdin.as_mut().unwrap(), "go").unwrap();
    let on = read_until(&mut slow.stdout, |text| text.contains("reads too slowly]\n")).await;
    assert!(on.contains(" bytes are left out here"), "{on:?}");
}

#[tokio::test]
async fn clients_that_go_leave_nothing_in_the_shim() {
    let pod = Pod::start().await;
    // It writes nothing, so that the shim learns of nobody by a failed write.
    pod.run("c1", &plan("sleep 1000")).await;
    drop(attach_as(&pod, "c1", "warm", Some(false)).await.unwrap());
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let before = descriptors(&pod);
    for round in 0..100 {
        drop(attach_as(&pod, "c1", &format!("client-{round}"), Some(round % 2 == 0)).await.unwrap());
    }
    eventually("the clients' descriptors to go", || descriptors(&pod) <= before).await;
    let status = fs::read_to_string(format!("/proc/{}/status", pod.shim_pid())).unwrap();
    let resident = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kib: u64 = resident.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 6 << 10, "{resident}");
}

#[tokio::test]
async fn what_cannot_be_attached_to_is_said() {
    let pod = Pod::start().await;
    pod.run("c1", &Plan::script("sleep 1000")).await;
    let refused = attach_as(&pod, "c1", "input", Some(false)).await.err().unwrap();
    assert_eq!(code(&refused), Code::FAILED_PRECONDITION);
    assert!(refused.to_string().contains("without an input"), "{refused}");
    assert_eq!(code(&attach_as(&pod, "nobody", "other", None).await.err().unwrap()), Code::NOT_FOUND);
    let mut clients = Vec::new();
    let refused = loop {
        match attach_as(&pod, "c1", &format!("c{}", clients.len()), None).await {
            Ok(client) => clients.push(client),
            Err(error) => break error,
        }
        assert!(clients.len() < 100);
    };
    assert_eq!(code(&refused), Code::FAILED_PRECONDITION);
    assert!(refused.to_string().contains("attached clients"), "{refused}");
}
