//! `checkpoint create`, `checkpoint preflight`, `checkpoint to-image`, `checkpoint inspect`.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use stasis_cri_api::stasis::{
    CheckpointResult, CheckpointToImageRequest, CreateCheckpointRequest, InspectCheckpointRequest,
    PreflightCheckpointRequest, PruneCheckpointsRequest,
};
use tokio_stream::StreamExt as _;

use super::{Done, absolute, images, stored};
use crate::cli::{Checkpoint, Global};
use crate::client::{Client, limited};
use crate::failure::{Failure, Result, printable};
use crate::lookup;
use crate::output::{Output, table};
use crate::progress::{Progress, Report};
use crate::units::{micros, size};

/// Time that a checkpoint takes beyond its limit, in which the daemon undoes it and answers.
const UNDO_MARGIN: Duration = Duration::from_secs(30);

/// Exit code where a checkpoint would fail.
const IMPOSSIBLE: u8 = 1;

pub(crate) async fn run(global: &Global, output: Output, command: Checkpoint) -> Done {
    match command {
        Checkpoint::Create { container, archive, image, push, self_contained, credentials, stop, option } => {
            let client = Client::connect(global).await?;
            let request = CreateCheckpointRequest {
                container: lookup::container(&client, &container).await?,
                path: archive.as_deref().map(absolute).transpose()?.unwrap_or_default(),
                options: options(&option, stop),
                timeout_seconds: client.timeout_seconds(),
                image: image.unwrap_or_default(),
                push,
                credentials: images::credentials(credentials)?,
                self_contained,
            };
            create(&client, output, &container, request).await?;
        }
        Checkpoint::Preflight { container, option, directory } => {
            return preflight(&Client::connect(global).await?, output, &container, &option, directory.as_deref()).await;
        }
        Checkpoint::Ls => stored::list(&Client::connect(global).await?, output).await?,
        Checkpoint::Rm { checkpoints } => stored::remove(&Client::connect(global).await?, output, checkpoints).await?,
        Checkpoint::Prune { keep, max_age, dry_run } => {
            let request = PruneCheckpointsRequest {
                keep: keep.unwrap_or_default(),
                max_age_seconds: max_age.unwrap_or_default(),
                dry_run,
            };
            stored::prune(&Client::connect(global).await?, output, request).await?;
        }
        Checkpoint::Pin { checkpoint, unpin } => {
            stored::pin(&Client::connect(global).await?, output, checkpoint, unpin).await?;
        }
        Checkpoint::ToImage { archive, reference, self_contained } => {
            to_image(&Client::connect(global).await?, output, &archive, reference, self_contained).await?;
        }
        Checkpoint::Inspect { source } => {
            let value = match local(&source)? {
                Some(value) => value,
                None => remote(&Client::connect(global).await?, &source).await?,
            };
            output.item(&value, &describe(&value), value["container_id"].as_str().unwrap_or_default())?;
        }
    }
    Ok(0)
}

/// Options by name; one without a value is switched on.
fn options(given: &[String], stop: bool) -> HashMap<String, String> {
    let stop = stop.then(|| ("leave-running".to_owned(), "false".to_owned()));
    let given = given.iter().map(|option| {
        let (name, value) = option.split_once('=').unwrap_or((option, "true"));
        (name.to_owned(), value.to_owned())
    });
    given.chain(stop).collect()
}

async fn create(client: &Client, output: Output, container: &str, request: CreateCheckpointRequest) -> Result<()> {
    let what = format!("checkpoint {container}");
    let mut progress = Progress::new(output);
    let limit = Some(client.timeout_seconds()).filter(|s| *s > 0);
    let limit = limit.map(|s| Duration::from_secs(s.into()) + UNDO_MARGIN);
    let result = limited(&what, limit, follow(client, request, &what, &mut progress)).await;
    progress.finish();
    print_created(output, container, &result?)
}

async fn follow(
    client: &Client,
    request: CreateCheckpointRequest,
    what: &str,
    progress: &mut Progress,
) -> Result<CheckpointResult> {
    let mut admin = client.admin.clone();
    let failed = |status| Failure::daemon(what, &status);
    let mut stream = admin.create_checkpoint(request).await.map_err(failed)?.into_inner();
    while let Some(message) = stream.next().await {
        let message = message.map_err(failed)?;
        progress.report(Report {
            subject: "",
            phase: &message.phase,
            done: message.bytes_done,
            total: message.bytes_total,
        });
        if let Some(result) = message.done {
            return Ok(result);
        }
    }
    Err(Failure::Answer(format!("{what}: the reports ended without a result")))
}

fn print_created(output: Output, container: &str, result: &CheckpointResult) -> Result<()> {
    #[derive(Serialize)]
    struct Outcome<'a> {
        path: &'a str,
        size_bytes: u64,
        frozen_us: u64,
        total_us: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        image: Option<Image<'a>>,
    }
    #[derive(Serialize)]
    struct Image<'a> {
        id: &'a str,
        digest: &'a str,
        references: &'a [String],
    }
    let made = result.image.as_ref();
    let place = made.and_then(|image| image.references.first()).unwrap_or(&result.path);
    let outcome = Outcome {
        image: made.map(|image| Image { id: &image.image_id, digest: &image.digest, references: &image.references }),
        path: &result.path,
        size_bytes: result.size_bytes,
        frozen_us: result.frozen_us,
        total_us: result.total_us,
    };
    let after = if result.left_running { "it runs on" } else { "it has been stopped" };
    let human = format!(
        "checkpointed {container} to {} ({}): frozen for {}, done in {}; {after}",
        place,
        size(result.size_bytes),
        micros(result.frozen_us),
        micros(result.total_us),
    );
    output.item(&outcome, &human, place)
}

/// Shows what stands in the way of a checkpoint; the exit code says whether it would fail.
async fn preflight(
    client: &Client,
    output: Output,
    container: &str,
    option: &[String],
    directory: Option<&Path>,
) -> Done {
    let request = PreflightCheckpointRequest {
        container: lookup::container(client, container).await?,
        options: options(option, false),
        directory: directory.map(absolute).transpose()?.unwrap_or_default(),
    };
    let mut admin = client.admin.clone();
    let call = admin.preflight_checkpoint(request);
    let answer = client.call(format!("look whether {container} can be checkpointed"), call).await?;
    let found: Value = serde_json::from_str(&answer.json).map_err(|e| Failure::Answer(e.to_string()))?;
    output.item(&found, &describe_preflight(container, &found), found["container_id"].as_str().unwrap_or_default())?;
    Ok(if found["possible"] == true { 0 } else { IMPOSSIBLE })
}

fn describe_preflight(container: &str, found: &Value) -> String {
    let number = |key: &str| found[key].as_u64().unwrap_or_default();
    let can = if found["possible"] == true { "can" } else { "cannot" };
    let mut out = format!(
        "{} {can} be checkpointed now: {} processes, about {} of memory\n",
        printable(container),
        number("processes"),
        size(number("memory_bytes"))
    );
    for finding in found["findings"].as_array().into_iter().flatten() {
        let text = |key: &str| printable(finding[key].as_str().unwrap_or_default());
        let place = match (finding["pid"].as_u64(), finding["descriptor"].as_u64()) {
            (Some(pid), Some(descriptor)) => format!("process {pid} ({}), descriptor {descriptor}: ", text("command")),
            (Some(pid), None) => format!("process {pid} ({}): ", text("command")),
            _ => String::new(),
        };
        let (severity, code) = (text("severity"), text("code"));
        out.push_str(&format!("\n{severity:<7}{code}\n"));
        out.push_str(&format!("       {place}{}\n", text("found")));
        out.push_str(&format!("       {}. {}\n", text("meaning"), text("remedy")));
    }
    out
}

async fn to_image(
    client: &Client,
    output: Output,
    archive: &Path,
    reference: String,
    self_contained: bool,
) -> Result<()> {
    let path = absolute(archive)?;
    let request = CheckpointToImageRequest { path, reference: reference.clone(), self_contained };
    let mut admin = client.admin.clone();
    let what = format!("make an image of {}", archive.display());
    let result = images::follow(client, output, &what, admin.checkpoint_to_image(request)).await?;
    images::print_result(output, "made", &reference, &result)
}

/// What an archive that can be read here holds; none if `source` is no such file.
pub(crate) fn local(source: &str) -> Result<Option<Value>> {
    let path = Path::new(source);
    // A link is fine here: whoever runs this reads it with their own rights.
    if !std::fs::metadata(path).is_ok_and(|m| m.is_file()) {
        return Ok(None);
    }
    let Ok(file) = File::open(path) else { return Ok(None) };
    let inspection =
        stasis_checkpoint::inspect(file).map_err(|source| Failure::Archive { path: path.into(), source })?;
    serde_json::to_value(inspection).map(Some).map_err(|e| Failure::Answer(e.to_string()))
}

/// What the daemon says of an archive or an image.
pub(crate) async fn remote(client: &Client, source: &str) -> Result<Value> {
    let on_disk = source.contains('/') && Path::new(source).exists();
    let source = if on_disk { absolute(Path::new(source))? } else { source.to_owned() };
    let mut admin = client.admin.clone();
    let call = admin.inspect_checkpoint(InspectCheckpointRequest { source: source.clone() });
    let answer = client.call(format!("inspect {source}"), call).await?;
    serde_json::from_str(&answer.json).map_err(|e| Failure::Answer(e.to_string()))
}

/// An inspection for people. What is not known is left out.
fn describe(value: &Value) -> String {
    let text = |key: &str| value[key].as_str().filter(|t| !t.is_empty()).map(printable);
    let number = |key: &str| value[key].as_u64();
    let pod = match (text("namespace"), text("pod")) {
        (Some(namespace), Some(pod)) => Some(format!("{namespace}/{pod}")),
        (_, pod) => pod,
    };
    let processes = number("processes").map(|p| match number("threads") {
        Some(threads) if threads != p => format!("{p} ({threads} threads)"),
        _ => p.to_string(),
    });
    let frozen = value["stats"]["dump"]["frozen_time"].as_u64().map(micros);
    let lines = [
        ("Container", text("container")),
        ("Container ID", text("container_id")),
        ("Pod", pod),
        ("Image", text("image")),
        ("Image digest", text("image_ref")),
        ("Runtime", text("runtime")),
        ("Format", text("dialect")),
        ("CRIU", text("criu_version")),
        ("Created", text("created")),
        ("Checkpointed", text("checkpointed")),
        ("Restored before", value["restored"].as_bool().filter(|r| *r).map(|_| "yes".to_owned())),
        ("Processes", processes),
        ("Frozen by CRIU", frozen),
        ("Memory", number("memory_bytes").map(size)),
        ("Writable layer", number("rootfs_diff_bytes").map(size)),
        ("Total", number("total_bytes").map(size)),
    ];
    let mut out = String::new();
    for (name, value) in lines {
        if let Some(value) = value {
            out.push_str(&format!("{:<17}{value}\n", format!("{name}:")));
        }
    }
    out.push_str(&mounts(value));
    out
}

fn mounts(value: &Value) -> String {
    let Some(mounts) = value["mounts"].as_array().filter(|m| !m.is_empty()) else { return String::new() };
    let cell = |mount: &Value, key: &str| mount[key].as_str().unwrap_or("-").to_owned();
    let lines = mounts.iter().map(|m| ["destination", "type", "source"].map(|key| cell(m, key)).to_vec());
    format!("\n{}", table(&["MOUNT", "TYPE", "SOURCE"], lines))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_inspection_for_people() {
        let value = json!({
            "dialect": "containerd", "container_id": "ab".repeat(32), "container": "redis", "pod": "web",
            "namespace": "shop", "runtime": "runc", "image": "docker.io/library/redis:7", "image_ref": "",
            "created": "2026-01-02T03:04:05Z", "checkpointed": "2026-01-02T04:04:05Z", "restored": true,
            "processes": 1, "threads": 5, "memory_bytes": 12_345_678, "rootfs_diff_bytes": 0, "total_bytes": 12_500_000,
            "criu_version": null, "stats": {"dump": {"frozen_time": 85_000}}, "members": [],
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/etc/hosts", "type": "bind", "source": "/run/x\u{1b}[2J/hosts"},
            ],
        });
        insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!("inspection", describe(&value));
        });
    }

    #[test]
    fn a_preflight_for_people() {
        let value = json!({
            "container_id": "ab".repeat(32), "possible": false, "processes": 2, "memory_bytes": 12_345_678,
            "findings": [
                {"severity": "blocks", "code": "tcp-established", "pid": 4711, "command": "redis-server",
                 "descriptor": 8, "found": "TCP 10.1.0.2:6379 to 10.1.0.9:50000", "meaning": "a TCP connection is open",
                 "remedy": "Checkpoint with tcp-established=true."},
                {"severity": "blocks", "code": "criu", "pid": null, "command": "", "descriptor": null,
                 "found": "criu is not in /usr/bin", "meaning": "this node cannot checkpoint at all",
                 "remedy": "See `stasis doctor`."},
            ],
        });
        insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!("preflight", describe_preflight("web/redis", &value));
        });
    }

    #[test]
    fn what_is_no_archive_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        std::fs::write(&path, "no archive at all").unwrap();
        let text = local(path.to_str().unwrap()).unwrap_err().text();
        assert!(text.starts_with(&format!("error: cannot read the checkpoint {}: ", path.display())), "{text}");
        assert!(local(dir.path().join("absent").to_str().unwrap()).unwrap().is_none());
        assert!(local("registry.local/app:frozen").unwrap().is_none());
    }
}
