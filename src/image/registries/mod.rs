//! registries.conf, version 2: what a short name stands for, where images really come from and in which order, who may be
//! spoken to without TLS, and which programs know credentials. As containers-registries.conf(5) has it.
//!
//! Parsed in `file`, kept up to date in `live`. Not here: `additional-layer-store-auth-helper`, since there are no such stores;
//! short-name-aliases.conf, which other tools write when somebody answers their questions; version 1 of the format.

mod file;
mod live;
mod short_name;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use super::reference::{self, BadReference, Reference};
use crate::errchain::{Kind, Kinded};
pub(super) use live::Live;

/// All that the files say.
#[derive(Debug, Default)]
pub struct Registries {
    registries: Vec<Registry>,
    /// `unqualified-search-registries`; `None`: no file says.
    search: Option<Vec<String>>,
    mode: Mode,
    /// Short name to full name.
    aliases: BTreeMap<String, String>,
    /// `credential-helpers`; `None`: no file says.
    helpers: Option<Vec<String>>,
    /// Keys that nobody knows, with their file.
    unknown: Vec<String>,
}

/// `short-name-mode`. There is never a terminal to ask at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Mode {
    /// More than one search registry is an error.
    Enforcing,
    /// All search registries are tried, in order.
    #[default]
    Permissive,
    /// Likewise.
    Disabled,
}

/// A place to pull an image from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// `host[:port]`, as it is spoken to.
    pub host: String,
    /// The repository there.
    pub repository: String,
    /// Registry and repository as an auth file names them: Docker Hub is `docker.io` there.
    pub name: String,
    /// The tag there, where that is another one than the image's.
    pub tag: Option<String>,
    /// TLS certificates are not checked, and plain HTTP is tried where there is no TLS.
    pub insecure: bool,
    /// A mirror: gets no credentials that were given for the image's own registry.
    pub mirror: bool,
}

/// Why the files can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistriesError {
    /// A file can't be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is no TOML or has wrong types in it.
    #[error("cannot parse {path}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Why, with line and column.
        source: Box<toml::de::Error>,
    },
    /// A `[[registry]]` makes no sense.
    #[error("{path}: registry {registry:?}: {what}")]
    Registry {
        /// In which file.
        path: PathBuf,
        /// In which `[[registry]]`.
        registry: String,
        /// What is wrong.
        what: &'static str,
    },
    /// Another value makes no sense.
    #[error("{path}: {key}: {value:?} {what}")]
    Value {
        /// In which file.
        path: PathBuf,
        /// Of which key.
        key: &'static str,
        /// The value.
        value: String,
        /// What it must be.
        what: &'static str,
    },
    /// The operator does not want this registry.
    #[error("registry {prefix} is blocked by {path}")]
    Blocked {
        /// The prefix that blocks.
        prefix: String,
        /// The file that has it.
        path: PathBuf,
    },
    /// What the image's name becomes is no name.
    #[error("registries.conf makes {location:?} of the image, which is no repository")]
    Location {
        /// What it becomes.
        location: String,
        /// Why that is none.
        source: BadReference,
    },
    /// Nothing says which registry a short name means.
    #[error("short name {name:?} has no alias, and unqualified-search-registries of registries.conf is empty: write the registry, too")]
    NoSearch {
        /// The name.
        name: String,
    },
    /// Several registries may be meant, and the mode asks for one.
    #[error(
        "short name {name:?} may be of {}: short-name-mode is enforcing, so write the registry or add an alias to registries.conf",
        registries.join(", ")
    )]
    Ambiguous {
        /// The name.
        name: String,
        /// Those that may be meant.
        registries: Vec<String>,
    },
}

impl Kinded for RegistriesError {
    fn kind(&self) -> Kind {
        match self {
            RegistriesError::Blocked { .. } => Kind::PermissionDenied,
            RegistriesError::NoSearch { .. } | RegistriesError::Ambiguous { .. } => Kind::InvalidArgument,
            _ => Kind::FailedPrecondition,
        }
    }
}

/// When a mirror is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    All,
    DigestOnly,
    TagOnly,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Mirror {
    location: String,
    insecure: bool,
    when: When,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Registry {
    prefix: String,
    /// Empty for a wildcard: the place stays as it is.
    location: String,
    insecure: bool,
    blocked: bool,
    mirrors: Vec<Mirror>,
    path: PathBuf,
}

impl Registries {
    /// Where to pull an image from, the best place first. Never empty.
    pub fn sources(&self, image: &Reference) -> Result<Vec<Source>, RegistriesError> {
        let name = image.to_string();
        let matching = self.registries.iter().filter_map(|registry| Some((matched(&registry.prefix, &name)?, registry)));
        let Some((length, registry)) = matching.max_by_key(|(_, registry)| registry.prefix.len()) else {
            return Ok(vec![source(&name, image, false, false)?]);
        };
        if registry.blocked {
            return Err(RegistriesError::Blocked { prefix: registry.prefix.clone(), path: registry.path.clone() });
        }
        let by_digest = image.digest().is_some();
        let rest = &name[length..];
        let mut sources = Vec::new();
        for mirror in &registry.mirrors {
            if mirror.when == When::All || (mirror.when == When::DigestOnly) == by_digest {
                sources.push(source(&format!("{}{rest}", mirror.location), image, mirror.insecure, true)?);
            }
        }
        let own = if registry.location.is_empty() { name.clone() } else { format!("{}{rest}", registry.location) };
        sources.push(source(&own, image, registry.insecure, false)?);
        Ok(sources)
    }

    /// The programs and files that are asked for credentials, in order: names of credential helpers, and [`AUTH_FILES`].
    pub(super) fn credential_helpers(&self) -> Vec<String> {
        self.helpers.clone().unwrap_or_else(|| vec![AUTH_FILES.to_string()])
    }
}

/// Stands for the auth files among credential helpers.
pub(super) const AUTH_FILES: &str = "containers-auth.json";

/// How many bytes of `name` a prefix covers. It ends where a component does; `*.example.com` covers any host below.
fn matched(prefix: &str, name: &str) -> Option<usize> {
    let end = match prefix.strip_prefix('*') {
        None => name.starts_with(prefix).then_some(prefix.len())?,
        Some(suffix) => {
            let host = name.split(['/', ':']).next().unwrap_or("");
            let (domain, path) = suffix.split_at(suffix.find('/').unwrap_or(suffix.len()));
            let end = host.len() + path.len();
            (host.ends_with(domain) && host.len() > domain.len() && name[host.len()..].starts_with(path)).then_some(end)?
        }
    };
    (name.len() == end || matches!(name.as_bytes()[end], b'/' | b':' | b'@')).then_some(end)
}

/// A place from its name, which may end in a tag or digest, as the image's does.
fn source(text: &str, image: &Reference, insecure: bool, mirror: bool) -> Result<Source, RegistriesError> {
    let fail = |source| RegistriesError::Location { location: text.chars().take(300).collect(), source };
    let name = text.split('@').next().unwrap_or("");
    let (name, tag) = match name.rfind(':').filter(|&colon| !name[colon..].contains('/')) {
        Some(colon) => (&name[..colon], Some(&name[colon + 1..])),
        None => (name, None),
    };
    let (host, repository) = name.split_once('/').ok_or_else(|| fail(BadReference::Empty))?;
    reference::check_domain(host).map_err(fail)?;
    reference::check_path(repository).map_err(fail)?;
    if let Some(tag) = tag {
        reference::check_tag(tag).map_err(fail)?;
    }
    let tag = tag.filter(|tag| image.tag() != Some(*tag)).map(str::to_string);
    // Docker Hub's registry is not where its name says.
    let spoken_to = if host == "docker.io" { "registry-1.docker.io" } else { host };
    Ok(Source { host: spoken_to.to_string(), repository: repository.to_string(), name: name.to_string(), tag, insecure, mirror })
}

#[cfg(test)]
mod tests;
