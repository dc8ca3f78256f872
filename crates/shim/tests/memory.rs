//! What a shim costs while its pod does nothing.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;

use common::*;

/// The promise is 5 MB resident for the shim as it is shipped (profile `shim`); the tests' own build has larger code.
const RESIDENT_MAX_KIB: u64 = 6 << 10;

/// A field of a file of `/proc`, in KiB.
fn kib(pid: i32, file: &str, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_pod_of_two_containers_costs_little() {
    let pod = Pod::with_sandbox(&plain_sandbox()).await;
    for id in ["c1", "c2"] {
        pod.run(id, &Plan { namespaces: pod.pinned(), ..Plan::script("seq 1 100000; sleep 1000") }).await;
        pod.log_says(id, "\n100000\n").await;
        pod.exec(id, "echo one; echo two").await;
    }
    let shim = pod.shim_pid();
    let (resident, private) = (kib(shim, "status", "VmRSS:"), kib(shim, "smaps_rollup", "Private_Dirty:"));
    let proportional = kib(shim, "smaps_rollup", "Pss:");
    println!("the shim: {resident} KiB resident, {proportional} proportional, {private} private and dirty");
    assert!(resident <= RESIDENT_MAX_KIB, "{resident} KiB resident");
    assert_eq!(kib(shim, "status", "Threads:"), 1);
}
