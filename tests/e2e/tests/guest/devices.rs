//! Device rules, which version 2 has as programs that the kernel runs.

use anyhow::Result;
use stasis_cri_api::runtime::Device;
use stasis_e2e::{Stage, check, shell};
use xtask::cri::Container;
use xtask::node::Setup;

use crate::carry;

#[test]
#[ignore = "for the guest of `cargo xtask vm`"]
fn device_rules_hold_also_after_a_restore() {
    check("devices", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let pod = stage.pod("pod").await?;
        let mut config = shell("main", "while :; do sleep 1; done");
        let device = |name: &str, permissions: &str| Device {
            container_path: format!("/dev/{name}"),
            // The guest's disk: a device that no container has by itself.
            host_path: "/dev/vda".into(),
            permissions: permissions.into(),
        };
        config.devices = vec![device("readable", "r")];
        let container = stage.container(&pod, config.clone()).await?;
        rules_hold(stage, &container).await?;
        let (pod, restored) = carry(stage, &pod, &container, config).await?;
        rules_hold(stage, &restored).await?;
        stage.remove(&pod).await
    });
}

async fn rules_hold(stage: &mut Stage, container: &Container) -> Result<()> {
    // A shell ends when a redirection of `exec` fails, hence the brackets.
    let script = "
        (exec 3< /dev/readable) 2>&1 && echo read
        (exec 3> /dev/readable) 2>&1 | grep -o 'not permitted'
        rm -f /disk; mknod /disk b 8 0 2>&1 && (exec 3< /disk) 2>&1 | grep -o 'not permitted'
        echo x > /dev/null && echo written";
    assert_eq!(stage.sh(container, script).await?, "read\nnot permitted\nnot permitted\nwritten");
    Ok(())
}
