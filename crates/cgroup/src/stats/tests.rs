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

/// Recorded under Linux 7.2 in a virtual machine, from a shell with a processor quota that read and wrote a disk.
#[test]
fn files_of_version_2_are_read() {
    let stats = cgroup_of(Mode::V2, &recorded("stats-v2")).stats(Detail::Full).unwrap();
    let cpu = stats.cpu.unwrap();
    assert_eq!((cpu.usage, cpu.user, cpu.system), (859_551_000, Some(798_412_000), Some(61_139_000)));
    let throttling = Throttling { periods: 43, throttled_periods: 42, throttled: 3_349_631_000 };
    assert_eq!(cpu.throttling, Some(throttling));
    let some = Stall { total: 3_492_215_000, avg10: 26.91, avg60: 5.27, avg300: 1.11 };
    assert_eq!(cpu.pressure.unwrap().some, some);
    let memory = stats.memory.unwrap();
    assert_eq!((memory.usage, memory.limit, memory.max_usage), (2_609_152, Some(268_435_456), Some(15_990_784)));
    assert_eq!((memory.working_set(), memory.available()), (2_609_152, Some(268_435_456 - 2_609_152)));
    assert_eq!((memory.anonymous, memory.cache, memory.kernel), (2_146_304, 0, Some(487_424)));
    assert_eq!((memory.page_faults, memory.major_page_faults), (1512, 0));
    assert_eq!((memory.swap, memory.swap_limit), (Some(0), None));
    assert_eq!((memory.limit_hits, memory.oom_kills), (Some(0), Some(0)));
    assert!(memory.pressure.is_some());
    assert_eq!(stats.io_pressure.unwrap().full.total, 9_153_000);
    assert_eq!(stats.pids, Some(Pids { current: 2, limit: Some(1024) }));
    let disk = Device { major: 254, minor: 0, read_bytes: 15_728_640, write_bytes: 16_384, reads: 6, writes: 5 };
    assert_eq!(stats.devices, [disk]);
}

#[test]
fn page_cache_that_is_not_in_use_is_not_in_the_working_set() {
    let cache = "file 23179264\nfile_mapped 1110016\ninactive_file 18944000\nactive_file 4235264\n";
    let memory = Memory { usage: 26_849_280, ..v2::memory(cache) };
    assert_eq!(memory.working_set(), 26_849_280 - 18_944_000);
    assert_eq!((memory.cache, memory.mapped, memory.active_file), (23_179_264, 1_110_016, 4_235_264));
    assert_eq!(Memory { usage: 1, ..memory }.working_set(), 0, "the two are not read at the same instant");
}

#[test]
fn a_device_without_counters_is_none() {
    let devices = v2::devices("7:0 \n254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n");
    assert_eq!(devices.iter().map(|device| (device.major, device.write_bytes)).collect::<Vec<_>>(), [(254, 2)]);
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
