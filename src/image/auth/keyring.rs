//! Who may be shown which credentials: those of the request, then those of its namespace, then those of the node.

use std::path::PathBuf;
use std::time::Duration;

use super::file::{self, FileError, Found};
use super::helper::{self, HelperError};
use super::{Credentials, file::is_helper_name};
use crate::errchain::{Kind, Kinded};
use crate::image::registries::{AUTH_FILES, Source};

/// Why credentials can't be had, though there may be some.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// An auth file can't be used.
    #[error("auth file cannot be used")]
    File {
        /// Why.
        source: FileError,
    },
    /// A credential helper gives none.
    #[error("credential helper gives none")]
    Helper {
        /// Why.
        source: HelperError,
    },
    /// A thread failed.
    #[error("auth files were not read to their end")]
    Thread {
        /// How.
        source: tokio::task::JoinError,
    },
}

impl Kinded for AuthError {
    fn kind(&self) -> Kind {
        match self {
            AuthError::File { .. } => Kind::FailedPrecondition,
            AuthError::Helper { source: HelperError::Deadline { .. } } => Kind::DeadlineExceeded,
            AuthError::Helper { .. } => Kind::FailedPrecondition,
            AuthError::Thread { .. } => Kind::Internal,
        }
    }
}

/// Where the credentials of one pull come from.
#[derive(Debug, Clone, Default)]
pub struct Keyring {
    /// Those of the request.
    pub given: Option<Credentials>,
    /// The registry of the image, as its name has it.
    pub domain: String,
    /// The auth file of the pod's namespace.
    pub namespace_file: Option<PathBuf>,
    /// The auth files of the node, the first that knows the repository being taken.
    pub files: Vec<PathBuf>,
    /// Credential helpers, and [`AUTH_FILES`] where the files have their turn.
    pub helpers: Vec<String>,
    /// How long a credential helper may take.
    pub helper_timeout: Duration,
}

impl Keyring {
    /// The credentials for a source. What can't be used is passed over as long as something else knows the source.
    pub(in super::super) async fn credentials(&self, source: &Source) -> Result<Option<Credentials>, AuthError> {
        if let Some(given) = self.given.as_ref().filter(|given| given.are_for(&source.host, &self.domain, source.mirror)) {
            return Ok(Some(given.clone()));
        }
        let mut failed = None;
        if let Some(path) = &self.namespace_file {
            match self.of_file(path, source).await {
                Ok(None) => {}
                Ok(found) => return Ok(found),
                Err(error) => failed = Some(error),
            }
        }
        for helper in &self.helpers {
            let found = if helper == AUTH_FILES { self.of_files(source).await } else { self.of_helper(helper, &[source_host(source)]).await };
            match found {
                Ok(None) => {}
                Ok(found) => return Ok(found),
                Err(error) => _ = failed.get_or_insert(error),
            }
        }
        failed.map_or(Ok(None), Err)
    }

    async fn of_files(&self, source: &Source) -> Result<Option<Credentials>, AuthError> {
        let mut failed = None;
        for path in &self.files {
            match self.of_file(path, source).await {
                Ok(None) => {}
                Ok(found) => return Ok(found),
                Err(error) => _ = failed.get_or_insert(error),
            }
        }
        failed.map_or(Ok(None), Err)
    }

    async fn of_file(&self, path: &std::path::Path, source: &Source) -> Result<Option<Credentials>, AuthError> {
        let (path, name) = (path.to_path_buf(), source.name.clone());
        let found = tokio::task::spawn_blocking(move || file::look(&path, &name)).await.map_err(|source| AuthError::Thread { source })?;
        match found.map_err(|source| AuthError::File { source })? {
            Found::Nothing => Ok(None),
            Found::Credentials(credentials) => Ok(Some(*credentials)),
            Found::Helper { name, addresses } => self.of_helper(&name, &addresses).await,
        }
    }

    async fn of_helper(&self, name: &str, addresses: &[String]) -> Result<Option<Credentials>, AuthError> {
        debug_assert!(is_helper_name(name));
        for address in addresses {
            let found = helper::get(name, address, self.helper_timeout).await.map_err(|source| AuthError::Helper { source })?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}

/// The registry as credential helpers know it.
fn source_host(source: &Source) -> String {
    source.name.split('/').next().unwrap_or("").to_string()
}
