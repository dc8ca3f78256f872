//! The virtual machine: QEMU with the kernel's own acceleration where that works, else emulated.
//!
//! Whether acceleration works is found by booting: there are hosts with a `/dev/kvm` that runs no kernel.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::kernel::PROBE;
use crate::process::{shown, wait};

/// Options of a mounted share; the second are for those that nobody changes meanwhile.
pub(super) const OPTIONS: &str = "trans=virtio,version=9p2000.L,msize=512000";
pub(super) const OPTIONS_READONLY: &str = "trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro";

/// Time for an accelerated kernel to run its first program: it takes under a second.
const ACCELERATED_BOOT: Duration = Duration::from_secs(15);

/// What QEMU says when the kernel's acceleration gives up; it does not end then.
const GAVE_UP: &str = "KVM internal error";

/// Memory of the guest: the tests use a few hundred megabytes, most of it page cache.
const MEMORY_MIB: u32 = 3072;

/// Translated code that an emulator keeps, in MiB; with less it translates again and again.
const TRANSLATED_MIB: u32 = 512;

/// A directory of the host that the guest sees at the same path, read only.
#[derive(Debug)]
pub(super) struct Share {
    /// By which the guest asks for it.
    pub(super) tag: String,
    /// Where it is, on both.
    pub(super) dir: PathBuf,
}

/// A machine that can be booted.
#[derive(Debug)]
pub(super) struct Machine {
    files: PathBuf,
    tools: PathBuf,
    accelerated: bool,
}

impl Machine {
    /// The machine with kernel and disk in `files`, and QEMU in the prefix `tools`. The first call after a boot of this
    /// host finds out whether acceleration works.
    pub(super) fn new(files: PathBuf, tools: &Path) -> Result<Self> {
        let mut machine = Self { files, tools: tools.to_path_buf(), accelerated: false };
        machine.accelerated = machine.acceleration_works()?;
        Ok(machine)
    }

    /// Boots and waits for the end. The console is this process's standard output; its input, too, if `interactive`.
    pub(super) fn run(&self, exchange: &Path, shares: &[Share], interactive: bool, limit: Duration) -> Result<()> {
        let mut command = self.command(self.accelerated, "systemd.unit=stasis.service");
        let disk = self.files.join("disk");
        command.arg("-drive").arg(format!("file={},if=virtio,format=raw,snapshot=on", escaped(&disk)));
        command.args(["-device", "virtio-rng-pci"]);
        share(&mut command, "exchange", exchange, "");
        for Share { tag, dir } in shares {
            share(&mut command, tag, dir, ",readonly=on");
        }
        // What the guest writes to its disk is in an unlinked file there.
        command.env("TMPDIR", &self.files);
        if !interactive {
            command.stdin(Stdio::null());
        }
        let way = if self.accelerated { "accelerated" } else { "emulated" };
        eprintln!("booting the guest, {way}");
        let mut child = command.spawn().with_context(|| format!("start {}", shown(&command)))?;
        let status = wait(&mut child, limit).context("the virtual machine")?;
        if !status.success() {
            bail!("the virtual machine ended with {status}: {}", shown(&command));
        }
        Ok(())
    }

    fn command(&self, accelerated: bool, arguments: &str) -> Command {
        let mut command = Command::new(self.tools.join("bin/qemu-system-x86_64"));
        for data in ["qemu", "seabios"] {
            command.arg("-L").arg(self.tools.join("root/usr/share").join(data));
        }
        if accelerated {
            command.args(["-accel", "kvm", "-cpu", "host"]);
        } else {
            command.args(["-accel", &format!("tcg,thread=single,tb-size={TRANSLATED_MIB}"), "-cpu", "max"]);
            // Time goes by the instructions that ran, so that a busy host makes the guest late but breaks no time limit
            // in it; while the guest is idle, time goes as outside.
            command.args(["-icount", "shift=0,sleep=on"]);
        }
        // One processor: emulated, a second one makes nothing faster and CRIU's tricks less predictable.
        command.args(["-machine", "q35", "-smp", "1", "-m", &MEMORY_MIB.to_string()]);
        command.args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]);
        command.arg("-kernel").arg(self.files.join("vmlinuz")).arg("-initrd").arg(self.files.join("initramfs"));
        let always =
            "TERM=dumb console=ttyS0 quiet panic=-1 mitigations=off systemd.show_status=no systemd.log_level=warning";
        command.arg("-append").arg(format!("{always} {arguments}"));
        command
    }

    fn acceleration_works(&self) -> Result<bool> {
        if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(false);
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the boot ID")?;
        let memory = self.files.join("acceleration");
        let remembered = fs::read_to_string(&memory).unwrap_or_default();
        if let Some(works) = remembered.strip_prefix(boot.trim()) {
            return Ok(works.trim() == "works");
        }
        let mut command = self.command(true, PROBE);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start {}", shown(&command)))?;
        let works = says_it_runs(&mut child);
        // It may have ended by itself.
        let _ = child.kill();
        child.wait().context("reap the virtual machine")?;
        fs::write(&memory, format!("{} {}\n", boot.trim(), if works { "works" } else { "fails" }))?;
        Ok(works)
    }
}

/// Whether the guest's first program speaks before acceleration gives up, the machine ends, or time is over.
fn says_it_runs(child: &mut Child) -> bool {
    let (sender, lines) = mpsc::channel();
    let output = child.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn std::io::Read + Send>);
    let errors = child.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn std::io::Read + Send>);
    for pipe in [output, errors].into_iter().flatten() {
        let sender = sender.clone();
        thread::spawn(move || {
            // Nobody listens any more once the answer is known.
            BufReader::new(pipe).lines().map_while(Result::ok).all(|line| sender.send(line).is_ok())
        });
    }
    drop(sender);
    let deadline = Instant::now() + ACCELERATED_BOOT;
    while let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        if line.contains(PROBE) {
            return true;
        }
        if line.contains(GAVE_UP) {
            return false;
        }
    }
    false
}

fn share(command: &mut Command, tag: &str, dir: &Path, more: &str) {
    let dir = escaped(dir);
    let value = format!("local,path={dir},mount_tag={tag},security_model=none,multidevs=remap{more}");
    command.arg("-virtfs").arg(value);
}

/// A path in a QEMU option, where a comma ends the value unless it is doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
