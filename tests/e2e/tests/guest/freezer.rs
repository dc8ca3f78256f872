//! Freezing with the freezer of version 2: each container's own, and nobody else's.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use stasis_e2e::{COUNTER, check, counts_beyond};
use xtask::cri::container_config;
use xtask::node::Setup;

use crate::{carry, cgroup, keyed, value};

const COUNT_FIRST: u64 = 5;

#[test]
#[ignore = "for the guest of `cargo xtask vm`"]
fn a_checkpoint_freezes_its_own_container_and_no_other() {
    check("freeze", Setup::default(), async |stage| {
        stage.import(&["counter"])?;
        let pod = stage.pod("pod").await?;
        let config = container_config("main", COUNTER, &[]);
        let main = stage.container(&pod, config.clone()).await?;
        let beside = stage.container(&pod, container_config("beside", COUNTER, &[])).await?;
        let held = stage.container(&pod, container_config("held", COUNTER, &[])).await?;
        counts_beyond(&main, COUNT_FIRST).await?;

        // Somebody holds the third one, and goes on holding it.
        let held = cgroup(stage, &held).await?;
        fs::write(held.join("cgroup.freeze"), "1")?;
        let (own, beside_dir) = (cgroup(stage, &main).await?, cgroup(stage, &beside).await?);
        let above = own.parent().context("a pod's cgroup")?.to_path_buf();
        let watch = Watch::start(&[&own, &beside_dir, &above]);
        stage.node.cri.checkpoint(&main, &stage.archive("first.tar")).await?;
        let seen = watch.end()?;
        assert_eq!(seen, [true, false, false], "frozen: the container itself, the one beside it, the pod");
        assert_eq!(value(&held, "cgroup.freeze")?, "1");
        assert_eq!(keyed(&held, "cgroup.events", "frozen")?, 1);
        for dir in [&own, &beside_dir, &above] {
            assert_eq!(value(dir, "cgroup.freeze")?, "0", "{}", dir.display());
        }
        fs::write(held.join("cgroup.freeze"), "0")?;
        let at = counts_beyond(&main, COUNT_FIRST).await?;
        counts_beyond(&main, at).await?;

        let (pod, restored) = carry(stage, &pod, &main, config).await?;
        let at = counts_beyond(&restored, at).await?;
        counts_beyond(&restored, at).await?;
        let dir = cgroup(stage, &restored).await?;
        assert_eq!((value(&dir, "cgroup.freeze")?, keyed(&dir, "cgroup.events", "frozen")?), ("0".to_owned(), 0));
        stage.remove(&pod).await
    });
}

/// Watches which of some cgroups are asked to freeze, in a thread that looks again and again.
struct Watch {
    ended: Arc<AtomicBool>,
    thread: thread::JoinHandle<Result<Vec<bool>>>,
}

impl Watch {
    fn start(dirs: &[&Path]) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let dirs: Vec<_> = dirs.iter().map(|dir| dir.to_path_buf()).collect();
        let end = Arc::clone(&ended);
        let thread = thread::spawn(move || {
            let mut seen = vec![false; dirs.len()];
            while !end.load(Ordering::Acquire) {
                for (dir, seen) in dirs.iter().zip(&mut seen) {
                    *seen |= value(dir, "cgroup.freeze")? == "1";
                }
                thread::sleep(Duration::from_micros(200));
            }
            Ok(seen)
        });
        Self { ended, thread }
    }

    fn end(self) -> Result<Vec<bool>> {
        self.ended.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }
}
