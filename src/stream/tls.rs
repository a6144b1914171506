//! TLS of the streaming server: certificates from files, read again when they change.
//!
//! Whoever renews a certificate writes certificate and key one after the other, so what is read in between doesn't fit
//! together: then the last pair that did stays in use. The files are looked at when a client connects, which is rare.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, version};

/// The oldest version of TLS that is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsVersion {
    /// TLS 1.2 and 1.3.
    V1_2,
    /// TLS 1.3 alone.
    V1_3,
}

/// Where certificates are.
#[derive(Debug, Clone)]
pub struct TlsConfig {
    /// The certificate with its chain, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
    /// Authorities of clients' certificates, PEM; `None`: clients need none.
    pub client_authorities: Option<PathBuf>,
    /// The oldest version.
    pub min_version: TlsVersion,
}

/// Why TLS can't be spoken.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be looked at.
    #[error("cannot read {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file holds nothing of what it should.
    #[error("cannot use {path}")]
    Pem {
        /// Which.
        path: PathBuf,
        /// The cause.
        source: rustls::pki_types::pem::Error,
    },
    /// The key doesn't fit the certificate, or an authority is unusable.
    #[error("cannot set up TLS with {path}")]
    Unfit {
        /// The certificate's or authorities' file.
        path: PathBuf,
        /// The cause.
        source: rustls::Error,
    },
    /// No certificate of a client could ever be verified.
    #[error("cannot verify clients with {path}")]
    Verifier {
        /// The authorities' file.
        path: PathBuf,
        /// The cause.
        source: rustls::server::VerifierBuilderError,
    },
}

/// What tells one version of a file from the next.
type Stamp = (u64, u64, i64, i64, u64);

/// Certificates in use.
pub struct Certificates {
    config: TlsConfig,
    current: Mutex<(Vec<Stamp>, Arc<ServerConfig>)>,
}

impl Certificates {
    /// Reads the files; what can't be used is an error here, and only a warning later.
    pub fn load(config: TlsConfig) -> Result<Self, TlsError> {
        let stamps = stamps(&config)?;
        let server = server_config(&config)?;
        Ok(Self { config, current: Mutex::new((stamps, server)) })
    }

    /// What to serve the next client with. Reads the files again if one has changed; blocks on them.
    pub fn current(&self) -> Arc<ServerConfig> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(stamps) = stamps(&self.config) else { return Arc::clone(&current.1) };
        if stamps != current.0 {
            // Also when they don't fit: they are warned about once, and read again when they change again.
            current.0 = stamps;
            match server_config(&self.config) {
                Ok(server) => {
                    tracing::info!(certificate = %self.config.certificate.display(), "certificates read again");
                    current.1 = server;
                }
                Err(error) => tracing::warn!(error = %crate::errchain::Chain(&error), "changed certificates are not used"),
            }
        }
        Arc::clone(&current.1)
    }
}

fn stamps(config: &TlsConfig) -> Result<Vec<Stamp>, TlsError> {
    let files = [Some(&config.certificate), Some(&config.key), config.client_authorities.as_ref()];
    let stamp = |path: &PathBuf| {
        let meta = std::fs::metadata(path).map_err(|source| TlsError::File { path: path.clone(), source })?;
        Ok((meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len()))
    };
    files.into_iter().flatten().map(stamp).collect()
}

fn server_config(config: &TlsConfig) -> Result<Arc<ServerConfig>, TlsError> {
    let unfit = |path: &Path| {
        let path = path.to_path_buf();
        move |source| TlsError::Unfit { path, source }
    };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions: &[_] = match config.min_version {
        TlsVersion::V1_2 => &[&version::TLS12, &version::TLS13],
        TlsVersion::V1_3 => &[&version::TLS13],
    };
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(versions).map_err(unfit(&config.certificate))?;
    let builder = match &config.client_authorities {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates(path)? {
                roots.add(authority).map_err(unfit(path))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|source| TlsError::Verifier { path: path.clone(), source })?)
        }
    };
    let key = PrivateKeyDer::from_pem_file(&config.key).map_err(|source| TlsError::Pem { path: config.key.clone(), source })?;
    let mut server = builder.with_single_cert(certificates(&config.certificate)?, key).map_err(unfit(&config.certificate))?;
    server.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(server))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fail = |source| TlsError::Pem { path: path.to_path_buf(), source };
    CertificateDer::pem_file_iter(path).map_err(fail)?.collect::<Result<_, _>>().map_err(fail)
}
