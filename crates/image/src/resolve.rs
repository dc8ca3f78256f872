//! Which image a name means: an ID, a unique beginning of one, a reference, a repository digest, a bare digest.

use std::sync::Arc;

use stasis_registry::{Reference, is_sha256};

use crate::{Image, Images};

/// Fewest digits of an ID that name an image; Docker's short form. Fewer could as well be the name of a repository.
const ID_PREFIX_MIN: usize = 12;

impl Images {
    /// Finds an image by its ID (with or without `sha256:`, or 12 and more of its digits if only one image begins so), by any
    /// reference that names it, by a repository digest, or by the bare digest of its manifest or index.
    pub fn resolve(&self, name_or_id: &str) -> Option<Arc<Image>> {
        find(&self.list(), name_or_id).cloned()
    }
}

fn find<'a>(images: &'a [Arc<Image>], name: &str) -> Option<&'a Arc<Image>> {
    let by = |matches: &dyn Fn(&Image) -> bool| images.iter().find(|image| matches(image));
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    let is_hex = hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if is_hex && hex.len() == 64 {
        let digest = format!("sha256:{hex}");
        return by(&|image| image.id == digest).or_else(|| by(&|image| is_at(image, &digest)));
    }
    if let Ok(reference) = name.parse::<Reference>()
        && let Some(found) = by(&|image| is_named(image, &reference))
    {
        return Some(found);
    }
    if !is_hex || hex.len() < ID_PREFIX_MIN {
        return None;
    }
    let mut begins =
        images.iter().filter(|image| image.id.strip_prefix("sha256:").is_some_and(|id| id.starts_with(hex)));
    match (begins.next(), begins.next()) {
        (Some(only), None) => Some(only),
        _ => None,
    }
}

fn is_at(image: &Image, digest: &str) -> bool {
    is_sha256(digest) && (image.record.target.digest == digest || image.record.manifest.digest == digest)
}

/// A reference with a digest also names an image that came by a tag of the same repository, or out of an archive.
fn is_named(image: &Image, reference: &Reference) -> bool {
    let text = reference.to_string();
    let Some(digest) = reference.digest() else { return image.references.contains(&text) };
    let same_repository = || {
        let names = image.references.iter().filter_map(|name| name.parse::<Reference>().ok());
        names.into_iter().any(|name| name.name() == reference.name())
    };
    image.repo_digests.contains(&text) || (is_at(image, digest) && same_repository())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Blob, Record};

    fn blob(digest: &str) -> Blob {
        Blob { digest: digest.to_owned(), size: 1, media_type: String::new() }
    }

    fn image(id: &str, manifest: &str, reference: &str, repo_digest: &str) -> Arc<Image> {
        let record = Record {
            references: vec![reference.to_owned()],
            repo_digests: vec![repo_digest.to_owned()],
            target: blob(manifest),
            manifest: blob(manifest),
            config: blob(id),
            layers: Vec::new(),
            annotations: Default::default(),
        };
        let config = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
        Arc::new(record.image(config, &[]).expect("image"))
    }

    #[test]
    fn an_image_answers_to_all_its_names_and_to_no_other() {
        let (a, b) = ("a".repeat(64), format!("{}b{}", "a".repeat(14), "c".repeat(49)));
        let (ma, mb) = (format!("sha256:{}", "1".repeat(64)), format!("sha256:{}", "2".repeat(64)));
        let images = [
            image(&format!("sha256:{a}"), &ma, "docker.io/library/redis:7", &format!("docker.io/library/redis@{ma}")),
            image(&format!("sha256:{b}"), &mb, "r.example/x/y:latest", ""),
        ];
        let other = format!("sha256:{}", "3".repeat(64));
        let cases = [
            (a.clone(), Some(0)),
            (format!("sha256:{b}"), Some(1)),
            (a[..15].to_owned(), Some(0)),
            (a[..14].to_owned(), None), // two begin so
            (a[..11].to_owned(), None),
            ("redis:7".to_owned(), Some(0)),
            ("redis".to_owned(), None),
            ("r.example/x/y".to_owned(), Some(1)),
            (format!("redis@{ma}"), Some(0)),
            (format!("r.example/x/y@{mb}"), Some(1)),
            (format!("r.example/other@{mb}"), None),
            (mb.clone(), Some(1)),
            (format!("redis@{other}"), None),
            (other, None),
            (String::new(), None),
            ("not a name".to_owned(), None),
        ];
        for (name, expected) in cases {
            let found = find(&images, &name).map(|found| images.iter().position(|image| image.id == found.id));
            assert_eq!(found.flatten(), expected, "{name}");
        }
    }
}
