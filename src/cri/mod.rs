//! The CRI over gRPC: thin handlers between generated types and the service. Proto types stop here.

mod chunks;
mod events;
pub mod from_proto;
mod image;
mod metrics;
mod runtime;
pub mod streaming;
pub mod to_proto;

use std::future::Future;
use std::sync::Arc;

use tonic::{Code, Status};

use crate::errchain::{Chain, Kind, Kinded, Remote};
use crate::service::{Service, ServiceError};
use crate::stream::Server;

/// Bytes of one message, both ways: kubelet's own limit.
pub const MAX_MESSAGE: usize = 16 << 20;
/// Bytes of an error's text: HTTP/2 headers carry it.
const MAX_ERROR: usize = 4096;

/// Both services of the CRI.
#[derive(Clone)]
pub struct Cri {
    service: Arc<Service>,
    streaming: Arc<Server>,
}

impl Cri {
    /// Over a service, with the server that clients of Exec, Attach and PortForward are sent to.
    pub fn new(service: Arc<Service>, streaming: Arc<Server>) -> Self {
        Self { service, streaming }
    }
}

/// A reply.
type Reply<T> = Result<tonic::Response<T>, Status>;

/// Runs a mutating RPC in a task of its own: a server drops a handler's future when its client goes, and half an operation
/// must not be dropped with it. A panic fails this one RPC.
async fn rpc<T, E, F>(name: &'static str, operation: F) -> Result<T, Status>
where
    T: Send + 'static,
    E: Into<Remote> + Send + 'static,
    F: Future<Output = Result<T, E>> + Send + 'static,
{
    tracing::debug!(rpc = name, "begins");
    match tokio::spawn(operation).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(status(name, &error.into())),
        Err(_) => Err(Status::internal(format!("{name}: {}", ServiceError::Task))),
    }
}

impl From<ServiceError> for Remote {
    fn from(error: ServiceError) -> Self {
        error.remote()
    }
}

/// The one place where a kind of failure becomes a gRPC code, and where an RPC's error is logged.
fn status(rpc: &'static str, error: &Remote) -> Status {
    let code = match error.kind() {
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::DeadlineExceeded => Code::DeadlineExceeded,
        Kind::ResourceExhausted => Code::ResourceExhausted,
        Kind::Unavailable => Code::Unavailable,
        Kind::Unimplemented => Code::Unimplemented,
        Kind::PermissionDenied => Code::PermissionDenied,
        Kind::Unauthenticated => Code::Unauthenticated,
        Kind::Aborted => Code::Aborted,
        Kind::Internal => Code::Internal,
    };
    let mut text = Chain(error).to_string();
    match error.kind() {
        Kind::NotFound => tracing::debug!(rpc, error = text, "refused"),
        Kind::Internal => tracing::error!(rpc, error = text, "failed"),
        _ => tracing::warn!(rpc, error = text, "refused"),
    }
    if text.len() > MAX_ERROR {
        let cut = (0..=MAX_ERROR).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        text.truncate(cut);
    }
    Status::new(code, text)
}

/// An RPC that comes with a later release.
fn later(rpc: &'static str) -> Status {
    Status::unimplemented(format!("{rpc} is not built yet"))
}
