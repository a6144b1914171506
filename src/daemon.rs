//! The composition root: configuration, stores, service, sockets, and an orderly end.

mod notify;

use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;

use crate::api::image_service_server::ImageServiceServer;
use crate::api::runtime_service_server::RuntimeServiceServer;
use crate::config::Config;
use crate::cri::streaming::Opener;
use crate::cri::{Cri, MAX_MESSAGE};
use crate::image::{self, ImageError, Images};
use crate::net::cni::{self, NetError, Networks};
use crate::service::{Service, ServiceError};
use crate::stream::{self, StreamError, TlsConfig, TlsVersion};
use notify::Notify;

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The runtime's threads can't be started.
    #[error("cannot start threads")]
    Threads(#[source] io::Error),
    /// Images can't be opened.
    #[error("cannot open the image store")]
    Images(#[source] ImageError),
    /// The network's configuration can't be read.
    #[error("cannot open the network configuration")]
    Networks(#[source] NetError),
    /// Pods can't be taken back.
    #[error("cannot take over the state of the node")]
    Service(#[source] ServiceError),
    /// The streaming server can't be started.
    #[error("cannot serve exec, attach and port-forward")]
    Streaming(#[source] StreamError),
    /// The socket can't be served.
    #[error("cannot serve {path}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Serving ended.
    #[error("the gRPC server failed")]
    Serve(#[source] tonic::transport::Error),
}

/// Runs until SIGTERM or SIGINT. Containers go on; a daemon started later takes them back.
pub fn run(config: Config) -> Result<(), DaemonError> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(DaemonError::Threads)?.block_on(serve(config))
}

async fn serve(config: Config) -> Result<(), DaemonError> {
    let listen = config.listen.clone();
    let notify = Arc::new(Notify::from_env());
    let images = Images::open(image_config(&config)).map_err(DaemonError::Images)?;
    let networks = Networks::new(network_config(&config)).map_err(DaemonError::Networks)?;
    tokio::spawn(networks.clone().watch());
    let streaming = stream_config(&config);
    let service = Service::start(config, images, networks).await.map_err(DaemonError::Service)?;
    let streaming = stream::Server::start(streaming, Arc::new(Opener(service.clone()))).await.map_err(DaemonError::Streaming)?;
    let streaming = Arc::new(streaming);
    let cri = Cri::new(service, streaming.clone());
    let listener = bind(&listen).map_err(|source| DaemonError::Listen { path: listen.clone(), source })?;
    tracing::info!(socket = %listen.display(), version = env!("CARGO_PKG_VERSION"), "serving");
    notify.tell("READY=1");
    let (watched, watcher) = (listen.clone(), notify.clone());
    tokio::spawn(async move { notify::watchdog(&watcher, &watched).await });
    let limit = MAX_MESSAGE;
    let served = tonic::transport::Server::builder()
        .add_service(RuntimeServiceServer::new(cri.clone()).max_decoding_message_size(limit).max_encoding_message_size(limit))
        .add_service(ImageServiceServer::new(cri).max_decoding_message_size(limit).max_encoding_message_size(limit))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), ended(notify))
        .await;
    streaming.stop().await;
    // Only now: a client that finds no socket knows that nobody serves it.
    let _ = std::fs::remove_file(&listen);
    served.map_err(DaemonError::Serve)
}

/// The socket, for root alone. One that a dead daemon left is replaced; who serves the state directory holds its lock.
fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

async fn ended(notify: Arc<Notify>) {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => tracing::info!("SIGTERM: ending; containers go on"),
        _ = int.recv() => tracing::info!("SIGINT: ending; containers go on"),
    }
    notify.tell("STOPPING=1");
    // Streams of events never end by themselves: those that have not ended by then are cut.
    tokio::spawn(async {
        tokio::time::sleep(std::time::Duration::from_secs(5)).await;
        tracing::info!("clients did not let go within 5 s");
        std::process::exit(0);
    });
}

fn image_config(config: &Config) -> image::Config {
    image::Config {
        registries_conf: config.image.registries_conf.clone(),
        registries_conf_dir: config.image.registries_conf_dir.clone(),
        certs_dirs: config.image.certs_dirs.clone(),
        auth_files: config.image.auth_files.clone(),
        namespace_auth_dir: Some(config.image.namespace_auth_dir.clone()).filter(|dir| !dir.as_os_str().is_empty()),
        credential_helper_timeout: config.image.credential_helper_timeout.0,
        max_parallel_layers: config.image.max_parallel_layers,
        progress_timeout: config.image.progress_timeout.0,
        pinned: config.image.pinned.clone(),
        ..image::Config::new(config.root.clone())
    }
}

fn network_config(config: &Config) -> cni::Config {
    cni::Config {
        conf_dir: config.network.cni_conf_dir.clone(),
        bin_dirs: config.network.cni_bin_dirs.clone(),
        cache_dir: config.network.cni_cache_dir.clone(),
        network: (!config.network.network.is_empty()).then(|| config.network.network.clone()),
        add_timeout: config.network.add_timeout.0,
        del_timeout: config.network.del_timeout.0,
        owner: config.state.to_string_lossy().into_owned(),
        ..cni::Config::default()
    }
}

fn stream_config(config: &Config) -> stream::Config {
    let streaming = &config.streaming;
    let file = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_path_buf());
    let tls = file(&streaming.tls_cert_file).map(|certificate| TlsConfig {
        certificate,
        key: streaming.tls_key_file.clone(),
        client_authorities: file(&streaming.tls_client_ca_file),
        min_version: if streaming.tls_min_version == "1.3" { TlsVersion::V1_3 } else { TlsVersion::V1_2 },
    });
    stream::Config {
        address: streaming.address,
        port: streaming.port,
        tls,
        idle_timeout: streaming.idle_timeout.0,
        max_connections: streaming.max_connections,
    }
}
