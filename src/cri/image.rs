//! ImageService: one thin handler per RPC.

use std::collections::HashMap;
use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::{Cri, Reply, from_proto, later, rpc, status, to_proto};
use crate::api::{self, image_service_server::ImageService};
use crate::errchain::Remote;
use crate::image::{FsInfo, Image, ImageError};

impl From<ImageError> for Remote {
    fn from(error: ImageError) -> Self {
        Remote::new(&error)
    }
}

#[tonic::async_trait]
impl ImageService for Cri {
    async fn list_images(&self, req: Request<api::ListImagesRequest>) -> Reply<api::ListImagesResponse> {
        let wanted = req.into_inner().filter.and_then(|filter| filter.image).map(|image| image.image).filter(|image| !image.is_empty());
        let images = match wanted {
            Some(reference) => self.service.images.find(&reference).map_err(|error| status("ListImages", &error.into()))?.into_iter().collect(),
            None => self.service.images.list(),
        };
        Ok(Response::new(api::ListImagesResponse { images: images.iter().map(|image| to_proto::image(image)).collect() }))
    }

    type StreamImagesStream = Pin<Box<dyn Stream<Item = Result<api::StreamImagesResponse, Status>> + Send>>;

    async fn stream_images(&self, _: Request<api::StreamImagesRequest>) -> Reply<Self::StreamImagesStream> {
        Err(later("StreamImages"))
    }

    async fn image_status(&self, req: Request<api::ImageStatusRequest>) -> Reply<api::ImageStatusResponse> {
        let req = req.into_inner();
        let reference = from_proto::image(req.image).map_err(|error| status("ImageStatus", &error))?;
        let image = self.service.images.find(&reference).map_err(|error| status("ImageStatus", &error.into()))?;
        let info = match &image {
            Some(image) if req.verbose => HashMap::from([("info".to_string(), verbose(image))]),
            _ => HashMap::new(),
        };
        Ok(Response::new(api::ImageStatusResponse { image: image.map(|image| to_proto::image(&image)), info }))
    }

    async fn pull_image(&self, req: Request<api::PullImageRequest>) -> Reply<api::PullImageResponse> {
        let req = req.into_inner();
        let reference = from_proto::image(req.image).map_err(|error| status("PullImage", &error))?;
        let auth = from_proto::credentials(req.auth);
        // Not in a task of its own: a caller that goes gives up its interest, and the pull goes on only if another waits.
        let image = self.service.images.pull(&reference, auth).await.map_err(|error| status("PullImage", &error.into()))?;
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

/// What crictl shows of an image's configuration.
fn verbose(image: &Image) -> String {
    let config = &image.config;
    serde_json::json!({
        "layers": image.layers,
        "os": image.os,
        "architecture": image.architecture,
        "created": image.created,
        "config": {"User": config.user, "Env": config.env, "Entrypoint": config.entrypoint, "Cmd": config.cmd, "WorkingDir": config.working_dir},
    })
    .to_string()
}

fn filesystem(info: &FsInfo) -> api::FilesystemUsage {
    api::FilesystemUsage {
        timestamp: crate::service::now() as i64,
        fs_id: Some(api::FilesystemIdentifier { mountpoint: info.mountpoint.to_string_lossy().into_owned() }),
        used_bytes: Some(api::UInt64Value { value: info.used_bytes }),
        inodes_used: Some(api::UInt64Value { value: info.used_inodes }),
    }
}
