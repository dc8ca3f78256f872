//! Image volumes: the files of one image mounted in a container of another.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use stasis_cri_api::runtime::{
    ContainerConfig, ContainerFilter, ImageFilter, ImageSpec, ImageStatusRequest, ListImagesRequest, Mount,
    MountPropagation,
};
use stasis_e2e::{Stage, check, counts, counts_beyond, shell};
use tonic::Code;
use xtask::cri::{container_config, refusal};
use xtask::layout::{Image, Layer};
use xtask::node::Setup;

const DATA: &str = "localhost/data:1";

const COUNT: &str = "n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.1; done";

/// What a layer of the test's has at a path.
enum Entry {
    File(&'static str, u32),
    Link(&'static str),
    Null,
}

fn layer(stage: &Stage, name: &str, entries: &[(&str, Entry)]) -> Result<Layer> {
    let path = stage.node.ground.disk.join(name);
    let mut builder = tar::Builder::new(File::create(&path)?);
    for (at, entry) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(0);
        match entry {
            Entry::File(content, mode) => {
                header.set_mode(*mode);
                header.set_size(content.len() as u64);
                builder.append_data(&mut header, at, content.as_bytes())?;
            }
            Entry::Link(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                builder.append_link(&mut header, at, target)?;
            }
            Entry::Null => {
                header.set_entry_type(tar::EntryType::Char);
                header.set_device_major(1)?;
                header.set_device_minor(3)?;
                builder.append_data(&mut header, at, std::io::empty())?;
            }
        }
    }
    builder.into_inner()?.sync_all()?;
    Layer::of_tar(&path)
}

/// An image of data alone, in two layers, with links that lead out of it.
fn import_data(stage: &Stage) -> Result<()> {
    let lower = [
        ("model/weights", Entry::File("old", 0o644)),
        ("model/gone", Entry::File("gone", 0o644)),
        ("model/deep/er/file", Entry::File("deep", 0o644)),
        ("tool", Entry::File("#!/bin/sh\necho ran\n", 0o4755)),
        ("dev-null", Entry::Null),
        ("out", Entry::Link("/../../../../../../..")),
        ("etc", Entry::Link("../../../../../../etc")),
        ("proc", Entry::Link("/proc/self/root/etc")),
        ("inside", Entry::Link("/model/deep")),
    ];
    let upper = [("model/weights", Entry::File("new", 0o644)), ("model/.wh.gone", Entry::File("", 0o644))];
    let layers = vec![layer(stage, "lower.tar", &lower)?, layer(stage, "upper.tar", &upper)?];
    let archive = stage.node.ground.disk.join("data.tar");
    Image::new(layers, &json!({}), &BTreeMap::new())?.write(&archive, DATA)?;
    stage.stasis(&["import", &archive.display().to_string()])?;
    Ok(())
}

fn volume(sub_path: &str) -> Mount {
    Mount {
        container_path: "/data".into(),
        image: Some(ImageSpec { image: DATA.into(), ..ImageSpec::default() }),
        image_sub_path: sub_path.into(),
        readonly: true,
        ..Mount::default()
    }
}

fn with(name: &str, script: &str, mounts: Vec<Mount>) -> ContainerConfig {
    ContainerConfig { mounts, ..shell(name, script) }
}

/// The directories that hold image volumes, of all pods.
fn mounted(stage: &Stage) -> Result<Vec<PathBuf>> {
    mount_points(&stage.node.ground.state().join("pods")).map(|points| {
        points.into_iter().filter(|point| point.components().any(|c| c.as_os_str() == "volumes")).collect()
    })
}

fn mount_points(below: &std::path::Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    Ok(points.filter(|point| point.starts_with(below)).collect())
}

#[test]
fn an_image_is_a_volume() {
    check("imgvol", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        import_data(stage)?;
        let pod = stage.pod("pod").await?;
        let script = "exec sleep 1000";
        let whole = stage.container(&pod, with("whole", script, vec![volume("")])).await?;
        // An absolute link is the container's own affair: it leads to the container's root.
        assert!(stage.sh(&whole, "cat /data/inside/er/file").await.is_err());
        assert_eq!(stage.sh(&whole, "cat /data/model/weights; ls /data/model | xargs").await?, "newdeep weights");
        assert_eq!(stage.sh(&whole, "echo x 2>/dev/null > /data/x || echo read-only").await?, "read-only");
        let options = stage.sh(&whole, "grep ' /data ' /proc/self/mountinfo | cut -d ' ' -f 6").await?;
        ensure!(["ro", "nosuid", "nodev"].iter().all(|option| options.split(',').any(|o| o == *option)), "{options}");
        assert_eq!(
            stage.sh(&whole, "/data/tool; echo x 2>/dev/null > /data/dev-null || echo no-device").await?,
            "ran\nno-device"
        );
        let status = stage.node.cri.status(&whole).await?;
        let mount = status.mounts.first().context("no mount in the status")?;
        assert_eq!((mount.image.clone().unwrap_or_default().image.as_str(), mount.host_path.as_str()), (DATA, ""));

        // A directory in it, by way of links that stay inside.
        let mut noexec = volume("model/deep");
        noexec.mount_options = vec!["noexec".into()];
        let mut linked = volume("/inside/er");
        linked.container_path = "/linked".into();
        let part = stage.container(&pod, with("part", script, vec![noexec, linked])).await?;
        assert_eq!(
            stage.sh(&part, "cat /data/er/file /linked/file; ls /data /linked | xargs").await?,
            "deepdeep/data: er /linked: file"
        );
        let options = stage.sh(&part, "grep ' /data ' /proc/self/mountinfo | cut -d ' ' -f 6").await?;
        ensure!(options.split(',').any(|option| option == "noexec"), "{options}");
        stage.node.cri.remove(&part).await?;
        assert_eq!(mounted(stage)?.len(), 1, "that of the other container");
        stage.remove(&pod).await?;
        assert!(mounted(stage)?.is_empty());
        Ok(())
    });
}

#[test]
fn an_image_volume_that_cannot_be_is_refused_and_leaves_nothing() {
    check("novol", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        import_data(stage)?;
        let pod = stage.pod("pod").await?;
        let named = |name: &str| {
            let mut mount = volume("");
            mount.image = Some(ImageSpec { image: name.into(), ..ImageSpec::default() });
            mount
        };
        let writable = Mount { readonly: false, ..volume("") };
        let both = Mount { host_path: "/etc".into(), ..volume("") };
        let shared = Mount { propagation: MountPropagation::PropagationBidirectional.into(), ..volume("") };
        let options = Mount { mount_options: vec!["suid".into()], ..volume("") };
        let cases = [
            (named("localhost/absent:1"), Code::NotFound, "ImageVolumeMountFailed"),
            (named("localhost/absent:1"), Code::NotFound, "localhost/absent:1"),
            (named(""), Code::InvalidArgument, "without a name"),
            (volume("absent/dir"), Code::NotFound, "absent/dir"),
            (volume("model/weights"), Code::InvalidArgument, "only directories"),
            // Links of the image lead to nothing of the host, whatever they say.
            (volume("etc"), Code::NotFound, "etc"),
            (volume("proc"), Code::NotFound, "proc"),
            (volume("out/etc"), Code::NotFound, "out/etc"),
            (volume("../../etc"), Code::NotFound, "../../etc"),
            (writable, Code::InvalidArgument, "readonly"),
            (both, Code::InvalidArgument, "only one of them"),
            (shared, Code::InvalidArgument, "propagation"),
            (options, Code::InvalidArgument, "suid"),
        ];
        for (mount, expected, words) in cases {
            let mut good = volume("");
            good.container_path = "/good".into();
            let config = with("main", "exec sleep 1000", vec![good, mount]);
            let (code, message) = refusal(stage.node.cri.create(&pod, config).await)?;
            assert_eq!(code, expected, "{message}");
            ensure!(message.contains(words), "{message}");
            assert!(mounted(stage)?.is_empty(), "{message}");
        }
        // The root of the image, however it is written, is the whole of it.
        let container = stage.container(&pod, with("main", "exec sleep 1000", vec![volume("out")])).await?;
        assert_eq!(stage.sh(&container, "cat /data/model/weights").await?, "new");
        stage.node.cri.remove(&container).await?;
        assert!(stage.node.cri.list(ContainerFilter::default()).await?.is_empty());
        let active = fs::read_dir(stage.node.ground.root().join("snapshots/active"))?.count();
        assert_eq!(active, 0, "layers are held for nobody");
        stage.remove(&pod).await
    });
}

#[test]
fn the_image_of_a_volume_is_kept_while_it_is_used() {
    check("keepvol", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        import_data(stage)?;
        let pod = stage.pod("pod").await?;
        let config = with("main", "exec sleep 1000", vec![volume("model")]);
        let created = stage.node.cri.create(&pod, config).await?;
        assert_eq!(pinned(stage).await?, (true, true), "a collector of images must leave it alone");

        // What a create left that was cut short by the daemon's death.
        let cut_short =
            stage.node.ground.state().join("pods").join(&pod.id).join("volumes").join("0".repeat(64)).join("0");
        fs::create_dir_all(&cut_short)?;
        rustix::mount::mount("tmpfs", &cut_short, "tmpfs", rustix::mount::MountFlags::empty(), None)?;

        // Neither the daemon's death nor the image's removal takes it away.
        stage.node.kill_daemon()?;
        stage.node.restart_daemon().await?;
        assert!(!cut_short.exists(), "nobody stands for it");
        assert_eq!(pinned(stage).await?, (true, true));
        stage.node.cri.remove_image(DATA).await?;
        stage.node.cri.start(&created).await?;
        assert_eq!(stage.sh(&created, "cat /data/weights").await?, "new");
        let layers = || fs::read_dir(stage.node.ground.root().join("snapshots/layers")).map(Iterator::count);
        let with_volume = layers()?;
        stage.node.cri.remove(&created).await?;
        assert_eq!(layers()?, with_volume - 2, "its layers go with the last container that needs them");

        import_data(stage)?;
        let container = stage.container(&pod, with("again", "exec sleep 1000", vec![volume("")])).await?;
        assert_eq!(pinned(stage).await?, (true, true));
        // After a reboot nothing is mounted any more, and the container can be removed all the same.
        stage.node.reboot().await?;
        stage.node.cri.remove(&container).await?;
        assert_eq!(pinned(stage).await?, (false, false));
        assert_eq!(fs::read_dir(stage.node.ground.root().join("snapshots/active"))?.count(), 0);
        stage.remove(&pod).await
    });
}

/// What ImageStatus and ListImages say of the image.
async fn pinned(stage: &mut Stage) -> Result<(bool, bool)> {
    let image = Some(ImageSpec { image: DATA.into(), ..ImageSpec::default() });
    let images = &mut stage.node.cri.images;
    let request = ImageStatusRequest { image: image.clone(), verbose: false };
    let status = images.image_status(request).await?.into_inner().image.context("no image")?;
    let list = images.list_images(ListImagesRequest { filter: Some(ImageFilter { image }) }).await?.into_inner();
    Ok((status.pinned, list.images.first().context("not in the list")?.pinned))
}

#[test]
fn a_container_with_an_image_volume_goes_on_elsewhere() {
    check("volckpt", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        import_data(stage)?;
        let pod = stage.pod("first").await?;
        // A file of the volume is open, and the working directory in it.
        let script = format!("cd /data/deep; exec 3< /data/weights; {COUNT}");
        let container = stage.container(&pod, with("main", &script, vec![volume("model")])).await?;
        counts_beyond(&container, 5).await?;
        let archive = stage.put_away(&pod, &container, "volume.tar").await?;

        let pod = stage.pod("second").await?;
        let restored = container_config("main", &archive, &[]);
        let (code, message) = refusal(stage.node.cri.create(&pod, restored.clone()).await)?;
        assert_eq!(code, Code::InvalidArgument);
        ensure!(message.contains("/data"), "names the mount that is missing: {message}");
        let restored = ContainerConfig { mounts: vec![volume("model")], ..restored };
        let restored = stage.container(&pod, restored).await?;
        let carried = *counts(&restored).last().context("no log was carried over")?;
        counts_beyond(&restored, carried + 3).await?;
        assert_eq!(stage.sh(&restored, "cat /proc/1/fd/3; readlink /proc/1/cwd").await?, "new/data/deep");
        stage.remove(&pod).await
    });
}
