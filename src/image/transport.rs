//! HTTP clients for registries: TLS with the node's certificates and those of certs.d, proxies from the environment.
//!
//! One [`Transport`] lives as long as a pull, so that new certificates, keys and proxies are seen by the next one and nothing
//! of it stays in memory in between. Redirects are never followed here: `registry` does it, where credentials are known.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

/// Longest wait for a connection; the progress timeout may be shorter.
const CONNECT: Duration = Duration::from_secs(30);

/// Why no client could be made.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// A file of certs.d can't be used.
    #[error("cannot use {path}")]
    Certificate {
        /// Which.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// A file of certs.d is well formed, but no certificate.
    #[error("cannot use {path}")]
    Unfit {
        /// Which.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// A key has no certificate beside it.
    #[error("{path} has no certificate of the same name (.cert) beside it")]
    Alone {
        /// The key.
        path: PathBuf,
    },
    /// A certificate or key was not accepted.
    #[error("cannot set up TLS for {host}")]
    Tls {
        /// For which registry.
        host: String,
        /// Why.
        source: rustls::Error,
    },
    /// A directory can't be read.
    #[error("cannot read {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The client can't be built, for example because of a proxy's address.
    #[error("cannot set up an HTTP client")]
    Client {
        /// Why.
        source: reqwest::Error,
    },
}

/// What a connection is to be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Kind {
    /// Only where the host has certificates of its own.
    host: Option<String>,
    tls: bool,
    verified: bool,
}

/// Clients by what they need.
pub struct Transport {
    certs_dirs: Vec<PathBuf>,
    timeout: Duration,
    roots: Mutex<Option<Arc<RootCertStore>>>,
    clients: Mutex<HashMap<Kind, reqwest::Client>>,
}

impl Transport {
    /// `certs_dirs`: each holds directories by host. `timeout`: for connecting.
    pub fn new(certs_dirs: &[PathBuf], timeout: Duration) -> Self {
        Self { certs_dirs: certs_dirs.to_vec(), timeout, roots: Mutex::default(), clients: Mutex::default() }
    }

    /// A client for `host` (`name[:port]`). May read files; a pull does so a few times.
    pub fn client(&self, host: &str, tls: bool, verified: bool) -> Result<reqwest::Client, TransportError> {
        // Docker Hub's directory has the name that images have.
        let named = if host == "registry-1.docker.io" { "docker.io" } else { host };
        let mut directories = self.certs_dirs.iter().map(|dir| dir.join(named)).filter(|_| tls);
        let directory = directories.find(|dir| dir.is_dir());
        let kind = Kind { host: directory.is_some().then(|| host.to_string()), tls, verified };
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&kind) {
            return Ok(client.clone());
        }
        let config = self.config(host, directory.as_deref(), tls, verified)?;
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(config)
            // One connection for each layer: no shared flow control, and a cut one is the trouble of one layer.
            .http1_only()
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connect_timeout(self.timeout.min(CONNECT))
            .pool_idle_timeout(Duration::from_secs(20))
            .user_agent(concat!("copepod/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|source| TransportError::Client { source })?;
        clients.insert(kind, client.clone());
        Ok(client)
    }

    fn config(&self, host: &str, directory: Option<&Path>, tls: bool, verified: bool) -> Result<ClientConfig, TransportError> {
        let fail = |source| TransportError::Tls { host: host.to_string(), source };
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions().map_err(fail)?;
        let files = directory.map_or_else(|| Ok(Vec::new()), list)?;
        let builder = if !verified {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Unverified(provider)))
        } else if tls {
            let mut roots = self.roots();
            for path in files.iter().filter(|path| path.extension().is_some_and(|e| e == "crt")) {
                for certificate in certificates(path)? {
                    let unfit = |source| TransportError::Unfit { path: path.clone(), source };
                    Arc::make_mut(&mut roots).add(certificate).map_err(unfit)?;
                }
            }
            builder.with_root_certificates(roots)
        } else {
            builder.with_root_certificates(RootCertStore::empty())
        };
        let alone = |path: &&PathBuf| path.extension().is_some_and(|e| e == "key") && !files.contains(&path.with_extension("cert"));
        if let Some(path) = files.iter().find(alone) {
            return Err(TransportError::Alone { path: path.clone() });
        }
        // Of several client certificates the first by name is shown.
        let mut config = match files.iter().find(|path| path.extension().is_some_and(|e| e == "cert")) {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let key_path = path.with_extension("key");
                let key = PrivateKeyDer::from_pem_file(&key_path).map_err(|source| TransportError::Certificate { path: key_path, source })?;
                let unfit = |source| TransportError::Unfit { path: path.clone(), source };
                builder.with_client_auth_cert(certificates(path)?, key).map_err(unfit)?
            }
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    /// The node's trusted certificates, read once in a pull. What can't be read is left away: the handshake says what is missing.
    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(roots.get_or_insert_with(|| {
            let mut store = RootCertStore::empty();
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            Arc::new(store)
        }))
    }
}

fn list(directory: &Path) -> Result<Vec<PathBuf>, TransportError> {
    let fail = |source| TransportError::Directory { path: directory.to_path_buf(), source };
    let entries = std::fs::read_dir(directory).map_err(fail)?;
    let mut paths = entries.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(fail)?;
    paths.sort();
    Ok(paths)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TransportError> {
    let fail = |source| TransportError::Certificate { path: path.to_path_buf(), source };
    CertificateDer::pem_file_iter(path).map_err(fail)?.collect::<Result<_, _>>().map_err(fail)
}

/// Takes any certificate: what `insecure = true` asks for. Signatures of the handshake are still checked.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
