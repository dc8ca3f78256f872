//! What a checkpoint may be asked for: by the configuration, by a pod, by the command line, and what is refused.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use stasis_cri_api::runtime::{ContainerConfig, Mount};
use stasis_e2e::{Stage, check, counts, counts_beyond, eventually, shell};
use tonic::Code;
use xtask::cri::{Container, container_config, messages, refusal};
use xtask::node::Setup;

/// Counts on a connection between two processes of the container; the receiver writes to its output.
const CONNECTED: &str = "tail -f /dev/null | nc -l -p 5555 & sleep 0.5; n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.1; done | \
                         nc 127.0.0.1 5555; echo closed; tail -f /dev/null";

/// Pods of this node may ask for these.
const POD_OPTIONS: &str = "[runtimes.runc]\ncheckpoint_pod_options = [\"tcp-established\", \"compression\"]\n";

fn setup() -> Setup {
    Setup { more: POD_OPTIONS.to_owned(), ..Setup::default() }
}

#[test]
fn connections_are_kept_where_that_is_asked_for_and_allowed() {
    check("tcp", setup(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("plain").await?;
        let container = stage.script(&pod, "main", CONNECTED).await?;
        counts_beyond(&container, 3).await?;
        let archive = stage.archive("tcp.tar");
        let (code, message) = refusal(stage.node.cri.checkpoint(&container, &archive).await)?;
        assert_eq!(code, Code::FailedPrecondition, "{message}");
        ensure!(message.contains("127.0.0.1:5555") && message.contains("tcp-established=true"), "{message}");
        is_unharmed(&container, &archive).await?;

        let path = archive.display().to_string();
        stage.stasis(&["checkpoint", "create", &container.id, &path, "--option", "tcp-established"])?;
        connection_is_whole(&container).await?;
        stage.remove(&pod).await?;

        // In another pod, with another address, the connection is gone, and the processes are told so.
        let pod = stage.pod("other").await?;
        let restored = stage.container(&pod, container_config("main", &path, &[])).await?;
        eventually("the end of the connection", async || {
            Ok(messages(&restored.log).iter().any(|message| message == "closed").then_some(()))
        })
        .await?;
        stage.remove(&pod).await
    });
}

/// Nothing was lost on the connection, and more comes.
async fn connection_is_whole(container: &Container) -> Result<()> {
    let at = counts_beyond(container, 0).await?;
    counts_beyond(container, at + 5).await?;
    let counts = counts(container);
    ensure!(counts.iter().zip(1..).all(|(count, expected)| *count == expected), "{counts:?}");
    Ok(())
}

async fn is_unharmed(container: &Container, archive: &Path) -> Result<()> {
    ensure!(!archive.exists(), "there is an archive");
    connection_is_whole(container).await
}

#[test]
fn a_pod_asks_by_annotations_for_what_its_handler_lets_it() {
    check("annot", setup(), async |stage| {
        stage.import(&["busybox"])?;
        let mut config = stage.node.pod_config("asking");
        config.annotations.insert("checkpoint.stasis/tcp-established".into(), "true".into());
        config.annotations.insert("checkpoint.stasis/compression".into(), "zstd".into());
        let pod = stage.node.cri.run_pod(config).await?;
        let container = stage.script(&pod, "main", CONNECTED).await?;
        counts_beyond(&container, 3).await?;
        let archive = stage.archive("annotated.tar.zst");
        stage.node.cri.checkpoint(&container, &archive).await?;
        assert_eq!(fs::read(&archive)?[..4], [0x28, 0xb5, 0x2f, 0xfd], "zstd's magic");
        connection_is_whole(&container).await?;
        stage.remove(&pod).await?;

        for (name, value, expected) in [
            ("link-remap", "true", Code::PermissionDenied),
            ("config", "/etc/criu/evil.conf", Code::InvalidArgument),
            ("compression", "xz", Code::InvalidArgument),
        ] {
            let mut config = stage.node.pod_config(&format!("refused-{name}"));
            config.annotations.insert(format!("checkpoint.stasis/{name}"), value.into());
            let pod = stage.node.cri.run_pod(config).await?;
            let container = stage.script(&pod, "main", "sleep 1000").await?;
            let (code, message) = refusal(stage.node.cri.checkpoint(&container, &stage.archive("no.tar")).await)?;
            ensure!(code == expected && message.contains(name), "{code:?} {message}");
            stage.remove(&pod).await?;
        }
        Ok(())
    });
}

#[test]
fn a_compressed_archive_brings_shared_memory_and_volumes_along() {
    check("shm", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let volume = stage.node.ground.disk.join("volume");
        fs::create_dir_all(&volume)?;
        fs::write(volume.join("kept"), "in the volume")?;
        // Descriptor 3 is a file of /dev/shm, which has to be there for the restore.
        let script = "echo shared > /dev/shm/file; exec 3</dev/shm/file; n=0; \
                      while :; do n=$((n + 1)); echo count $n; sleep 0.1; done";
        let mut config = shell("main", script);
        config.mounts.push(Mount {
            container_path: "/data".into(),
            host_path: volume.display().to_string(),
            ..Mount::default()
        });
        for codec in [&["compression=zstd", "compression-level=3"][..], &["compression=lz4"]] {
            goes_on_with_its_files(stage, &config, codec).await?;
        }
        Ok(())
    });
}

async fn goes_on_with_its_files(stage: &mut Stage, config: &ContainerConfig, codec: &[&str]) -> Result<()> {
    let mut config = config.clone();
    let pod = stage.pod("first").await?;
    let container = stage.container(&pod, config.clone()).await?;
    counts_beyond(&container, 3).await?;
    let archive = stage.archive("shm.tar.compressed").display().to_string();
    let options = codec.iter().chain(&["include-volumes=/data", "include-log=false"]);
    let options = options.flat_map(|option| ["--option", option]);
    let arguments = ["checkpoint", "create", &container.id, &archive].into_iter().chain(options).collect::<Vec<_>>();
    stage.stasis(&arguments)?;
    let inspection = stage.stasis(&["checkpoint", "inspect", &archive, "-o", "json"])?;
    for (member, there) in [("devshm-checkpoint.tar", true), ("volumes/data.tar", true), ("container.log", false)] {
        ensure!(inspection.contains(&format!("{member:?}")) == there, "{member}: {inspection}");
    }
    stage.remove(&pod).await?;

    let pod = stage.pod("second").await?;
    config.image = container_config("main", &archive, &[]).image;
    let restored = stage.container(&pod, config).await?;
    counts_beyond(&restored, 5).await?;
    assert_eq!(stage.sh(&restored, "cat /dev/shm/file; cat /proc/1/fd/3").await?, "shared\nshared");
    stage.remove(&pod).await
}

#[test]
fn a_container_may_be_stopped_and_a_larger_deleted_file_kept() {
    check("ghost", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let script = "dd if=/dev/urandom of=/large bs=1M count=2 2>/dev/null; exec 3</large; sum=$(md5sum < /large); \
                      rm /large; n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.1; \
                      [ ! -e /verify ] || [ \"$(md5sum <&3)\" != \"$sum\" ] || exit 7; done";
        let pod = stage.pod("first").await?;
        let container = stage.script(&pod, "main", script).await?;
        counts_beyond(&container, 3).await?;
        let archive = stage.archive("ghost.tar").display().to_string();
        let (code, message) = refusal(stage.node.cri.checkpoint(&container, Path::new(&archive)).await)?;
        ensure!(code == Code::FailedPrecondition && message.contains("ghost-limit"), "{message}");
        let create = ["checkpoint", "create", &container.id, &archive, "--stop", "--option", "ghost-limit=4194304"];
        let said = stage.stasis(&create)?;
        ensure!(said.contains("it has been stopped"), "{said}");
        stage.exited(&container).await?;
        let last = *counts(&container).last().unwrap_or(&0);
        stage.remove(&pod).await?;

        let pod = stage.pod("second").await?;
        let restored = stage.container(&pod, container_config("main", &archive, &[])).await?;
        let carried = counts(&restored);
        ensure!(carried.get(last as usize - 1) == Some(&last), "it goes on from {last}: {carried:?}");
        counts_beyond(&restored, last + 3).await?;
        stage.sh(&restored, "touch /verify").await?;
        assert_eq!(stage.exited(&restored).await?.exit_code, 7, "the deleted file came along");
        stage.remove(&pod).await
    });
}

#[test]
fn options_that_do_not_exist_are_refused_by_name() {
    check("optname", Setup::default(), async |stage: &mut Stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("plain").await?;
        let container = stage.script(&pod, "main", "sleep 1000").await?;
        let archive = stage.archive("no.tar").display().to_string();
        let create = ["checkpoint", "create", &container.id, &archive, "--option", "action-script=/bin/sh"];
        let error = stage.stasis(&create).expect_err("refused").to_string();
        ensure!(error.contains("no checkpoint option \"action-script\"") && error.contains("file-locks"), "{error}");
        eventually("no archive", async || Ok((!Path::new(&archive).exists()).then_some(()))).await?;
        stage.remove(&pod).await
    });
}
