//! ImageService: one thin handler per RPC.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::chunks::{Streaming, chunked};
use super::{Cri, Reply, from_proto, rpc, status, to_proto};
use crate::api::{self, image_service_server::ImageService};
use crate::errchain::Remote;
use crate::image::{FsInfo, Image, ImageError};

impl From<ImageError> for Remote {
    fn from(error: ImageError) -> Self {
        Remote::new(&error)
    }
}

impl Cri {
    /// The images that pass a filter; none: all.
    fn images(&self, rpc: &'static str, filter: Option<api::ImageFilter>) -> Result<Vec<Arc<Image>>, Status> {
        let wanted = filter.and_then(|filter| filter.image).map(|image| image.image).filter(|image| !image.is_empty());
        match wanted {
            Some(reference) => {
                let found = self.service.images.find(&reference).map_err(|error| status(rpc, &error.into()))?;
                Ok(found.into_iter().collect())
            }
            None => Ok(self.service.images.list()),
        }
    }
}

#[tonic::async_trait]
impl ImageService for Cri {
    async fn list_images(&self, req: Request<api::ListImagesRequest>) -> Reply<api::ListImagesResponse> {
        let images = self.images("ListImages", req.into_inner().filter)?;
        Ok(Response::new(api::ListImagesResponse { images: images.iter().map(|image| to_proto::image(image)).collect() }))
    }

    type StreamImagesStream = Streaming<api::StreamImagesResponse>;

    async fn stream_images(&self, req: Request<api::StreamImagesRequest>) -> Reply<Self::StreamImagesStream> {
        let images = self.images("StreamImages", req.into_inner().filter)?;
        chunked(images.iter().map(|image| to_proto::image(image)).collect(), |images| api::StreamImagesResponse { images })
    }

    async fn image_status(&self, req: Request<api::ImageStatusRequest>) -> Reply<api::ImageStatusResponse> {
        let req = req.into_inner();
        let reference = from_proto::image(req.image).map_err(|error| status("ImageStatus", &error))?;
        let image = self.service.images.find(&reference).map_err(|error| status("ImageStatus", &error.into()))?;
        let info = match &image {
            Some(image) if req.verbose => HashMap::from([("info".to_string(), self.verbose(image))]),
            _ => HashMap::new(),
        };
        Ok(Response::new(api::ImageStatusResponse { image: image.map(|image| to_proto::image(&image)), info }))
    }

    async fn pull_image(&self, req: Request<api::PullImageRequest>) -> Reply<api::PullImageResponse> {
        let deadline = deadline(req.metadata());
        let req = req.into_inner();
        let reference = from_proto::image(req.image).map_err(|error| status("PullImage", &error))?;
        let auth = from_proto::credentials(req.auth).map_err(|error| status("PullImage", &error))?;
        let namespace = from_proto::pull_namespace(req.sandbox_config).map_err(|error| status("PullImage", &error))?;
        // Not in a task of its own: a caller that goes gives up its interest, and the pull goes on only if another waits.
        let pull = self.service.images.pull_for(&reference, auth, &namespace);
        let pulled = match deadline {
            None => pull.await,
            Some(limit) => match tokio::time::timeout(limit, pull).await {
                Ok(pulled) => pulled,
                Err(_) => {
                    tracing::warn!(image = reference, "pull was given up: the caller's deadline has passed");
                    return Err(Status::deadline_exceeded(format!("PullImage: image {reference:?} was not pulled before the caller's deadline")));
                }
            },
        };
        let image = pulled.map_err(pull_status)?;
        Ok(Response::new(api::PullImageResponse { image_ref: image.id.clone() }))
    }

    async fn remove_image(&self, req: Request<api::RemoveImageRequest>) -> Reply<api::RemoveImageResponse> {
        let reference = from_proto::image(req.into_inner().image).map_err(|error| status("RemoveImage", &error))?;
        let service = self.service.clone();
        rpc("RemoveImage", async move { service.remove_image(&reference).await }).await?;
        Ok(Response::new(api::RemoveImageResponse {}))
    }

    async fn image_fs_info(&self, _: Request<api::ImageFsInfoRequest>) -> Reply<api::ImageFsInfoResponse> {
        let info = self.service.images.fs_info().await.map_err(|error| status("ImageFsInfo", &error.into()))?;
        // Images and writable layers share one filesystem: kubelet compares the two mountpoints.
        Ok(Response::new(api::ImageFsInfoResponse { image_filesystems: vec![filesystem(&info)], container_filesystems: vec![filesystem(&info)] }))
    }
}

/// How long a caller waits, a little less: its own clock began earlier, and tonic answers a deadline that has passed with
/// Cancelled. `None`: it does not say, or nothing that can be read (gRPC over HTTP/2, "Requests").
fn deadline(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = number.parse().ok().filter(|_| number.len() <= 8)?;
    let limit = match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    };
    Some(limit.saturating_sub(Duration::from_millis(5)))
}

/// The status of a failed pull. kubelet looks for the words of k8s.io/cri-api/pkg/errors at the beginning of an error's text, and
/// finds them only where the code is Unknown: any other code it writes before them (remote_image.go, pullImageV1).
fn pull_status(error: ImageError) -> Status {
    let known = matches!(error, ImageError::RegistryUnavailable { .. });
    let status = status("PullImage", &error.into());
    if known { Status::unknown(status.message()) } else { status }
}

/// Bytes of an image's documents that `ImageStatus` shows whole.
const SHOWN: usize = 1 << 20;

impl Cri {
    /// What crictl shows of an image: its own documents, and where its layers are.
    fn verbose(&self, image: &Image) -> String {
        let documents = self.service.images.documents(image).filter(|(config, manifest)| config.len() + manifest.len() <= SHOWN);
        let (config, manifest) = documents.unzip();
        let json = |text: Option<String>| text.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
        let pulled_at = image.pulled_at.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        serde_json::json!({
            "imageSpec": json(config),
            "manifest": json(manifest),
            "layers": image.layers,
            "os": image.os,
            "architecture": image.architecture,
            "created": image.created,
            "pulledAt": pulled_at,
            "labels": image.config.labels,
        })
        .to_string()
    }
}

fn filesystem(info: &FsInfo) -> api::FilesystemUsage {
    api::FilesystemUsage {
        timestamp: crate::service::now() as i64,
        fs_id: Some(api::FilesystemIdentifier { mountpoint: info.mountpoint.to_string_lossy().into_owned() }),
        used_bytes: Some(api::UInt64Value { value: info.used_bytes }),
        inodes_used: Some(api::UInt64Value { value: info.used_inodes }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image_of(user: &str) -> Image {
        Image {
            id: String::new(),
            tags: Vec::new(),
            digests: Vec::new(),
            size: 1,
            layers: Vec::new(),
            config: crate::image::ImageConfig { user: user.into(), ..Default::default() },
            annotations: Default::default(),
            pinned: false,
            pulled_at: std::time::UNIX_EPOCH,
            created: String::new(),
            os: String::new(),
            architecture: String::new(),
        }
    }

    #[test]
    fn users_are_numbers_or_names() {
        let check = |user: &str, uid: Option<i64>, name: &str| {
            let shown = to_proto::image(&image_of(user));
            assert_eq!((shown.uid.map(|uid| uid.value), shown.username.as_str()), (uid, name), "{user:?}");
        };
        check("", None, "");
        check("0", Some(0), "");
        check("1000:1000", Some(1000), "");
        check("1000:staff", Some(1000), "");
        check("4294967294", Some(4_294_967_294), "");
        check("www:www", None, "www");
        check(":5", None, "");
        // Nobody takes these for a number that is none: kubelet sees a name, and refuses it where root is not allowed.
        for user in ["4294967295", "4294967296", "18446744073709551616", "-1", "+1000", "0x0", "1e3", " 5", "1 "] {
            check(user, None, user);
        }
    }

    #[test]
    fn deadlines_are_read() {
        let check = |text: &str, expected: Option<Duration>| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            assert_eq!(deadline(&metadata), expected, "{text}");
        };
        check("1m", Some(Duration::ZERO));
        check("999u", Some(Duration::ZERO));
        check("100m", Some(Duration::from_millis(95)));
        check("2S", Some(Duration::from_millis(1995)));
        check("99999999H", Some(Duration::from_secs(99_999_999 * 3600) - Duration::from_millis(5)));
        check("1M", Some(Duration::from_millis(59_995)));
        check("6000000000n", None);
        check("90000000n", Some(Duration::from_millis(85)));
        check("1x", None);
        check("m", None);
        check("", None);
        check("-1m", None);
        assert_eq!(deadline(&MetadataMap::new()), None);
    }
}
