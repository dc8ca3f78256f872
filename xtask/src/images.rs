//! The test images, each an OCI layout in a tar: `busybox`, `counter`, `redis`, `hog`, `pause`, and `python`, `nginx`, `node`,
//! `java` with what Debian packages.
//!
//! They are made of what is at hand: the static busybox of the engines, Debian's packages, and the workloads in
//! `tests/workloads`. Knows nothing of runtimes and registries.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::debian::{self, Apt};
use crate::layout::{Image, Tree, hex};
use crate::places::Places;
use crate::process::{BUILD, SHORT, run};

/// The images by name.
pub(crate) const NAMES: [&str; 9] = ["busybox", "counter", "redis", "hog", "pause", "python", "nginx", "node", "java"];

/// Of a package, what a running program does not look at.
const UNUSED: [&str; 4] = ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian"];

/// User and group of redis in its image; what Debian gives system users.
const REDIS_UID: u64 = 999;

const REDIS_CONFIGURATION: &str = "bind 0.0.0.0\nport 6379\nprotected-mode no\nsave \"\"\nappendonly no\ndir /data\n";

/// The file of one image.
pub fn path(places: &Places, name: &str) -> PathBuf {
    places.images().join(format!("{name}.tar"))
}

/// Makes those of the images that are missing or that their sources have left behind. Needs the engines.
pub(crate) fn set_up(places: &Places, names: &[&str]) -> Result<()> {
    let _lock = places.lock()?;
    let mark = mark(places)?;
    let made = |name: &str| places.images().join(format!(".recipe-{name}"));
    let is_made =
        |name: &&&str| path(places, name).exists() && fs::read_to_string(made(name)).is_ok_and(|found| found == mark);
    let missing: Vec<&&str> = names.iter().filter(|name| !is_made(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let draft = places.dev.join(format!("images.draft.{}", process::id()));
    debian::remove_tree(&draft)?;
    fs::create_dir_all(&draft)?;
    fs::create_dir_all(places.images())?;
    let done = missing.iter().try_for_each(|name| {
        let image = image(places, name, &draft).with_context(|| format!("make the image {name}"))?;
        let file = draft.join("image.tar");
        image.write(&file, &format!("localhost/{name}:latest"))?;
        fs::rename(&file, path(places, name)).with_context(|| format!("move the image {name} into place"))?;
        fs::write(made(name), &mark).with_context(|| format!("note how the image {name} was made"))
    });
    debian::remove_tree(&draft)?;
    done
}

/// What the images are made by and of.
fn mark(places: &Places) -> Result<String> {
    let mut hasher = Sha256::new();
    hasher.update(include_str!("images.rs"));
    hasher.update(include_str!("layout.rs"));
    hasher.update(fs::read(places.engines().join(".recipe")).context("the engines are not set up")?);
    for name in ["hog.rs", "counter.sh"] {
        hasher.update(read(&workload(places, name))?);
    }
    Ok(hex(&hasher.finalize()))
}

fn image(places: &Places, name: &str, draft: &Path) -> Result<Image> {
    let mut tree = base(places)?;
    let run = match name {
        "busybox" => json!({ "Cmd": ["sh"] }),
        "pause" => json!({ "Cmd": ["sleep", "2147483647"] }),
        "counter" => {
            tree.file("counter.sh", 0o755, read(&workload(places, "counter.sh"))?);
            json!({ "Cmd": ["/counter.sh"] })
        }
        "hog" => {
            tree.file("hog", 0o755, read(&compile(&workload(places, "hog.rs"), draft)?)?);
            json!({ "Cmd": ["/hog"] })
        }
        "redis" => {
            add_redis(places, &mut tree, draft)?;
            json!({ "User": "redis", "WorkingDir": "/data", "Cmd": ["redis-server", "/etc/redis/redis.conf"] })
        }
        "python" => {
            add_packages(places, &mut tree, draft, &["python3-minimal"])?;
            json!({ "Cmd": ["python3"] })
        }
        "nginx" => {
            add_packages(places, &mut tree, draft, &["nginx-light"])?;
            for directory in ["var/log/nginx", "var/lib/nginx"] {
                tree.directory(directory, 0o755, 0);
            }
            json!({ "Cmd": ["nginx", "-g", "daemon off;"] })
        }
        "node" => {
            add_packages(places, &mut tree, draft, &["nodejs"])?;
            json!({ "Cmd": ["node"] })
        }
        "java" => {
            // Rhino runs scripts with Java's own threads, so that nothing has to be compiled.
            add_packages(places, &mut tree, draft, &["openjdk-21-jre-headless", "librhino-java"])?;
            tree.link("usr/bin/java", "../lib/jvm/java-21-openjdk-amd64/bin/java");
            json!({ "Cmd": ["java", "-cp", "/usr/share/java/rhino.jar", "org.mozilla.javascript.tools.shell.Main"] })
        }
        other => bail!("no image is called {other}"),
    };
    Image::new(vec![tree.layer()?], &with_environment(run), &BTreeMap::new())
}

fn with_environment(mut run: Value) -> Value {
    run["Env"] = json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
    run
}

/// Busybox with a link for each applet, and the few files that any image has.
fn base(places: &Places) -> Result<Tree> {
    let busybox = places.engines().join("bin/busybox");
    let mut tree = Tree::default();
    for (link, target) in [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")] {
        tree.directory(target, 0o755, 0);
        tree.link(link, target);
    }
    tree.file("usr/bin/busybox", 0o755, read(&busybox)?);
    let applets = run(Command::new(&busybox).arg("--list"), SHORT)?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        tree.link(&format!("usr/bin/{applet}"), "busybox");
    }
    let users = format!("root:x:0:0:root:/root:/bin/sh\nredis:x:{REDIS_UID}:{REDIS_UID}::/data:/bin/sh\n");
    tree.file("etc/passwd", 0o644, users);
    tree.file("etc/group", 0o644, format!("root:x:0:\nredis:x:{REDIS_UID}:\n"));
    for directory in ["dev", "proc", "sys", "var", "root"] {
        tree.directory(directory, 0o755, 0);
    }
    tree.directory("tmp", 0o1777, 0);
    Ok(tree)
}

/// Debian's redis-server and redis-cli with the libraries that they load, and nothing else of the packages.
fn add_redis(places: &Places, tree: &mut Tree, draft: &Path) -> Result<()> {
    let archives = draft.join("archives");
    Apt::open(&places.dev.join("apt"))?.download(&archives, &["redis-server"], &[])?;
    let root = draft.join("root");
    debian::unpack(&archives, &root)?;
    let loader = debian::loader(&root)?;
    let mut libraries = BTreeSet::new();
    for program in ["redis-server", "redis-cli"] {
        // The name may be a link to a program that looks at its own name.
        let file = root.join("usr/bin").join(program).canonicalize()?;
        tree.file(&format!("usr/bin/{program}"), 0o755, read(&file)?);
        libraries.extend(needed_libraries(&root, &loader, &file)?);
    }
    for library in &libraries {
        let file = root.join(debian::libraries()).join(library);
        tree.file(&format!("{}/{library}", debian::libraries()), 0o644, read(&file)?);
    }
    let name = Path::new(&loader).file_name().and_then(|name| name.to_str()).context("a loader without name")?;
    tree.file(&loader, 0o755, read(&root.join(&loader))?);
    // The interpreter path that the programs name: /lib64 on amd64, /lib elsewhere.
    for directory in ["usr/lib64", "usr/lib"] {
        tree.link(&format!("{directory}/{name}"), &format!("/{loader}"));
    }
    tree.directory("data", 0o755, REDIS_UID);
    tree.file("etc/redis/redis.conf", 0o644, REDIS_CONFIGURATION);
    Ok(())
}

/// Debian's packages with all that they depend on, as they unpack; no script of theirs is run.
fn add_packages(places: &Places, tree: &mut Tree, draft: &Path, packages: &[&str]) -> Result<()> {
    let (archives, root) = (draft.join("archives"), draft.join("root"));
    for dir in [&archives, &root] {
        debian::remove_tree(dir)?;
    }
    Apt::open(&places.dev.join("apt"))?.download(&archives, packages, &[])?;
    debian::unpack(&archives, &root)?;
    add_directory(tree, &root, Path::new(""))
}

fn add_directory(tree: &mut Tree, root: &Path, below: &Path) -> Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        let name = path.to_str().context("a name that is no UTF-8")?.to_owned();
        let facts = entry.metadata()?;
        let mode = facts.permissions().mode() & 0o7777;
        if UNUSED.contains(&name.as_str()) {
            continue;
        }
        if facts.is_symlink() {
            let target = fs::read_link(entry.path())?;
            tree.link(&name, target.to_str().context("a link that is no UTF-8")?);
        } else if facts.is_dir() {
            tree.directory(&name, mode, 0);
            add_directory(tree, root, &path)?;
        } else {
            tree.file(&name, mode, read(&entry.path())?);
        }
    }
    Ok(())
}

/// The file names of the libraries that a program loads, as the tree's own loader resolves them.
fn needed_libraries(root: &Path, loader: &str, program: &Path) -> Result<Vec<String>> {
    let mut command = Command::new(root.join(loader));
    command.arg("--library-path").arg(root.join(debian::libraries())).arg("--list").arg(program);
    let listed = run(&mut command, SHORT)?;
    let names = listed.lines().filter_map(|line| {
        let (name, file) = line.trim().split_once(" => ")?;
        file.starts_with('/').then(|| name.to_owned())
    });
    // The loader lists itself by the path that the program names.
    Ok(names.filter(|name| !name.contains("ld-linux")).collect())
}

/// Compiles one source file to a program that needs no library.
fn compile(source: &Path, draft: &Path) -> Result<PathBuf> {
    let program = draft.join("program");
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args(["--edition", "2024", "-C", "opt-level=2", "-C", "target-feature=+crt-static", "-C", "strip=symbols"]);
    rustc.arg("-o").arg(&program).arg(source);
    run(&mut rustc, BUILD).context("a static program needs libc.a (package libc6-dev)")?;
    Ok(program)
}

fn workload(places: &Places, name: &str) -> PathBuf {
    places.repository.join("tests/workloads").join(name)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}
