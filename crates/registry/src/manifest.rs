//! Manifests and indexes: which of the two a document is, and which image of an index is for this machine.

use std::fmt;

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use sha2::Digest as _;

use crate::error::{Error, Result};

/// Most bytes of a manifest or index: the distribution specification asks registries to take at least 4 MiB.
pub const MANIFEST_BYTES_MAX: u64 = 4 << 20;

/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// OCI layer, not compressed.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// OCI layer, gzip.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// OCI layer, zstd.
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// Docker image manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker manifest list.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker image configuration.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Docker layer, gzip.
pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

/// What a manifest request accepts.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// A verified manifest or index: its bytes have this digest, and only one reading.
#[derive(Debug, Clone)]
pub struct Document {
    /// `sha256:…` of `bytes`.
    pub digest: String,
    /// One of the four manifest types.
    pub media_type: String,
    /// The document as it came; whatever is stored or pushed is this.
    pub bytes: Vec<u8>,
    /// What it says.
    pub parsed: Parsed,
}

/// The two kinds of document that a reference can name.
#[derive(Debug, Clone)]
pub enum Parsed {
    /// One image.
    Manifest(Box<ImageManifest>),
    /// Images for several platforms.
    Index(Box<ImageIndex>),
}

/// The members whose presence tells the kinds apart.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: Option<u32>,
    media_type: Option<String>,
    config: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    manifests: Option<serde::de::IgnoredAny>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

impl Document {
    /// Reads a document. `declared` is the media type by which it was handed over (HTTP header or descriptor), if any.
    ///
    /// A document that could be read as both manifest and index, or whose own type contradicts the declared one, is refused
    /// (CVE-2021-41190): two readers of one digest must not see two images.
    pub fn parse(bytes: Vec<u8>, declared: Option<&str>) -> Result<Document> {
        let digest = sha256(&bytes);
        let refuse = |reason: String| Error::Manifest { digest: digest.clone(), reason };
        if bytes.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(refuse(format!("larger than {MANIFEST_BYTES_MAX} bytes")));
        }
        let shape: Shape = serde_json::from_slice(&bytes).map_err(|e| refuse(format!("not a JSON manifest: {e}")))?;
        let is_index = kind(&shape, declared).map_err(refuse)?;
        let media_type = match (shape.media_type, declared.filter(|declared| index_type(declared).is_some())) {
            (Some(own), _) => own,
            (None, Some(declared)) => declared.to_owned(),
            (None, None) if is_index => OCI_INDEX.to_owned(),
            (None, None) => OCI_MANIFEST.to_owned(),
        };
        let parsed = if is_index {
            let index: ImageIndex =
                serde_json::from_slice(&bytes).map_err(|e| refuse(format!("not an image index: {e}")))?;
            check_descriptors(index.manifests()).map_err(refuse)?;
            Parsed::Index(Box::new(index))
        } else {
            let manifest: ImageManifest =
                serde_json::from_slice(&bytes).map_err(|e| refuse(format!("not an image manifest: {e}")))?;
            check_descriptors(std::iter::once(manifest.config()).chain(manifest.layers())).map_err(refuse)?;
            Parsed::Manifest(Box::new(manifest))
        };
        Ok(Document { digest, media_type, bytes, parsed })
    }
}

/// Whether the document is an index, if it is clear.
fn kind(shape: &Shape, declared: Option<&str>) -> std::result::Result<bool, String> {
    if shape.schema_version == Some(1) || shape.fs_layers.is_some() {
        return Err("Docker schema 1 images are not supported; push the image again with a current tool".into());
    }
    if shape.schema_version != Some(2) {
        return Err("schemaVersion is not 2".into());
    }
    let as_manifest = shape.config.is_some() || shape.layers.is_some();
    let as_index = shape.manifests.is_some();
    if as_manifest == as_index {
        return Err(if as_index {
            "it can be read both as an image and as an index of images; such documents are refused".into()
        } else {
            "it is neither an image manifest nor an image index".into()
        });
    }
    let claims = [shape.media_type.as_deref(), declared.filter(|declared| index_type(declared).is_some())];
    for claim in claims.into_iter().flatten() {
        match index_type(claim) {
            Some(claims_index) if claims_index == as_index => {}
            Some(_) => return Err(format!("its type is given as {claim}, its content is of the other kind")),
            None => return Err(format!("its type {claim} is not that of a container image")),
        }
    }
    Ok(as_index)
}

/// Whether a manifest media type is that of an index; `None` if it is neither kind (such as `text/plain`).
fn index_type(media_type: &str) -> Option<bool> {
    match media_type {
        OCI_INDEX | DOCKER_INDEX => Some(true),
        OCI_MANIFEST | DOCKER_MANIFEST => Some(false),
        _ => None,
    }
}

fn check_descriptors<'a>(descriptors: impl IntoIterator<Item = &'a Descriptor>) -> std::result::Result<(), String> {
    match descriptors.into_iter().find(|descriptor| !is_sha256(descriptor.digest().as_ref())) {
        Some(bad) => Err(format!("digest {} is not sha256, the only kind that is supported", bad.digest())),
        None => Ok(()),
    }
}

/// Whether text is `sha256:` and 64 lower-case hexadecimal digits.
pub fn is_sha256(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)))
}

/// `sha256:…` of a document.
pub fn sha256(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(71);
    text.push_str("sha256:");
    for byte in sha2::Sha256::digest(bytes) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// A platform in the words of the Go tool chain, which OCI uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// Variants that run here, best first; the empty one stands for "not given".
    pub variants: Vec<&'static str>,
}

impl Platform {
    /// Linux on this machine's processor.
    pub fn host() -> Platform {
        let (architecture, variants): (_, &[_]) = match std::env::consts::ARCH {
            // v2 and v3 need instructions that not every amd64 has.
            "x86_64" => ("amd64", &["", "v1"]),
            "aarch64" => ("arm64", &["v8", ""]),
            "arm" => ("arm", &["v7", "v6", "v5", ""]),
            "powerpc64" => ("ppc64le", &[""]),
            "x86" => ("386", &[""]),
            other => (other, &[""]),
        };
        Platform { architecture: architecture.to_owned(), variants: variants.to_vec() }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "linux/{}", self.architecture)
    }
}

/// The image of an index for a platform. An entry without a platform counts only if it is the sole one.
pub fn select_platform<'a>(index: &'a ImageIndex, digest: &str, wanted: &Platform) -> Result<&'a Descriptor> {
    let rank = |descriptor: &Descriptor| -> Option<usize> {
        let platform = descriptor.platform().as_ref()?;
        if platform.os().to_string() != "linux" || platform.architecture().to_string() != wanted.architecture {
            return None;
        }
        let variant = platform.variant().as_deref().unwrap_or("");
        wanted.variants.iter().position(|candidate| *candidate == variant)
    };
    let images = || index.manifests().iter().filter(|d| index_type(d.media_type().as_ref()) == Some(false));
    if let Some((_, best)) = images().filter_map(|d| Some((rank(d)?, d))).min_by_key(|(rank, _)| *rank) {
        return Ok(best);
    }
    if let [only] = images().collect::<Vec<_>>()[..]
        && only.platform().is_none()
    {
        return Ok(only);
    }
    let present: Vec<String> = images()
        .map(|descriptor| match descriptor.platform() {
            Some(p) => {
                let variant = p.variant().as_deref().map(|v| format!("/{v}")).unwrap_or_default();
                format!("{}/{}{variant}", p.os(), p.architecture())
            }
            None => "an image without a platform".to_owned(),
        })
        .collect();
    let present = if present.is_empty() { "nothing".to_owned() } else { present.join(", ") };
    Err(Error::Platform { digest: digest.to_owned(), wanted: wanted.to_string(), present })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn manifest(media_type: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,{media_type}"config":{{"mediaType":"{OCI_CONFIG}","digest":"{HEX}","size":2}},"layers":[]}}"#
        )
    }

    fn index(entries: &[(&str, &str)]) -> Document {
        let manifests: Vec<String> = entries
            .iter()
            .enumerate()
            .map(|(i, (architecture, variant))| {
                let variant = if variant.is_empty() { String::new() } else { format!(r#","variant":"{variant}""#) };
                format!(
                    r#"{{"mediaType":"{OCI_MANIFEST}","size":{i},"digest":"{HEX}","platform":{{"os":"linux","architecture":"{architecture}"{variant}}}}}"#
                )
            })
            .collect();
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, manifests.join(","));
        Document::parse(text.into_bytes(), None).expect("index")
    }

    fn refused(text: &str, declared: Option<&str>) -> String {
        Document::parse(text.as_bytes().to_vec(), declared).expect_err(text).to_string()
    }

    #[test]
    fn a_document_has_one_reading() {
        let plain = manifest("");
        let read = Document::parse(plain.clone().into_bytes(), Some("text/plain")).expect("shape decides");
        assert_eq!(read.media_type, OCI_MANIFEST);
        let docker = Document::parse(plain.clone().into_bytes(), Some(DOCKER_MANIFEST)).expect("header decides");
        assert_eq!(docker.media_type, DOCKER_MANIFEST);

        let both = plain.replace(r#""layers""#, r#""manifests":[],"layers""#);
        assert!(refused(&both, None).contains("both"));
        assert!(refused(&plain, Some(OCI_INDEX)).contains("other kind"));
        assert!(refused(&manifest(&format!(r#""mediaType":"{DOCKER_INDEX}","#)), None).contains("other kind"));
        assert!(refused(&manifest(r#""mediaType":"application/x","#), None).contains("application/x"));
        assert!(refused(r#"{"schemaVersion":1,"fsLayers":[]}"#, None).contains("schema 1"));
        assert!(refused(r#"{"schemaVersion":2}"#, None).contains("neither"));
        assert!(refused("[]", None).contains("JSON"));
        let sha512 = format!("sha512:{}", "0".repeat(128));
        assert!(refused(&plain.replace(HEX, &sha512), None).contains("not sha256"));
    }

    #[test]
    fn the_best_variant_of_the_platform_is_taken() {
        let amd64 = Platform { architecture: "amd64".into(), variants: vec!["", "v1"] };
        let arm = Platform { architecture: "arm".into(), variants: vec!["v7", "v6", ""] };
        type Case<'a> = (&'a [(&'a str, &'a str)], &'a Platform, Option<u64>);
        let cases: [Case<'_>; 5] = [
            (&[("arm64", "v8"), ("amd64", "v3"), ("amd64", "")], &amd64, Some(2)),
            (&[("amd64", "v1")], &amd64, Some(0)),
            (&[("amd64", "v3")], &amd64, None),
            (&[("arm", "v5"), ("arm", "v6"), ("arm", "v7")], &arm, Some(2)),
            (&[], &amd64, None),
        ];
        for (entries, platform, expected) in cases {
            let document = index(entries);
            let Parsed::Index(parsed) = &document.parsed else { panic!("an index") };
            let chosen = select_platform(parsed, &document.digest, platform).map(Descriptor::size);
            assert_eq!(chosen.as_ref().ok().copied(), expected, "{entries:?}: {chosen:?}");
        }
    }

    #[test]
    fn what_is_missing_and_what_is_there_are_named() {
        let document = index(&[("s390x", ""), ("arm", "v7")]);
        let Parsed::Index(parsed) = &document.parsed else { panic!("an index") };
        let wanted = Platform { architecture: "amd64".into(), variants: vec![""] };
        let text = select_platform(parsed, &document.digest, &wanted).expect_err("none fits").to_string();
        assert!(text.contains("linux/amd64") && text.contains("linux/s390x, linux/arm/v7"), "{text}");
    }
}
