//! The guest is what the other tests take it for.

use std::fs;
use std::path::Path;

use stasis_cgroup::{Cgroups, Mode};

#[test]
#[ignore = "for the guest of `cargo xtask vm`"]
fn the_host_has_version_2_alone_apparmor_and_all_capabilities() {
    let cgroups = Cgroups::probe().unwrap();
    assert_eq!(cgroups.mode(), Mode::V2);
    assert!(Path::new("/sys/fs/cgroup/cgroup.controllers").exists());
    assert!(fs::read_to_string("/sys/module/apparmor/parameters/enabled").unwrap().starts_with('Y'));
    assert_eq!(fs::read_to_string("/proc/1/comm").unwrap().trim(), "systemd");
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let held = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let last: u32 = fs::read_to_string("/proc/sys/kernel/cap_last_cap").unwrap().trim().parse().unwrap();
    assert_eq!(u64::from_str_radix(held.trim(), 16).unwrap(), (1 << (last + 1)) - 1);
}
