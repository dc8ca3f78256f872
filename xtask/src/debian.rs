//! Programs from Debian packages, usable on an older Debian without installing anything.
//!
//! A private apt state (own lists, own empty dpkg status, the machine's own mirror and network settings, signatures
//! checked against the archive keyring) downloads packages; `dpkg-deb` unpacks them; patchelf from the same suite
//! points a program's ELF interpreter and library path into the unpacked tree. A wrapper that calls `ld.so` would
//! not do: runc and the containerd shim run `/proc/self/exe` again.
//!
//! Knows nothing of which programs are wanted and why.

use std::env;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::{LONG, SHORT, run};

/// The suite that has CRIU 4.2.1 and containerd 2.1.
pub(crate) const SUITE: &str = "forky";

/// Names another mirror than the one in the machine's own apt sources.
const MIRROR_VARIABLE: &str = "STASIS_DEBIAN_MIRROR";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Package lists younger than this are taken as they are.
const LISTS_FRESH: Duration = Duration::from_secs(24 * 3600);

/// A private apt state.
#[derive(Debug)]
pub(crate) struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Makes the state below `dir`, or takes the one that is there, and loads the package lists if they are old.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        need("apt-get", "apt")?;
        need("dpkg-deb", "dpkg")?;
        if !Path::new(KEYRING).exists() {
            bail!("{KEYRING} is missing: install the package debian-archive-keyring");
        }
        for sub in ["etc", "lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub)).with_context(|| format!("create {}", dir.join(sub).display()))?;
        }
        fs::write(dir.join("status"), "")?;
        let mirror = match env::var(MIRROR_VARIABLE) {
            Ok(mirror) => mirror,
            Err(_) => mirror_of_this_machine()?,
        };
        fs::write(dir.join("etc/sources.list"), format!("deb [signed-by={KEYRING}] {mirror} {SUITE} main\n"))?;
        fs::write(dir.join("apt.conf"), configuration(dir)?)?;
        let apt = Self { dir: dir.to_path_buf() };
        apt.update()?;
        Ok(apt)
    }

    /// Downloads packages into the empty directory `archives`: `resolved` with all that they depend on, `alone`
    /// without.
    pub(crate) fn download(&self, archives: &Path, resolved: &[&str], alone: &[&str]) -> Result<()> {
        fs::create_dir_all(archives.join("partial"))?;
        if !resolved.is_empty() {
            let place = format!("Dir::Cache::archives={}", archives.display());
            let arguments = ["-qq", "-y", "--download-only", "-o", &place, "install"];
            run(self.apt_get().args(arguments).args(resolved), LONG)?;
        }
        if !alone.is_empty() {
            run(self.apt_get().current_dir(archives).args(["-qq", "download"]).args(alone), LONG)?;
        }
        Ok(())
    }

    /// Names of the packages that a package depends on directly, alternatives included.
    pub(crate) fn depends(&self, package: &str) -> Result<Vec<String>> {
        let mut command = Command::new("apt-cache");
        let text = run(command.env("APT_CONFIG", self.dir.join("apt.conf")).args(["depends", package]), LONG)?;
        let names = text.lines().filter_map(|line| line.trim().trim_start_matches('|').strip_prefix("Depends: "));
        Ok(names.map(str::to_owned).collect())
    }

    fn update(&self) -> Result<()> {
        let stamp = self.dir.join("updated");
        let age = fs::metadata(&stamp).and_then(|data| data.modified()).ok().and_then(|time| time.elapsed().ok());
        if age.is_some_and(|age| age < LISTS_FRESH) {
            return Ok(());
        }
        run(self.apt_get().args(["-qq", "update"]), LONG)?;
        fs::write(stamp, "")?;
        Ok(())
    }

    fn apt_get(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.env("APT_CONFIG", self.dir.join("apt.conf")).env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

/// Unpacks every package of `archives` into `root` and returns the packages' names and versions, a line each.
pub(crate) fn unpack(archives: &Path, root: &Path) -> Result<String> {
    let mut packages: Vec<PathBuf> = fs::read_dir(archives)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect();
    packages.sort();
    let mut versions = String::new();
    for package in &packages {
        run(Command::new("dpkg-deb").arg("-x").arg(package).arg(root), LONG)?;
        versions += &run(Command::new("dpkg-deb").arg("-W").arg(package), SHORT)?;
    }
    for unread in ["doc", "man", "locale", "bash-completion", "lintian", "info"] {
        remove_tree(&root.join("usr/share").join(unread))?;
    }
    Ok(versions)
}

/// Directory of the shared libraries in an unpacked tree, relative to its root: `usr/lib/x86_64-linux-gnu`.
pub(crate) fn libraries() -> String {
    format!("usr/lib/{}-linux-gnu", env::consts::ARCH)
}

/// The dynamic loader of an unpacked tree, relative to its root.
pub(crate) fn loader(root: &Path) -> Result<String> {
    let libraries = libraries();
    let dir = root.join(&libraries);
    let entries = fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))?;
    let name = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .find(|name| name.starts_with("ld-linux") && name.contains(".so"))
        .with_context(|| format!("{} holds no dynamic loader", dir.display()))?;
    Ok(format!("{libraries}/{name}"))
}

/// Points a program of the unpacked tree `root` at the loader and libraries of the same tree, which will stand at
/// `place` when the program runs. The tree must hold patchelf.
pub(crate) fn relocate(root: &Path, place: &Path, program: &str) -> Result<()> {
    let loader = loader(root)?;
    let mut patchelf = Command::new(root.join(&loader));
    patchelf.arg("--library-path").arg(root.join(libraries())).arg(root.join("usr/bin/patchelf"));
    patchelf.arg("--set-interpreter").arg(place.join(&loader));
    patchelf.arg("--force-rpath").arg("--set-rpath").arg(place.join(libraries()));
    run(patchelf.arg(root.join(program)), SHORT)?;
    Ok(())
}

/// Writes an executable file.
pub(crate) fn write_program(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Makes the symbolic link `link` to `target`.
pub(crate) fn link(target: impl AsRef<Path>, link: &Path) -> Result<()> {
    symlink(&target, link).with_context(|| format!("link {} to {}", link.display(), target.as_ref().display()))
}

/// Removes a directory with all it holds, if it exists.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The first file of that name in `PATH` or the directories of system programs.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0))
}

fn need(program: &str, package: &str) -> Result<()> {
    if find_program(program).is_none() {
        bail!(
            "{program} is missing (package {package}): what the system lacks comes from Debian packages, \
             which only works on Debian; elsewhere install CRIU 4.2.1 or later, runc 1.2 or later, the CNI plugins, \
             docker-registry, iptables, nft, a static busybox, and for the virtual machine QEMU and e2fsprogs yourself"
        );
    }
    Ok(())
}

/// The mirror from which this machine takes its own release.
fn mirror_of_this_machine() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let value = |key: &str| release.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("").trim_matches('"');
    let (id, codename) = (value("ID="), value("VERSION_CODENAME="));
    if id != "debian" {
        bail!("this machine is {id}, not debian: name a Debian mirror in {MIRROR_VARIABLE}, or install the engines");
    }
    let format = "$(REPO_URI) $(RELEASE) $(COMPONENT)";
    let arguments = ["indextargets", "--format", format, "Created-By: Packages"];
    let targets = run(Command::new("apt-get").args(arguments), LONG)?;
    let mirror = targets.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (uri, suite, component) = (words.next()?, words.next()?, words.next()?);
        let ours = suite == codename || ["stable", "testing", "unstable", "oldstable"].contains(&suite);
        (ours && component == "main").then(|| uri.trim_end_matches('/').to_owned())
    });
    mirror.with_context(|| {
        format!("this machine's apt sources name no mirror for {codename} main: name one in {MIRROR_VARIABLE}")
    })
}

/// The configuration of the private apt: the machine's own network settings, everything else ours.
fn configuration(dir: &Path) -> Result<String> {
    let system = run(Command::new("apt-config").arg("dump"), LONG)?;
    let kept = ["http", "https", "Retries", "Check-", "Queue", "ForceIPv"].map(|key| format!("Acquire::{key}"));
    let mut text = String::new();
    for line in system.lines().filter(|line| kept.iter().any(|key| line.starts_with(key.as_str()))) {
        text += line;
        text.push('\n');
    }
    let dir = dir.display();
    text += &format!(
        r#"Dir::Etc "{dir}/etc";
Dir::Etc::sourcelist "{dir}/etc/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{dir}";
Dir::State::lists "{dir}/lists";
Dir::State::status "{dir}/status";
Dir::Cache "{dir}/cache";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Acquire::Languages {{ "none"; }};
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
"#
    );
    Ok(text)
}
