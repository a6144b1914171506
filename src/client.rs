//! A gRPC client of the daemon's own socket: for `copepod status` and `copepod drain`, and for the project's tests.

use std::io;
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Error, Uri};

/// Connects to the socket at `path`.
pub async fn connect(path: &Path) -> Result<Channel, Error> {
    let socket = path.to_path_buf();
    // The address is only the authority that the requests name.
    Endpoint::from_static("http://copepod").connect_with_connector(tower::service_fn(move |_: Uri| dial(socket.clone()))).await
}

/// Connects at the first call, and again after a connection broke. Must be called within a runtime.
pub fn lazy(path: &Path) -> Channel {
    let socket = path.to_path_buf();
    Endpoint::from_static("http://copepod").connect_with_connector_lazy(tower::service_fn(move |_: Uri| dial(socket.clone())))
}

async fn dial(socket: PathBuf) -> io::Result<TokioIo<UnixStream>> {
    Ok(TokioIo::new(UnixStream::connect(socket).await?))
}
