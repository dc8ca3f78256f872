//! CRI ImageService over the image store, and how an image looks in CRI.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use stasis_cri_api::runtime::image_service_server::ImageService;
use stasis_cri_api::runtime::*;
use stasis_image::Auth;
use tonic::codegen::BoxStream;
use tonic::{Request, Status, async_trait};

use crate::request::{present, required};
use crate::status::from_image;
use crate::streams::one_a_message;
use crate::{Answer, Parts, call};

/// The service.
#[derive(Debug)]
pub(crate) struct ImageCalls(pub(crate) Arc<Parts>);

#[async_trait]
impl ImageService for ImageCalls {
    async fn list_images(&self, request: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        call::read("ListImages", "", async {
            Ok(ListImagesResponse { images: self.listed(request.into_inner().filter) })
        })
        .await
    }

    async fn image_status(&self, request: Request<ImageStatusRequest>) -> Answer<ImageStatusResponse> {
        let ImageStatusRequest { image, verbose } = request.into_inner();
        let name = image.unwrap_or_default().image;
        call::read("ImageStatus", &name, async {
            required(&name, "image.image")?;
            // "If the image is not present, returns a response with ImageStatusResponse.Image set to nil."
            let Some(image) = self.0.images.resolve(&name) else { return Ok(ImageStatusResponse::default()) };
            let info = if verbose { self.info(&image).await? } else { HashMap::new() };
            let image = to_cri(&image, &self.0.pods.needed_images());
            Ok(ImageStatusResponse { image: Some(image), info })
        })
        .await
    }

    async fn pull_image(&self, request: Request<PullImageRequest>) -> Answer<PullImageResponse> {
        let PullImageRequest { image, auth, .. } = request.into_inner();
        let name = image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
        call::change("PullImage", &name, async {
            let spec = present(image, "image")?;
            required(&spec.image, "image.image")?;
            let image = self.0.images.pull(&spec.image, auth.map(credentials), |_| {}).await.map_err(from_image)?;
            Ok(PullImageResponse { image_ref: image.id.clone() })
        })
        .await
    }

    async fn remove_image(&self, request: Request<RemoveImageRequest>) -> Answer<RemoveImageResponse> {
        let name = request.into_inner().image.unwrap_or_default().image;
        call::change("RemoveImage", &name, async {
            required(&name, "image.image")?;
            // "This call is idempotent, and must not return an error if the image has already been removed."
            self.0.images.remove(&name).await.map_err(from_image)?;
            Ok(RemoveImageResponse {})
        })
        .await
    }

    async fn image_fs_info(&self, _: Request<ImageFsInfoRequest>) -> Answer<ImageFsInfoResponse> {
        call::read("ImageFsInfo", "", async {
            let info = self.0.images.fs_info().await.map_err(from_image)?;
            let usage = FilesystemUsage {
                timestamp: unix_nanos(),
                fs_id: Some(FilesystemIdentifier { mountpoint: info.path.display().to_string() }),
                used_bytes: Some(UInt64Value { value: info.bytes }),
                inodes_used: Some(UInt64Value { value: info.inodes }),
            };
            // Images and writable layers share one file system; the kubelet takes both from here.
            Ok(ImageFsInfoResponse { image_filesystems: vec![usage.clone()], container_filesystems: vec![usage] })
        })
        .await
    }

    type StreamImagesStream = BoxStream<StreamImagesResponse>;
    async fn stream_images(&self, request: Request<StreamImagesRequest>) -> Answer<Self::StreamImagesStream> {
        call::read("StreamImages", "", async {
            let images = self.listed(request.into_inner().filter);
            Ok(one_a_message(images, |image| StreamImagesResponse { images: vec![image] }))
        })
        .await
    }
}

impl ImageCalls {
    /// All images, or the one that the filter names.
    fn listed(&self, filter: Option<ImageFilter>) -> Vec<Image> {
        let images = match filter.and_then(|filter| filter.image).unwrap_or_default().image.as_str() {
            "" => self.0.images.list(),
            name => Arc::new(self.0.images.resolve(name).into_iter().collect()),
        };
        let needed = self.0.pods.needed_images();
        images.iter().map(|image| to_cri(image, &needed)).collect()
    }

    /// What `crictl inspecti` shows: chain ID and configuration, under the keys that containerd uses.
    async fn info(&self, image: &stasis_image::Image) -> Result<HashMap<String, String>, Status> {
        let config = self.0.images.config_json(image).await.map_err(from_image)?;
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
        let info = serde_json::json!({ "chainID": image.chain_ids.last(), "imageSpec": config });
        Ok(HashMap::from([("info".to_owned(), info.to_string())]))
    }
}

/// An image as CRI shows it. `needed` are IDs of images that the kubelet must not collect, though no container names them.
fn to_cri(image: &stasis_image::Image, needed: &HashSet<String>) -> Image {
    let user = image.config.config().as_ref().and_then(|config| config.user().as_deref()).unwrap_or_default();
    let (uid, username) = user_of(user);
    Image {
        id: image.id.clone(),
        repo_tags: image.references.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid,
        username,
        spec: Some(ImageSpec {
            image: image.id.clone(),
            annotations: image.annotations.clone().into_iter().collect(),
            ..ImageSpec::default()
        }),
        pinned: image.pinned || needed.contains(&image.id),
    }
}

/// The user of an image's configuration (`name`, `uid`, either with `:group`) as CRI's uid or user name.
///
/// The kubelet refuses `runAsNonRoot` for a user name, as it cannot tell its uid. A number that is no uid is left a
/// name for that reason: wrapped around, it could become 0 (CVE-2024-40635).
fn user_of(user: &str) -> (Option<Int64Value>, String) {
    let user = user.split(':').next().unwrap_or_default();
    let is_number = !user.is_empty() && user.bytes().all(|byte| byte.is_ascii_digit());
    match user.parse::<u32>() {
        Ok(uid) if is_number => (Some(Int64Value { value: uid.into() }), String::new()),
        _ => (None, user.to_owned()),
    }
}

fn credentials(auth: AuthConfig) -> Auth {
    Auth {
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        server_address: auth.server_address,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    }
}

fn unix_nanos() -> i64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_of_images_are_uids_or_names() {
        let uid = |value| (Some(Int64Value { value }), String::new());
        let name = |name: &str| (None, name.to_owned());
        for (user, expected) in [
            ("", name("")),
            ("0", uid(0)),
            ("1000", uid(1000)),
            ("1000:2000", uid(1000)),
            ("4294967295", uid(4_294_967_295)),
            ("redis", name("redis")),
            ("redis:redis", name("redis")),
            // No uids: a wrapped or signed number must not become one.
            ("4294967296", name("4294967296")),
            ("-1", name("-1")),
            ("+0", name("+0")),
            ("0x0", name("0x0")),
        ] {
            assert_eq!(user_of(user), expected, "{user:?}");
        }
    }
}
