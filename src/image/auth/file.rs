//! Auth files: containers-auth.json(5), Docker's config.json, which has the same form, and its predecessor .dockercfg.
//!
//! Read at each use, so that a rotated password needs no restart. Nothing of a file's content gets into an error.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Credentials, HUB};

/// Bytes of an auth file; more is none.
const MAX_FILE: u64 = 1 << 20;
/// A file of this name is the older form: what is `auths` elsewhere is all of it.
const OLD: &str = ".dockercfg";
/// How Docker's own files and credential helpers know Docker Hub.
const HUB_ADDRESS: &str = "https://index.docker.io/v1/";

/// Why an auth file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It can't be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no JSON of the form expected.
    #[error("{path} is no auth file: wrong at line {line}, column {column}")]
    Form {
        /// Which.
        path: PathBuf,
        /// Where.
        line: usize,
        /// Where.
        column: usize,
    },
    /// An entry makes no sense.
    #[error("{path}: {key:?} {what}")]
    Entry {
        /// Which.
        path: PathBuf,
        /// Its key.
        key: String,
        /// What is wrong.
        what: &'static str,
    },
}

/// What a file says about a registry.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing.
    Nothing,
    /// These.
    Credentials(Box<Credentials>),
    /// That a program knows them, by one of these addresses.
    Helper {
        /// What follows `docker-credential-` in its name.
        name: String,
        /// The addresses to ask for, in order.
        addresses: Vec<String>,
    },
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct File {
    auths: Option<BTreeMap<String, Entry>>,
    cred_helpers: Option<BTreeMap<String, String>>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

impl Entry {
    fn credentials(&self) -> Credentials {
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        Credentials {
            username: text(&self.username),
            password: text(&self.password),
            auth: text(&self.auth),
            server_address: String::new(),
            identity_token: text(&self.identitytoken),
            registry_token: text(&self.registrytoken),
        }
    }
}

/// What the file at `path`, which may be absent, says about the repository `name` (`host[:port]/path`). Blocks.
pub(super) fn look(path: &Path, name: &str) -> Result<Found, FileError> {
    let fail = |source| FileError::Read { path: path.to_path_buf(), source };
    let mut text = Vec::new();
    match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(fail(error)),
        Ok(metadata) if !metadata.is_file() => return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"))),
        Ok(metadata) if metadata.len() > MAX_FILE => return Err(fail(io::ErrorKind::FileTooLarge.into())),
        Ok(_) => std::fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut text)).map_err(fail)?,
    };
    if text.iter().all(u8::is_ascii_whitespace) {
        return Ok(Found::Nothing);
    }
    let old = path.file_name().is_some_and(|file| file == OLD);
    let parsed = if old { serde_json::from_slice(&text).map(|auths| File { auths, ..File::default() }) } else { serde_json::from_slice(&text) };
    let file: File = parsed.map_err(|error| FileError::Form { path: path.to_path_buf(), line: error.line(), column: error.column() })?;
    file.find(name, old).map_err(|(key, what)| FileError::Entry { path: path.to_path_buf(), key, what })
}

impl File {
    fn find(self, name: &str, old: bool) -> Result<Found, (String, &'static str)> {
        let host = name.split('/').next().unwrap_or("");
        let helper = |key: &str, name: &str| {
            if !is_helper_name(name) {
                return Err((key.to_string(), "names no credential helper: that is what follows docker-credential- in a program's name"));
            }
            let mut addresses = vec![host.to_string()];
            if HUB.contains(&host) {
                addresses.insert(0, HUB_ADDRESS.to_string());
            }
            Ok(Found::Helper { name: name.to_string(), addresses })
        };
        // A registry with a helper is that helper's alone.
        let helpers = self.cred_helpers.unwrap_or_default();
        if let Some((key, program)) = helpers.iter().find(|(key, _)| normal(key, old) == normal(host, old)) {
            return helper(key, program);
        }
        let auths = self.auths.unwrap_or_default();
        // The longest key wins: the repository itself, then each of the parts of its path, then the registry.
        let mut wanted = name;
        loop {
            let entry = auths.get_key_value(wanted).or_else(|| auths.iter().find(|(key, _)| normal(key, old) == normal(wanted, old)));
            if let Some((key, entry)) = entry {
                let credentials = entry.credentials();
                if !credentials.auth.is_empty() && credentials.user_and_password().is_none() {
                    return Err((key.clone(), "has an auth that is not base64 of a user, a colon and a password"));
                }
                if credentials != Credentials::default() {
                    return Ok(Found::Credentials(Box::new(credentials)));
                }
            }
            let Some((shorter, _)) = wanted.rsplit_once('/') else { break };
            wanted = shorter;
        }
        match self.creds_store.filter(|store| !store.is_empty()) {
            Some(store) => helper("credsStore", &store),
            None => Ok(Found::Nothing),
        }
    }
}

/// A key without what people and tools write around a registry's name: one with a scheme (or in an old file) is a URL, of which
/// the host counts.
fn normal(key: &str, old: bool) -> String {
    let stripped = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let key = match stripped {
        Some(url) => url.split('/').next().unwrap_or(""),
        None if old => key.split('/').next().unwrap_or(""),
        None => key.trim_end_matches('/'),
    };
    let (host, path) = key.split_at(key.find('/').unwrap_or(key.len()));
    let host = if HUB.contains(&host) { "docker.io" } else { host };
    format!("{}{path}", host.to_ascii_lowercase())
}

/// Whether a credential helper may be called so: one word, that no shell and no path is hidden in.
pub(in super::super) fn is_helper_name(name: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=64).contains(&name.len()) && name.bytes().all(word) && !name.starts_with(['-', '.'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(text: &str, file: &str) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(file);
        std::fs::write(&path, text).unwrap();
        (directory, path)
    }

    #[test]
    fn the_longest_key_wins() {
        // base64 of NAME:p, the name saying which entry was taken.
        let text = r#"{"auths": {
            "reg.io": {"auth": "cmVnOnA="}, "reg.io/team": {"auth": "dGVhbTpw"}, "reg.io/team/app": {"auth": "YXBwOnA="},
            "https://old.io/v2/": {"auth": "b2xkOnA="}, "https://index.docker.io/v1/": {"auth": "aHViOnA="},
            "docker.io/team": {"username": "hubteam", "password": "p"}, "reg.io:5000": {"username": "port", "password": "p"},
            "empty.io": {}, "null.io": {"auth": null}, "Upper.io": {"username": "upper"}
        }}"#;
        let (_directory, path) = users(text, "auth.json");
        let check = |name: &str, user: Option<&str>| {
            let found = match look(&path, name).unwrap() {
                Found::Credentials(credentials) => credentials.user_and_password().map(|(user, _)| user),
                Found::Nothing => None,
                helper => panic!("{helper:?}"),
            };
            assert_eq!(found.as_deref(), user, "{name}");
        };
        check("reg.io/team/app", Some("app"));
        check("reg.io/team/app/more", Some("app"));
        check("reg.io/team/application", Some("team"));
        check("reg.io/teams/app", Some("reg"));
        check("reg.io:5000/team/app", Some("port"));
        check("reg.io:5001/team/app", None);
        check("old.io/x", Some("old"));
        check("docker.io/library/busybox", Some("hub"));
        check("docker.io/team/app", Some("hubteam"));
        check("upper.io/x", Some("upper"));
        check("empty.io/x", None);
        check("null.io/x", None);
        check("evil.io/reg.io", None);
        assert_eq!(look(Path::new("/nonexistent/auth.json"), "reg.io/x").unwrap(), Found::Nothing);
    }

    #[test]
    fn helpers_are_named_by_files() {
        let text = r#"{"auths": {"reg.io": {"auth": "cmVnOnA="}, "own.io": {"auth": "cmVnOnA="}}, "credHelpers": {"reg.io": "ecr-login"}, "credsStore": "pass"}"#;
        let (_directory, path) = users(text, "config.json");
        let check = |name: &str, program: &str, expected: &[&str]| {
            let expected = Found::Helper { name: program.into(), addresses: expected.iter().map(|a| a.to_string()).collect() };
            assert_eq!(look(&path, name).unwrap(), expected);
        };
        check("reg.io/x", "ecr-login", &["reg.io"]);
        check("other.io/x", "pass", &["other.io"]);
        check("docker.io/library/x", "pass", &[HUB_ADDRESS, "docker.io"]);
        assert!(matches!(look(&path, "own.io/x").unwrap(), Found::Credentials(_)));
    }

    #[test]
    fn tokens_and_the_old_form_are_read() {
        let (_directory, path) = users(r#"{"https://reg.io/v1/": {"auth": "cmVnOnA=", "email": "a@b"}}"#, OLD);
        assert!(matches!(look(&path, "reg.io/x").unwrap(), Found::Credentials(c) if c.user_and_password() == Some(("reg".into(), "p".into()))));
        let (_directory, path) = users(r#"{"auths": {"reg.io": {"identitytoken": "i"}, "b.io": {"registrytoken": "r"}}}"#, "auth.json");
        assert!(matches!(look(&path, "reg.io/x").unwrap(), Found::Credentials(c) if c.identity_token == "i"));
        assert!(matches!(look(&path, "b.io/x").unwrap(), Found::Credentials(c) if c.registry_token == "r"));
    }

    #[test]
    fn broken_files_are_named_and_their_content_is_not_shown() {
        let check = |text: &str, part: &str| {
            let (_directory, path) = users(text, "auth.json");
            let shown = crate::errchain::Chain(&look(&path, "reg.io/x").unwrap_err()).to_string();
            assert!(shown.contains(part) && shown.contains("auth.json") && !shown.contains("secret"), "{shown}");
        };
        check(r#"{"auths": {"reg.io": "secret"}}"#, "line 1, column");
        check("secret", "line 1");
        check(r#"{"auths": {"reg.io": {"auth": "secret!"}}}"#, "\"reg.io\" has an auth that is not base64");
        check(r#"{"credHelpers": {"reg.io": "../secret"}}"#, "\"reg.io\" names no credential helper");
        check(r#"{"credsStore": "-x"}"#, "\"credsStore\" names no");
        let (_directory, path) = users(&" ".repeat((MAX_FILE + 1) as usize), "auth.json");
        assert!(matches!(look(&path, "reg.io/x"), Err(FileError::Read { .. })));
        assert!(matches!(look(Path::new("/dev/zero"), "reg.io/x"), Err(FileError::Read { .. })));
        let (_directory, path) = users("\n", "auth.json");
        assert_eq!(look(&path, "reg.io/x").unwrap(), Found::Nothing);
    }
}
