//! AppArmor: our default profile, one of the host's, and none.

use std::fs;
use std::process::Command;

use anyhow::Result;
use stasis_cri_api::runtime::security_profile::ProfileType;
use stasis_cri_api::runtime::{Capability, ContainerConfig, ContainerState};
use stasis_e2e::{Stage, check, shell};
use tonic::Code;
use xtask::cri::{Container, container_config, refusal};
use xtask::node::Setup;
use xtask::process::{SHORT, run};

use crate::{carry, context, profile};

const DEFAULT: &str = "stasis-default (enforce)";
const SLEEP: &str = "while :; do sleep 1; done";

/// Denies one file; everything else is allowed.
const STRICT: &str = "profile stasis-test-strict flags=(attach_disconnected) {
  file,
  capability,
  network,
  signal,
  ptrace,
  deny /etc/passwd r,
}
";

fn confined(name: &str, kind: ProfileType, localhost: &str) -> ContainerConfig {
    let mut config = shell(name, SLEEP);
    context(&mut config).apparmor = profile(kind, localhost);
    config
}

/// The profile of the container's own process, as the kernel tells.
async fn label(stage: &mut Stage, container: &Container) -> Result<String> {
    Ok(fs::read_to_string(stage.process(container).await?.join("attr/current"))?.trim_end().to_owned())
}

#[test]
#[ignore = "for the guest of `cargo xtask vm`"]
fn the_default_profile_confines_who_names_no_other() {
    check("default", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("pod").await?;
        let plain = stage.container(&pod, shell("plain", SLEEP)).await?;
        assert_eq!(label(stage, &plain).await?, DEFAULT);
        assert_eq!(stage.sh(&plain, "cat /proc/self/attr/current").await?, DEFAULT, "what is executed beside it, too");

        // With all that seccomp and capabilities can give, the profile still says no.
        let powerful = |name: &str, kind: ProfileType| {
            let mut config = confined(name, kind, "");
            let context = context(&mut config);
            context.seccomp = profile(ProfileType::Unconfined, "");
            context.capabilities =
                Some(Capability { add_capabilities: vec!["SYS_ADMIN".into()], ..Capability::default() });
            config
        };
        let script = "mount -t tmpfs none /tmp 2>/dev/null && echo mounted || echo refused";
        let default = stage.container(&pod, powerful("default", ProfileType::RuntimeDefault)).await?;
        assert_eq!(label(stage, &default).await?, DEFAULT);
        assert_eq!(stage.sh(&default, script).await?, "refused");
        // Ordinary work goes on, and signals among its own arrive.
        let work =
            "sleep 100 & kill $!; wait $!; echo x > /file; mv /file /other; cat /other; ip -o -4 addr show lo | wc -l";
        assert_eq!(stage.sh(&default, work).await?, "x\n1");
        let open = stage.container(&pod, powerful("open", ProfileType::Unconfined)).await?;
        assert_eq!(label(stage, &open).await?, "unconfined");
        assert_eq!(stage.sh(&open, script).await?, "mounted");
        // The host ends what is confined.
        stage.node.cri.stop(&plain, 1).await?;
        assert_eq!(stage.node.cri.status(&plain).await?.state(), ContainerState::ContainerExited);
        stage.remove(&pod).await
    });
}

#[test]
#[ignore = "for the guest of `cargo xtask vm`"]
fn a_profile_of_the_host_confines_who_names_it() {
    check("named", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("pod").await?;
        let config = confined("main", ProfileType::Localhost, "stasis-test-strict");
        let (code, message) = refusal(stage.node.cri.create(&pod, config.clone()).await)?;
        assert_eq!(code, Code::FailedPrecondition);
        assert!(message.contains("stasis-test-strict") && message.contains("not loaded"), "{message}");

        let file = stage.node.ground.disk.join("strict");
        fs::write(&file, STRICT)?;
        run(Command::new("apparmor_parser").args(["--replace", "--skip-cache"]).arg(&file), SHORT)?;
        let container = stage.container(&pod, config).await?;
        assert_eq!(label(stage, &container).await?, "stasis-test-strict (enforce)");
        assert_eq!(
            stage.sh(&container, "cat /etc/passwd 2>/dev/null || echo refused; cat /etc/group | wc -l").await?,
            "refused\n2"
        );
        stage.remove(&pod).await?;
        run(Command::new("apparmor_parser").arg("--remove").arg(&file), SHORT)?;
        Ok(())
    });
}

#[test]
#[ignore = "for the guest of `cargo xtask vm`"]
fn a_restored_container_has_the_profile_of_its_request() {
    check("carried", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("first").await?;
        let config = shell("main", SLEEP);
        let container = stage.container(&pod, config.clone()).await?;
        let (pod, restored) = carry(stage, &pod, &container, config).await?;
        assert_eq!(label(stage, &restored).await?, DEFAULT);
        stage.remove(&pod).await?;

        // The memory of an unconfined process does not come up unconfined where that was not asked for.
        let pod = stage.pod("third").await?;
        let open = stage.container(&pod, confined("open", ProfileType::Unconfined, "")).await?;
        assert_eq!(label(stage, &open).await?, "unconfined");
        let archive = stage.archive("open.tar");
        stage.node.cri.checkpoint(&open, &archive).await?;
        let image = archive.display().to_string();
        let refused = stage.node.cri.create(&pod, container_config("strict", &image, &[])).await?;
        let error = format!("{:#}", stage.node.cri.start(&refused).await.unwrap_err());
        assert!(error.contains("stasis-default"), "{error}");
        assert_eq!(stage.node.cri.status(&refused).await?.state(), ContainerState::ContainerExited);
        // Where it was, it comes up.
        let mut config = confined("again", ProfileType::Unconfined, "");
        config.image = container_config("", &image, &[]).image;
        let again = stage.container(&pod, config).await?;
        assert_eq!(label(stage, &again).await?, "unconfined");
        stage.remove(&pod).await
    });
}
