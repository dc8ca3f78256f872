//! A registry on loopback, docker-registry of the engines, and how images get into it without any runtime.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::http::{Answer, request};
use crate::layout::{Blob, Image};

/// Time for the registry to answer after its start.
const START: Duration = Duration::from_secs(10);

/// A running registry; it ends with this value.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    address: SocketAddr,
}

impl Registry {
    /// Starts a registry that stores below `dir` and listens on a free port of 127.0.0.1.
    pub fn start(engines: &Path, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr())?;
        let configuration = dir.join("config.json");
        // JSON is YAML, and quotes every path.
        let text = serde_json::json!({
            "version": 0.1,
            "log": { "level": "warn", "accesslog": { "disabled": true } },
            "storage": { "filesystem": { "rootdirectory": dir.join("data") }, "delete": { "enabled": true } },
            "http": { "addr": address.to_string() },
        });
        fs::write(&configuration, serde_json::to_vec(&text)?)?;
        let log = fs::File::create(dir.join("registry.log"))?;
        let child = Command::new(engines.join("bin/docker-registry"))
            .arg("serve")
            .arg(&configuration)
            .env("OTEL_TRACES_EXPORTER", "none")
            // An interrupt at the terminal is for this task, which then ends the registry.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start docker-registry")?;
        let mut registry = Self { child, address };
        registry.wait_until_up(&dir.join("registry.log"))?;
        Ok(registry)
    }

    /// `127.0.0.1:PORT`, with which image references begin.
    pub fn name(&self) -> String {
        self.address.to_string()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as a crash would.
    ///
    /// # Errors
    /// Where the system refuses.
    pub fn end(&mut self) -> Result<()> {
        self.child.kill().context("kill the registry")?;
        self.child.wait().context("reap the registry")?;
        Ok(())
    }

    /// Leaves it running.
    pub fn keep(self) {
        // A server that outlives this process is nobody's to reap here.
        std::mem::forget(self);
    }

    /// Pushes an image and returns its reference.
    pub fn push(&self, image: &Image, repository: &str, tag: &str) -> Result<String> {
        let reference = format!("{}/{repository}:{tag}", self.address);
        for blob in &image.blobs {
            self.push_blob(repository, blob).with_context(|| format!("push {reference}"))?;
        }
        let manifest = &image.manifest;
        let target = format!("/v2/{repository}/manifests/{tag}");
        let answer = self.send("PUT", &target, manifest.media_type, Some(manifest))?;
        expect(&answer, 201).with_context(|| format!("push {reference}"))?;
        Ok(reference)
    }

    fn push_blob(&self, repository: &str, blob: &Blob) -> Result<()> {
        if self.send("HEAD", &format!("/v2/{repository}/blobs/{}", blob.digest), "", None)?.status == 200 {
            return Ok(());
        }
        let upload = self.send("POST", &format!("/v2/{repository}/blobs/uploads/"), "", None)?;
        expect(&upload, 202)?;
        let location = upload.header("Location").context("the registry named no place for the upload")?;
        let target = location.strip_prefix(&format!("http://{}", self.address)).unwrap_or(location);
        let joint = if target.contains('?') { '&' } else { '?' };
        let target = format!("{target}{joint}digest={}", blob.digest);
        expect(&self.send("PUT", &target, "application/octet-stream", Some(blob))?, 201)
    }

    fn send(&self, method: &str, target: &str, content_type: &str, blob: Option<&Blob>) -> Result<Answer> {
        match blob {
            Some(blob) => request(self.address, method, target, content_type, blob.size, &mut blob.reader()?),
            None => request(self.address, method, target, content_type, 0, &mut io::empty()),
        }
    }

    fn wait_until_up(&mut self, log: &Path) -> Result<()> {
        let deadline = Instant::now() + START;
        loop {
            if self.send("GET", "/v2/", "", None).is_ok_and(|answer| answer.status == 200) {
                return Ok(());
            }
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let said = fs::read_to_string(log).unwrap_or_default();
                bail!("docker-registry did not come up: {}", crate::process::tail(&said));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself; both calls then say so, which changes nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn expect(answer: &Answer, status: u16) -> Result<()> {
    if answer.status != status {
        bail!("the registry answered {}: {}", answer.status, String::from_utf8_lossy(&answer.body));
    }
    Ok(())
}
