//! One file of registries.conf: its keys, checked.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::super::reference;
use super::{AUTH_FILES, Mirror, Mode, Registries, RegistriesError, Registry, When};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct File {
    unqualified_search_registries: Option<Vec<String>>,
    short_name_mode: Option<String>,
    credential_helpers: Option<Vec<String>>,
    #[serde(default)]
    aliases: BTreeMap<String, String>,
    #[serde(default)]
    registry: Vec<Table>,
    /// Version 1 of the format.
    registries: Option<toml::Value>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Table {
    prefix: Option<String>,
    location: Option<String>,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    blocked: bool,
    #[serde(default)]
    mirror_by_digest_only: bool,
    pull_from_mirror: Option<String>,
    #[serde(default)]
    mirror: Vec<MirrorTable>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MirrorTable {
    #[serde(default)]
    location: String,
    #[serde(default)]
    insecure: bool,
    pull_from_mirror: Option<String>,
}

const TOP: &[&str] = &[
    "unqualified-search-registries",
    "short-name-mode",
    "credential-helpers",
    "aliases",
    "registry",
    "registries",
    // Meant for others.
    "additional-layer-store-auth-helper",
];
const TABLE: &[&str] = &["prefix", "location", "insecure", "blocked", "mirror-by-digest-only", "pull-from-mirror", "mirror"];
const MIRROR: &[&str] = &["location", "insecure", "pull-from-mirror"];

impl Registries {
    /// Takes one file's text. What a later file says replaces what an earlier one said: a `[[registry]]` by its prefix, an alias
    /// by its name, everything else whole.
    pub(super) fn add(&mut self, text: &str, path: &Path) -> Result<(), RegistriesError> {
        let file: File = toml::from_str(text).map_err(|source| RegistriesError::Parse { path: path.to_path_buf(), source: Box::new(source) })?;
        if file.registries.is_some() {
            let what = "[registries] is version 1 of the format, which is not supported: write [[registry]]";
            return Err(RegistriesError::Registry { path: path.to_path_buf(), registry: String::new(), what });
        }
        self.unknown.extend(unknown(text).into_iter().map(|key| format!("{}: {key}", path.display())));
        let mut registries: Vec<Registry> = Vec::new();
        for table in file.registry {
            let registry = table.checked(path)?;
            match registries.iter().find(|other| other.prefix == registry.prefix) {
                Some(other) if *other != registry => return Err(bad(path, &registry.prefix, "it is there twice, and not the same")),
                Some(_) => {}
                None => registries.push(registry),
            }
        }
        let values = Values { path };
        if let Some(search) = file.unqualified_search_registries {
            self.search = Some(values.search(search)?);
        }
        if let Some(mode) = file.short_name_mode {
            self.mode = values.mode(&mode)?;
        }
        if let Some(helpers) = file.credential_helpers {
            self.helpers = Some(values.helpers(helpers)?);
        }
        for (name, value) in file.aliases {
            values.alias(&name, &value)?;
            // An empty value takes back what an earlier file says.
            if value.is_empty() {
                self.aliases.remove(&name)
            } else {
                self.aliases.insert(name, value)
            };
        }
        for registry in registries {
            self.registries.retain(|other| other.prefix != registry.prefix);
            self.registries.push(registry);
        }
        Ok(())
    }
}

fn bad(path: &Path, registry: &str, what: &'static str) -> RegistriesError {
    RegistriesError::Registry { path: path.to_path_buf(), registry: registry.to_string(), what }
}

/// Keys that nobody knows: probably typing errors, perhaps of a later release. `text` was parsed before.
fn unknown(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut look = |table: &toml::Table, known: &[&str], place: &str| {
        found.extend(table.keys().filter(|key| !known.contains(&key.as_str())).map(|key| format!("{place}{key}")));
    };
    let Ok(top) = text.parse::<toml::Table>() else { return found };
    look(&top, TOP, "");
    let tables = |value: Option<&toml::Value>| -> Vec<toml::Table> {
        value.and_then(toml::Value::as_array).map(|all| all.iter().filter_map(|v| v.as_table().cloned()).collect()).unwrap_or_default()
    };
    for table in tables(top.get("registry")) {
        look(&table, TABLE, "registry.");
        for mirror in tables(table.get("mirror")) {
            look(&mirror, MIRROR, "registry.mirror.");
        }
    }
    found
}

impl Table {
    fn checked(self, path: &Path) -> Result<Registry, RegistriesError> {
        let trim = |text: String| text.trim_end_matches('/').to_string();
        let location = trim(self.location.unwrap_or_default());
        let prefix = self.prefix.map(trim).filter(|p| !p.is_empty()).unwrap_or_else(|| location.clone());
        let bad = |what| Err(bad(path, &prefix, what));
        if prefix.is_empty() {
            return bad("it has neither prefix nor location");
        }
        if location.contains("://") || prefix.contains("://") {
            return bad("prefix and location are written without http:// or https://");
        }
        let wildcard = prefix.starts_with("*.");
        if prefix[usize::from(wildcard)..].contains('*') {
            return bad("a wildcard stands only at the beginning, as *.example.com");
        }
        if location.contains('*') && !(wildcard && location == prefix) {
            return bad("a location has no wildcard");
        }
        if self.pull_from_mirror.is_some_and(|when| !when.is_empty()) {
            return bad("pull-from-mirror belongs into its mirrors");
        }
        let mut mirrors = Vec::new();
        for mirror in self.mirror {
            let when = match mirror.pull_from_mirror.as_deref().unwrap_or("") {
                "" if self.mirror_by_digest_only => When::DigestOnly,
                "" => When::All,
                _ if self.mirror_by_digest_only => return bad("mirror-by-digest-only and pull-from-mirror exclude each other"),
                "all" => When::All,
                "digest-only" => When::DigestOnly,
                "tag-only" => When::TagOnly,
                _ => return bad("pull-from-mirror of a mirror is all, digest-only or tag-only"),
            };
            let location = trim(mirror.location);
            if location.is_empty() || location.contains("://") || location.contains('*') {
                return bad("a mirror's location is a host with an optional path, without http:// or https://");
            }
            mirrors.push(Mirror { location, insecure: mirror.insecure, when });
        }
        let location = match location {
            location if wildcard && location == prefix => String::new(),
            location if location.is_empty() && !wildcard => prefix.clone(),
            location => location,
        };
        Ok(Registry { prefix, location, insecure: self.insecure, blocked: self.blocked, mirrors, path: path.to_path_buf() })
    }
}

/// Checks of values outside of `[[registry]]`.
struct Values<'a> {
    path: &'a Path,
}

impl Values<'_> {
    fn bad(&self, key: &'static str, value: &str, what: &'static str) -> RegistriesError {
        RegistriesError::Value { path: self.path.to_path_buf(), key, value: value.chars().take(300).collect(), what }
    }

    fn search(&self, registries: Vec<String>) -> Result<Vec<String>, RegistriesError> {
        let check = |written: String| {
            let registry = written.trim_end_matches('/');
            let (host, path) = registry.split_once('/').map_or((registry, None), |(host, path)| (host, Some(path)));
            let fits = reference::is_domain(host) && reference::check_domain(host).is_ok() && path.is_none_or(|p| reference::check_path(p).is_ok());
            let what = "must be a registry's host with an optional port, without http:// or https://";
            if fits { Ok(registry.to_string()) } else { Err(self.bad("unqualified-search-registries", &written, what)) }
        };
        registries.into_iter().map(check).collect()
    }

    fn mode(&self, mode: &str) -> Result<Mode, RegistriesError> {
        match mode {
            "" | "permissive" => Ok(Mode::Permissive),
            "enforcing" => Ok(Mode::Enforcing),
            "disabled" => Ok(Mode::Disabled),
            _ => Err(self.bad("short-name-mode", mode, "must be enforcing, permissive or disabled")),
        }
    }

    fn helpers(&self, helpers: Vec<String>) -> Result<Vec<String>, RegistriesError> {
        match helpers.iter().find(|name| *name != AUTH_FILES && !super::super::auth::is_helper_name(name)) {
            Some(name) => Err(self.bad("credential-helpers", name, "must be what follows docker-credential- in a program's name")),
            None => Ok(helpers),
        }
    }

    fn alias(&self, name: &str, value: &str) -> Result<(), RegistriesError> {
        if !reference::is_short(name) || name.contains([':', '@']) || reference::check_path(name).is_err() {
            return Err(self.bad("aliases", name, "must be a name without registry, tag and digest"));
        }
        let full = value
            .split_once('/')
            .is_some_and(|(host, path)| reference::is_domain(host) && reference::check_domain(host).is_ok() && reference::check_path(path).is_ok());
        if value.is_empty() || full { Ok(()) } else { Err(self.bad("aliases", value, "must be a registry and a repository, without tag and digest")) }
    }
}
