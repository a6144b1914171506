//! Image references and the credentials of a pull.

use super::{bad, missing};
use crate::api;
use crate::errchain::Remote;

/// Credentials of a pull. What is wrong with them is said without them.
pub fn credentials(auth: Option<api::AuthConfig>) -> Result<Option<crate::image::Credentials>, Remote> {
    let Some(auth) = auth.filter(|auth| *auth != api::AuthConfig::default()) else { return Ok(None) };
    let credentials = crate::image::Credentials {
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        server_address: auth.server_address,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    };
    if !credentials.auth_is_readable() {
        return Err(bad("auth.auth", "…", "is not base64 of a user, a colon and a password"));
    }
    Ok(Some(credentials))
}

/// The namespace of the pod that an image is pulled for; empty: unknown. It becomes a file's name.
pub fn pull_namespace(sandbox: Option<api::PodSandboxConfig>) -> Result<String, Remote> {
    let namespace = sandbox.and_then(|config| config.metadata).map(|metadata| metadata.namespace).unwrap_or_default();
    let fits = namespace.len() <= 253 && !namespace.starts_with('.') && !namespace.contains(['/', '\0']);
    if fits { Ok(namespace) } else { Err(bad("sandbox_config.metadata.namespace", &namespace, "is no name of a namespace")) }
}

/// The reference of an image spec.
pub fn image(spec: Option<api::ImageSpec>) -> Result<String, Remote> {
    let spec = spec.ok_or_else(|| missing("image"))?;
    if spec.image.is_empty() { Err(missing("image.image")) } else { Ok(spec.image) }
}
