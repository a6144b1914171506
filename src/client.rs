//! A gRPC client of the daemon's own socket: for `copepod status` and `copepod drain`, and for the project's tests.

use std::path::Path;

use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Error, Uri};

/// Connects to the socket at `path`.
pub async fn connect(path: &Path) -> Result<Channel, Error> {
    let socket = path.to_path_buf();
    let dial = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(UnixStream::connect(socket).await?)) }
    });
    // The address is only the authority that the requests name.
    Endpoint::from_static("http://copepod").connect_with_connector(dial).await
}
