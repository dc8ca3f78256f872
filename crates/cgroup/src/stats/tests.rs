//! The accounts: recorded files of both versions, and this host's own counters against what a process did.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::files::{pressure, size_name};
use super::*;
use crate::parse::Hierarchy;
use crate::tests::{Scratch, probe};
use crate::{Cgroup, Mode, cgroup::Place};

fn recorded(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

/// A cgroup whose files lie in a directory of recordings.
fn cgroup_of(mode: Mode, dir: &Path) -> Cgroup {
    let controllers = ["cpu", "cpuacct", "memory", "pids", "blkio"].map(str::to_owned).to_vec();
    let hierarchy = Hierarchy {
        mount: dir.parent().unwrap().to_owned(),
        root: "/".into(),
        unified: mode == Mode::V2,
        controllers: if mode == Mode::V2 { Vec::new() } else { controllers },
        name: None,
    };
    let path = format!("/{}", dir.file_name().unwrap().to_str().unwrap());
    let place = Place::new(&hierarchy, &path);
    Cgroup::new(mode, path, vec![place])
}

#[test]
fn files_of_version_1_are_read() {
    let stats = cgroup_of(Mode::V1, &recorded("stats-v1")).stats(Detail::Full).unwrap();
    let cpu = stats.cpu.unwrap();
    assert_eq!((cpu.usage, cpu.user, cpu.system), (436_382_422, Some(315_979_099), Some(87_984_377)));
    let throttling = Throttling { periods: 21, throttled_periods: 21, throttled: 678_378_020 };
    assert_eq!((cpu.throttling, cpu.pressure), (Some(throttling), None));
    let memory = stats.memory.unwrap();
    assert_eq!((memory.usage, memory.limit), (32_944_128, Some(268_435_456)));
    assert_eq!(memory.working_set(), 32_944_128 - 31_543_296);
    assert_eq!(memory.available(), Some(268_435_456 - (32_944_128 - 31_543_296)));
    assert_eq!((memory.anonymous, memory.cache, memory.mapped), (172_032, 31_567_872, 4096));
    assert_eq!((memory.page_faults, memory.major_page_faults), (14_777, 3));
    assert_eq!((memory.max_usage, memory.kernel, memory.limit_hits), (Some(33_861_632), Some(1_011_712), Some(0)));
    assert_eq!((memory.swap, memory.swap_limit), (Some(0), Some(299_999_232 - 268_435_456)));
    assert_eq!((memory.oom_kills, memory.pressure), (Some(0), None));
    assert_eq!(stats.pids, Some(Pids { current: 2, limit: None }));
    let sda = Device { major: 8, minor: 16, read_bytes: 24_248_320, write_bytes: 1_310_720, reads: 412, writes: 17 };
    assert_eq!(stats.devices[0], sda);
    assert_eq!(stats.devices.len(), 2, "the sum is no device");
    assert_eq!(stats.io_pressure, None);
}

#[test]
fn files_of_version_2_are_read() {
    let stats = cgroup_of(Mode::V2, &recorded("stats-v2")).stats(Detail::Full).unwrap();
    let cpu = stats.cpu.unwrap();
    let nanoseconds = (1_732_842_000, Some(1_401_221_000), Some(331_621_000));
    assert_eq!((cpu.usage, cpu.user, cpu.system), nanoseconds);
    let throttling = Throttling { periods: 52, throttled_periods: 31, throttled: 2_104_377_000 };
    assert_eq!(cpu.throttling, Some(throttling));
    assert!(cpu.pressure.unwrap().some.total > 0);
    let memory = stats.memory.unwrap();
    assert_eq!((memory.usage, memory.limit, memory.max_usage), (26_849_280, Some(268_435_456), Some(29_360_128)));
    assert_eq!(memory.working_set(), 26_849_280 - 18_944_000);
    assert_eq!((memory.anonymous, memory.cache, memory.mapped), (2_174_976, 23_179_264, 1_110_016));
    assert_eq!((memory.kernel, memory.page_faults, memory.major_page_faults), (Some(1_355_776), 11_382, 47));
    assert_eq!((memory.swap, memory.swap_limit), (Some(0), None));
    assert_eq!((memory.limit_hits, memory.oom_kills), (Some(4), Some(1)));
    assert!(memory.pressure.is_some() && stats.io_pressure.is_some());
    assert_eq!(stats.pids, Some(Pids { current: 3, limit: Some(1024) }));
    let disk = Device { major: 254, minor: 0, read_bytes: 21_020_672, write_bytes: 4096, reads: 388, writes: 1 };
    assert_eq!(stats.devices, [disk], "a device without counters is none");
}

#[test]
fn what_the_kernel_does_not_have_is_absent_and_never_zero() {
    let dir = tempfile::tempdir().unwrap();
    for mode in [Mode::V1, Mode::V2] {
        let stats = cgroup_of(mode, dir.path()).stats(Detail::Full).unwrap();
        assert_eq!(stats, Stats::default(), "{mode:?}");
    }
    fs::write(dir.path().join("memory.current"), "4096\n").unwrap();
    let memory = cgroup_of(Mode::V2, dir.path()).stats(Detail::Usage).unwrap().memory.unwrap();
    assert_eq!((memory.usage, memory.swap, memory.available()), (4096, None, None));
    let gone = cgroup_of(Mode::V2, &dir.path().join("gone")).stats(Detail::Usage).unwrap_err();
    assert!(gone.is_not_found(), "{gone}");
}

#[test]
fn what_makes_no_sense_is_told_with_its_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("memory.current"), "many\n").unwrap();
    let error = cgroup_of(Mode::V2, dir.path()).stats(Detail::Usage).unwrap_err().to_string();
    assert!(error.contains("memory.current: expected a number, found \"many"), "{error}");
}

#[test]
fn pressure_is_told_in_nanoseconds() {
    let text = "some avg10=1.53 avg60=0.87 avg300=0.14 total=58761\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
    let pressure = pressure(text).unwrap();
    assert_eq!(pressure.some, Stall { total: 58_761_000, avg10: 1.53, avg60: 0.87, avg300: 0.14 });
    assert_eq!(pressure.full.total, 7000);
    for odd in ["", "some", "some avg10=x", "some total=18446744073709551615"] {
        assert_eq!(super::files::pressure(odd), None, "{odd}");
    }
}

#[test]
fn sizes_of_huge_pages_are_named_as_the_kernel_names_its_files() {
    for (kibibytes, name) in [(64, "64KB"), (2048, "2MB"), (32_768, "32MB"), (1_048_576, "1GB")] {
        assert_eq!(size_name(kibibytes), name);
    }
}

#[test]
fn the_counters_of_this_host_show_what_a_process_did() {
    let cgroups = probe();
    let mut scratch = Scratch::new(&cgroups);
    let before = scratch.cgroup.stats(Detail::Full).unwrap();
    assert_eq!(before.pids.map(|pids| pids.current), Some(0));
    // Four million bytes in a shell's variable, and a loop that uses the processor.
    scratch.run("text=$(head -c 4000000 /dev/zero | tr '\\0' x); while :; do :; done");
    let deadline = Instant::now() + Duration::from_secs(60);
    let after = loop {
        let stats = scratch.cgroup.stats(Detail::Full).unwrap();
        let used = stats.cpu.as_ref().unwrap().usage - before.cpu.as_ref().unwrap().usage;
        let memory = stats.memory.as_ref().unwrap();
        if used > 200_000_000 && memory.anonymous > 4_000_000 {
            break stats;
        }
        assert!(Instant::now() < deadline, "the counters stand still: {stats:?}");
        std::thread::sleep(Duration::from_millis(20));
    };
    let memory = after.memory.unwrap();
    assert!(memory.working_set() > 4_000_000 && memory.page_faults > 0, "{memory:?}");
    assert!(memory.max_usage >= Some(memory.anonymous), "{memory:?}");
    assert!(after.pids.unwrap().current >= 1);
}
