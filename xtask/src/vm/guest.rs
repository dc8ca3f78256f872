//! The guest: a small Debian on a disk image, made of packages and a few files of our own.
//!
//! ```text
//! <dev>/vm/vmlinuz     the stock kernel
//! <dev>/vm/initramfs   what finds the disk
//! <dev>/vm/disk        ext4; never written to by a machine
//! <dev>/vm/exchange    shared with the guest: what it runs, and what came of it
//! <dev>/vm/.recipe     what these were made by
//! ```
//! No package script is run: the guest starts one unit of ours and nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::kernel::Kernel;
use super::machine;
use crate::debian::{self, Apt, link, remove_tree, write_program};
use crate::layout::hex;
use crate::places::Places;
use crate::process::{LONG, SHORT, run};

/// With everything that they depend on. CRIU calls tar and gzip, and not those of busybox.
const PACKAGES: [&str; 6] = ["base-files", "systemd", "apparmor", "kmod", "tar", "gzip"];

/// Depends on the current kernel.
const KERNEL: &str = "linux-image-amd64";

/// Beginnings of the names of packages that a kernel is spread over.
const KERNEL_PARTS: [&str; 3] = ["linux-image-", "linux-binary-", "linux-modules-"];

/// Holds the guest and what nodes store; the file is sparse.
const DISK_BYTES: u64 = 6 << 30;

/// The directory of an unpacked package tree that only tools for people need.
const UNREAD: [&str; 4] = ["usr/share/zoneinfo", "usr/lib/udev", "usr/lib/x86_64-linux-gnu/gconv", "usr/share/perl5"];

const UNIT: &str = "\
[Unit]
Description=The tests
DefaultDependencies=no
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
Type=oneshot
ExecStart=/stasis-start
StandardInput=tty-force
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
TTYReset=no
Environment=TERM=dumb
Delegate=no
LimitNOFILE=1048576
TasksMax=infinity
";

/// The first program of ours in the guest: everything that differs from run to run is in the shared directory.
const START: &str = r#"#!/bin/sh
export PATH=/usr/sbin:/usr/bin HOME=/root
mkdir -p /exchange
mount -t 9p -o OPTIONS exchange /exchange || exit 1
mount --make-rshared /
ip link set lo up
modprobe -a overlay br_netfilter
sysctl -qw kernel.printk=1 net.ipv4.ip_forward=1
echo "the guest is up after $(cut -d' ' -f1 /proc/uptime) seconds"
. /exchange/run
sync
"#;

/// Where the guest's files are.
pub(super) fn place(places: &Places) -> PathBuf {
    places.dev.join("vm")
}

/// Makes the guest unless it is there and fresh. `tools` is the prefix with mke2fs; the caller holds the lock of the
/// development directory.
pub(super) fn set_up(places: &Places, tools: &Path) -> Result<()> {
    let place = place(places);
    let mark = mark(places)?;
    let complete = || ["vmlinuz", "initramfs", "disk"].iter().all(|name| place.join(name).is_file());
    if fs::read_to_string(place.join(".recipe")).is_ok_and(|found| found == mark) && complete() {
        return Ok(());
    }
    let draft = places.dev.join(format!("vm.draft.{}", process::id()));
    remove_tree(&draft)?;
    let made = make(places, tools, &draft).and_then(|()| {
        fs::write(draft.join(".recipe"), mark)?;
        remove_tree(&place)?;
        fs::rename(&draft, &place).with_context(|| format!("move {} into place", draft.display()))
    });
    if made.is_err() {
        remove_tree(&draft)?;
    }
    made.context("set up the guest")
}

fn mark(places: &Places) -> Result<String> {
    let mut hasher = Sha256::new();
    for source in [include_str!("guest.rs"), include_str!("kernel.rs"), include_str!("initramfs.rs")] {
        hasher.update(source);
    }
    hasher.update(fs::read(places.engines().join(".recipe")).context("the engines are not set up")?);
    Ok(hex(&hasher.finalize()))
}

fn make(places: &Places, tools: &Path, draft: &Path) -> Result<()> {
    let (archives, root) = (draft.join("archives"), draft.join("root"));
    let apt = Apt::open(&places.dev.join("apt"))?;
    let kernel = kernel_packages(&apt)?;
    let kernel: Vec<&str> = kernel.iter().map(String::as_str).collect();
    apt.download(&archives, &PACKAGES, &kernel)?;
    debian::unpack(&archives, &root)?;
    remove_tree(&archives)?;

    let kernel = Kernel::find(&root)?;
    fs::rename(kernel.image()?, draft.join("vmlinuz"))?;
    kernel.prune()?;
    let busybox = places.engines().join("bin/busybox");
    fs::write(draft.join("initramfs"), kernel.initramfs(&busybox)?)?;

    furnish(&root, &busybox)?;
    let disk = draft.join("disk");
    fs::File::create(&disk)?.set_len(DISK_BYTES)?;
    let mut mke2fs = Command::new(tools.join("bin/mke2fs"));
    mke2fs.args(["-q", "-t", "ext4", "-E", "lazy_itable_init=1,nodiscard", "-d"]).arg(&root).arg(&disk);
    run(&mut mke2fs, LONG)?;
    remove_tree(&root)
}

/// The packages of the current kernel.
fn kernel_packages(apt: &Apt) -> Result<Vec<String>> {
    let of_kernel = |name: &String| KERNEL_PARTS.iter().any(|part| name.starts_with(part));
    let image = apt.depends(KERNEL)?.into_iter().find(of_kernel);
    let image = image.with_context(|| format!("{KERNEL} depends on no kernel"))?;
    let mut packages: Vec<String> = apt.depends(&image)?.into_iter().filter(of_kernel).collect();
    packages.push(image);
    Ok(packages)
}

/// What no package brings: users, a shell, and what is started.
fn furnish(root: &Path, busybox: &Path) -> Result<()> {
    for unread in UNREAD {
        remove_tree(&root.join(unread))?;
    }
    let bin = root.join("usr/bin");
    fs::copy(busybox, bin.join("busybox")).context("copy busybox")?;
    let applets = run(Command::new(busybox).arg("--list"), SHORT)?;
    for applet in applets.lines() {
        let taken = bin.join(applet).symlink_metadata().is_ok()
            || root.join("usr/sbin").join(applet).symlink_metadata().is_ok();
        if !taken {
            link("busybox", &bin.join(applet))?;
        }
    }
    for (name, text) in [
        ("passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n"),
        ("group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
        ("hostname", "guest\n"),
        ("fstab", ""),
        ("machine-id", "5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e\n"),
    ] {
        fs::write(root.join("etc").join(name), text).with_context(|| format!("write /etc/{name} of the guest"))?;
    }
    fs::write(root.join("etc/systemd/system/stasis.service"), UNIT).context("write the guest's unit")?;
    write_program(&root.join("stasis-start"), &START.replace("OPTIONS", machine::OPTIONS))
}
