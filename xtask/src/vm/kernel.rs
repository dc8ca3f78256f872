//! The stock kernel: which of its modules the guest has, and the initramfs that finds the guest's disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::initramfs::Archive;
use crate::debian::{self, remove_tree};
use crate::process::{LONG, run};

/// Directories of modules that a node may use; of the drivers only those below, as they are most of the size.
const KEPT: [&str; 7] = ["arch", "block", "crypto", "fs", "lib", "mm", "net"];

/// Drivers of the machine and of pods' networks.
const DRIVERS: [&str; 12] = [
    "virtio_blk",
    "virtio_pci",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio-rng",
    "virtio_console",
    "virtio_net",
    "net_failover",
    "failover",
    "veth",
    "tun",
    "dummy",
];

/// What the kernel must load before it can see the disk; what is missing here is built in.
const FOR_THE_DISK: [&str; 3] = ["virtio_pci", "virtio_blk", "ext4"];

/// Applets of busybox that [`INIT`] uses.
const APPLETS: [&str; 9] = ["sh", "mount", "umount", "insmod", "sleep", "cat", "echo", "poweroff", "switch_root"];

/// Finds the disk and gives over to the guest's first process. With [`PROBE`] it only says that it runs.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
case "$(cat /proc/cmdline)" in *PROBE*) echo PROBE; poweroff -f; esac
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done < /modules/order
n=0
while [ ! -e /dev/vda ] && [ $n -lt 200 ]; do sleep 0.05; n=$((n + 1)); done
mount -t ext4 /dev/vda /new || { echo "the guest's disk cannot be mounted"; poweroff -f; }
umount /sys /dev /proc
exec switch_root /new /usr/lib/systemd/systemd
"#;

/// What the guest prints when it was only asked whether it runs.
pub(super) const PROBE: &str = "stasis-probe";

/// The kernel of an unpacked tree.
#[derive(Debug)]
pub(super) struct Kernel {
    root: PathBuf,
    release: String,
}

impl Kernel {
    /// The one kernel in the tree.
    pub(super) fn find(root: &Path) -> Result<Self> {
        let dir = root.join("usr/lib/modules");
        let entry = fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))?.next();
        let entry = entry.context("the packages hold no kernel modules")??;
        let release = entry.file_name().into_string().ok().context("a kernel's release is text")?;
        Ok(Self { root: root.to_path_buf(), release })
    }

    fn modules(&self) -> PathBuf {
        self.root.join("usr/lib/modules").join(&self.release)
    }

    /// The kernel itself: in the modules' directory or, before Debian 14, in `/boot`.
    pub(super) fn image(&self) -> Result<PathBuf> {
        let places = [self.modules().join("vmlinuz"), self.root.join(format!("boot/vmlinuz-{}", self.release))];
        places.into_iter().find(|place| place.is_file()).context("the packages hold no kernel")
    }

    /// Drops the drivers of hardware that a virtual machine has not, and lists dependencies of what is left.
    pub(super) fn prune(&self) -> Result<()> {
        let kernel = self.modules().join("kernel");
        let drivers: BTreeSet<String> = DRIVERS.iter().map(ToString::to_string).collect();
        for entry in fs::read_dir(&kernel).with_context(|| format!("list {}", kernel.display()))? {
            let path = entry?.path();
            match path.file_name().and_then(|name| name.to_str()) {
                Some(name) if KEPT.contains(&name) => {}
                Some("drivers") => keep_only(&path, &drivers)?,
                _ => remove_tree(&path)?,
            }
        }
        self.kmod("depmod", &["-b", &self.root.display().to_string(), &self.release])?;
        Ok(())
    }

    /// The initramfs: busybox, the modules for the disk, and a script.
    pub(super) fn initramfs(&self, busybox: &Path) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        for dir in ["bin", "proc", "sys", "dev", "new", "modules"] {
            archive.directory(dir);
        }
        archive.file("bin/busybox", &read(busybox)?);
        for applet in APPLETS {
            archive.link(&format!("bin/{applet}"), "busybox");
        }
        let mut order = String::new();
        for module in self.with_dependencies(&FOR_THE_DISK)? {
            let name = format!("{}.ko", module_name(&module));
            archive.file(&format!("modules/{name}"), &self.unpacked(busybox, &module)?);
            order += &format!("{name}\n");
        }
        archive.file("modules/order", order.as_bytes());
        archive.file("init", INIT.replace("PROBE", PROBE).as_bytes());
        Ok(archive.finish())
    }

    /// Module files, relative to the modules' directory, in the order in which they can be loaded.
    fn with_dependencies(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let text = fs::read_to_string(self.modules().join("modules.dep")).context("read modules.dep")?;
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        let known: BTreeMap<String, (&str, &str)> =
            lines.map(|(file, needs)| (module_name(Path::new(file)), (file, needs))).collect();
        let mut order: Vec<PathBuf> = Vec::new();
        for (file, needs) in names.iter().filter_map(|name| known.get(*name)) {
            // depmod lists what a module needs from the nearest to the farthest.
            for file in needs.split_whitespace().rev().chain([*file]).map(PathBuf::from) {
                if !order.contains(&file) {
                    order.push(file);
                }
            }
        }
        Ok(order)
    }

    /// A module's bytes, uncompressed.
    fn unpacked(&self, busybox: &Path, module: &Path) -> Result<Vec<u8>> {
        let file = self.modules().join(module);
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("ko") => read(&file),
            Some("xz") => {
                let copy = self.root.join("module.ko.xz");
                fs::copy(&file, &copy)?;
                run(Command::new(busybox).arg("unxz").arg(&copy), LONG)?;
                let plain = copy.with_extension("");
                let bytes = read(&plain)?;
                fs::remove_file(plain)?;
                Ok(bytes)
            }
            _ => bail!("{} is compressed in a way that is not known here", file.display()),
        }
    }

    /// Runs one of kmod's programs of the tree, by the name that it looks at.
    fn kmod(&self, name: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(self.root.join(debian::loader(&self.root)?));
        command.arg("--library-path").arg(self.root.join(debian::libraries())).args(["--argv0", name]);
        run(command.arg(self.root.join("usr/bin/kmod")).args(arguments), LONG)
    }
}

/// Removes every file below `dir` whose module is not named, and directories that are empty then.
fn keep_only(dir: &Path, names: &BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            keep_only(&path, names)?;
        } else if !names.contains(&module_name(&path)) {
            fs::remove_file(&path)?;
        }
    }
    // One that still holds something stays.
    let _ = fs::remove_dir(dir);
    Ok(())
}

/// `virtio_blk` of `kernel/drivers/block/virtio_blk.ko.xz`.
fn module_name(file: &Path) -> String {
    let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.split('.').next().unwrap_or_default().to_owned()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}
