//! `images`, `pull`, `push`, `import`, `export`, `rmi`.

use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use stasis_cri_api::runtime::{Image, ImageSpec, ListImagesRequest, RemoveImageRequest};
use stasis_cri_api::stasis::{
    ExportImageRequest, ImageProgress, ImageResult, ImportImageRequest, PullImageRequest, PushImageRequest,
    RegistryCredentials,
};
use tokio_stream::StreamExt as _;
use tonic::{Response, Status, Streaming};

use super::{Batch, absolute};
use crate::cli::Credentials;
use crate::client::Client;
use crate::failure::{Failure, Result};
use crate::lookup::{self, FoundImage};
use crate::output::{Output, Row};
use crate::progress::{Progress, Report};
use crate::units::{short_id, size};

/// Longest user name and password, in bytes: registry tokens have a few KiB.
const CREDENTIALS_MAX: u64 = 64 * 1024;

/// Time for removing an image, whose layers are deleted file by file.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(120);

/// An image of `images`.
#[derive(Debug, Serialize)]
pub(crate) struct ImageRow {
    id: String,
    tags: Vec<String>,
    digests: Vec<String>,
    size: u64,
    pinned: bool,
}

impl From<Image> for ImageRow {
    fn from(image: Image) -> Self {
        Self {
            id: image.id,
            tags: image.repo_tags,
            digests: image.repo_digests,
            size: image.size,
            pinned: image.pinned,
        }
    }
}

impl Row for ImageRow {
    const COLUMNS: &'static [&'static str] = &["IMAGE", "IMAGE ID", "SIZE"];

    fn id(&self) -> &str {
        &self.id
    }

    /// A line for each tag; an image without one is shown by a digest.
    fn lines(&self, _now: Timestamp) -> Vec<Vec<String>> {
        let none = ["<none>".to_owned()];
        let names = match (&self.tags[..], &self.digests[..]) {
            ([], []) => &none[..],
            ([], [digest, ..]) => std::slice::from_ref(digest),
            (tags, _) => tags,
        };
        names.iter().map(|name| vec![name.clone(), short_id(&self.id).to_owned(), size(self.size)]).collect()
    }
}

pub(crate) async fn images(client: &Client, output: Output) -> Result<()> {
    let mut images = client.images.clone();
    let call = images.list_images(ListImagesRequest { filter: None });
    let mut rows: Vec<ImageRow> =
        client.call("list images", call).await?.images.into_iter().map(ImageRow::from).collect();
    rows.sort_by(|a, b| (&a.tags, &a.digests).cmp(&(&b.tags, &b.digests)));
    output.list(&rows)
}

/// Name and password of the options, or of standard input.
pub(crate) fn credentials(options: Credentials) -> Result<Option<RegistryCredentials>> {
    let text = match (options.creds, options.creds_stdin) {
        (Some(text), _) => text,
        (None, false) => return Ok(None),
        (None, true) => {
            let mut text = String::new();
            let from_stdin = |source| Failure::Io { what: "read credentials from", path: "/dev/stdin".into(), source };
            std::io::stdin().take(CREDENTIALS_MAX).read_to_string(&mut text).map_err(from_stdin)?;
            text
        }
    };
    parse_credentials(&text).map(Some)
}

fn parse_credentials(text: &str) -> Result<RegistryCredentials> {
    match text.trim_end_matches(['\r', '\n']).split_once(':') {
        Some((username, password)) if !username.is_empty() => {
            Ok(RegistryCredentials { username: username.to_owned(), password: password.to_owned() })
        }
        // What was given may be a password: it is not repeated.
        _ => Err(Failure::Usage("credentials must have the form USER:PASSWORD".to_owned())),
    }
}

pub(crate) async fn pull(
    client: &Client,
    output: Output,
    reference: &str,
    credentials: Option<RegistryCredentials>,
) -> Result<()> {
    let request = PullImageRequest { reference: reference.to_owned(), credentials };
    let mut admin = client.admin.clone();
    let result = follow(client, output, &format!("pull {reference}"), admin.pull_image(request)).await?;
    print_result(output, "pulled", reference, &result)
}

pub(crate) async fn push(
    client: &Client,
    output: Output,
    image: &str,
    target: Option<String>,
    credentials: Option<RegistryCredentials>,
) -> Result<()> {
    let image = lookup::image(client, image).await?.name;
    let shown = target.clone().unwrap_or_else(|| image.clone());
    let request = PushImageRequest { image, target: target.unwrap_or_default(), credentials };
    let mut admin = client.admin.clone();
    let result = follow(client, output, &format!("push {shown}"), admin.push_image(request)).await?;
    print_result(output, "pushed", &shown, &result)
}

pub(crate) async fn import(client: &Client, output: Output, path: &Path, reference: Option<String>) -> Result<()> {
    let request = ImportImageRequest { path: absolute(path)?, reference: reference.unwrap_or_default() };
    let mut admin = client.admin.clone();
    let what = format!("import {}", path.display());
    let result = follow(client, output, &what, admin.import_image(request)).await?;
    let names = result.references.join(", ");
    print_result(output, "imported", if names.is_empty() { "an image without a name" } else { &names }, &result)
}

pub(crate) async fn export(client: &Client, output: Output, image: &str, path: &Path) -> Result<()> {
    let image = lookup::image(client, image).await?.name;
    let request = ExportImageRequest { image: image.clone(), path: absolute(path)? };
    let mut admin = client.admin.clone();
    let result = follow(client, output, &format!("export {image}"), admin.export_image(request)).await?;
    print_result(output, "exported", &format!("{image} to {}", path.display()), &result)
}

/// Shows the reports of an image operation up to its result.
pub(crate) async fn follow(
    client: &Client,
    output: Output,
    what: &str,
    call: impl Future<Output = std::result::Result<Response<Streaming<ImageProgress>>, Status>>,
) -> Result<ImageResult> {
    let mut progress = Progress::new(output);
    let work = async {
        let mut stream = call.await.map_err(|s| Failure::daemon(what, &s))?.into_inner();
        while let Some(message) = stream.next().await {
            let message = message.map_err(|s| Failure::daemon(what, &s))?;
            progress.report(Report {
                subject: &message.digest,
                phase: &message.phase,
                done: message.bytes_done,
                total: message.bytes_total,
            });
            if let Some(result) = message.done {
                return Ok(result);
            }
        }
        Err(Failure::Answer(format!("{what}: the reports ended without a result")))
    };
    let result = client.within(what, work).await;
    progress.finish();
    result
}

/// The result of an image operation.
pub(crate) fn print_result(output: Output, verb: &str, name: &str, result: &ImageResult) -> Result<()> {
    #[derive(Serialize)]
    struct Outcome<'a> {
        id: &'a str,
        digest: &'a str,
        references: &'a [String],
    }
    let human = match (result.image_id.as_str(), result.digest.as_str()) {
        ("", "") => format!("{verb} {name}"),
        ("", digest) => format!("{verb} {name} ({digest})"),
        (id, _) => format!("{verb} {name} ({})", short_id(id)),
    };
    let outcome = Outcome { id: &result.image_id, digest: &result.digest, references: &result.references };
    output.item(&outcome, &human, &result.image_id)
}

pub(crate) async fn remove(client: &Client, output: Output, wanted: &[String]) -> Result<()> {
    let mut batch = Batch::new(output, "removed");
    for name in wanted {
        batch.note(name, remove_one(client, name).await);
    }
    batch.finish()
}

async fn remove_one(client: &Client, name: &str) -> Result<String> {
    let FoundImage { name: image, id } = lookup::image(client, name).await?;
    let request = RemoveImageRequest { image: Some(ImageSpec { image, ..Default::default() }) };
    let mut images = client.images.clone();
    let call = images.remove_image(request);
    client.call_within(format!("remove the image {name}"), Some(REMOVE_TIMEOUT), call).await?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::tests::every_form;

    #[test]
    fn images() {
        let image = |id: &str, tags: &[&str], digests: &[&str]| Image {
            id: format!("sha256:{}", id.repeat(64)),
            repo_tags: tags.iter().map(ToString::to_string).collect(),
            repo_digests: digests.iter().map(ToString::to_string).collect(),
            size: 12_345_678,
            ..Default::default()
        };
        let rows = [
            image(
                "a",
                &["docker.io/library/redis:7", "docker.io/library/redis:latest"],
                &["docker.io/library/redis@sha256:ff"],
            ),
            image("b", &[], &["registry.local/app@sha256:ee"]),
            image("c", &[], &[]),
        ]
        .map(ImageRow::from);
        insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!("images", every_form(&rows));
        });
    }

    #[test]
    fn credentials_keep_their_colons_and_are_never_shown() {
        let parsed = parse_credentials("me:pass:word\n").unwrap();
        assert_eq!((parsed.username.as_str(), parsed.password.as_str()), ("me", "pass:word"));
        assert_eq!(parse_credentials("me:").unwrap().password, "");
        for bad in ["", "secret", ":secret\n"] {
            assert!(!parse_credentials(bad).unwrap_err().text().contains("secret"));
        }
    }
}
