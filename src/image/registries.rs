//! registries.conf, version 2: where images really come from, in which order, and who may be spoken to without TLS.
//!
//! As containers-registries.conf(5) has it; short names are Docker's here (`busybox` is docker.io's), so
//! `unqualified-search-registries` and aliases are not looked at. Read again for each pull: a handful of small files.

use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::reference::{self, BadReference, Reference};
use crate::errchain::{Kind, Kinded};

/// Bytes of one file; more is no configuration.
const MAX_FILE: u64 = 1 << 20;

/// All that the files say.
#[derive(Debug, Default)]
pub struct Registries {
    registries: Vec<Registry>,
}

/// A place to pull an image from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// `host[:port]`, as it is spoken to.
    pub host: String,
    /// The repository there.
    pub repository: String,
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
    /// A value makes no sense.
    #[error("{path}: registry {registry:?}: {what}")]
    Value {
        /// In which file.
        path: PathBuf,
        /// In which `[[registry]]`.
        registry: String,
        /// What is wrong.
        what: &'static str,
    },
    /// The operator does not want this registry.
    #[error("registry {prefix} is blocked by registries.conf")]
    Blocked {
        /// The prefix that blocks.
        prefix: String,
    },
    /// What the image's name becomes is no name.
    #[error("registries.conf makes {location:?} of the image, which is no repository")]
    Location {
        /// What it becomes.
        location: String,
        /// Why that is none.
        source: BadReference,
    },
}

impl Kinded for RegistriesError {
    fn kind(&self) -> Kind {
        match self {
            RegistriesError::Blocked { .. } => Kind::PermissionDenied,
            _ => Kind::FailedPrecondition,
        }
    }
}

#[derive(Debug, Deserialize)]
struct File {
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
    #[serde(default)]
    mirror: Vec<MirrorTable>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MirrorTable {
    location: String,
    #[serde(default)]
    insecure: bool,
    pull_from_mirror: Option<When>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum When {
    All,
    DigestOnly,
    TagOnly,
    #[serde(rename = "")]
    Unset,
}

#[derive(Debug)]
struct Registry {
    prefix: String,
    location: String,
    insecure: bool,
    blocked: bool,
    mirrors: Vec<(String, bool, When)>,
}

impl Registries {
    /// Reads the file and its drop-ins, any of them absent. A later `[[registry]]` with the same prefix replaces an earlier one.
    pub fn read(file: &Path, drop_ins: &Path) -> Result<Self, RegistriesError> {
        let mut all = Self::default();
        all.read_file(file)?;
        let fail = |source| RegistriesError::Read { path: drop_ins.to_path_buf(), source };
        let mut names = match std::fs::read_dir(drop_ins) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(fail(error)),
            Ok(entries) => entries.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>().map_err(fail)?,
        };
        names.retain(|path| path.extension().is_some_and(|e| e == "conf"));
        names.sort();
        for path in names {
            all.read_file(&path)?;
        }
        Ok(all)
    }

    fn read_file(&mut self, path: &Path) -> Result<(), RegistriesError> {
        let fail = |source| RegistriesError::Read { path: path.to_path_buf(), source };
        let text = match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(fail(error)),
            Ok(metadata) if metadata.len() > MAX_FILE => return Err(fail(io::ErrorKind::FileTooLarge.into())),
            Ok(_) => std::fs::read_to_string(path).map_err(fail)?,
        };
        self.add(&text, path)
    }

    /// Takes one file's text.
    fn add(&mut self, text: &str, path: &Path) -> Result<(), RegistriesError> {
        let file: File = toml::from_str(text).map_err(|source| RegistriesError::Parse { path: path.to_path_buf(), source: Box::new(source) })?;
        let bad = |registry: &str, what| RegistriesError::Value { path: path.to_path_buf(), registry: registry.to_string(), what };
        if file.registries.is_some() {
            return Err(bad("", "[registries] is version 1 of the format, which is not supported: write [[registry]]"));
        }
        for table in file.registry {
            let trim = |text: String| text.trim_end_matches('/').to_string();
            let location = trim(table.location.unwrap_or_default());
            let prefix = table.prefix.map(trim).filter(|p| !p.is_empty()).unwrap_or_else(|| location.clone());
            if prefix.is_empty() {
                return Err(bad("", "it has neither prefix nor location"));
            }
            if location.contains("://") || prefix.contains("://") {
                return Err(bad(&prefix, "prefix and location are written without http:// or https://"));
            }
            let wildcard = prefix.starts_with("*.");
            if prefix[usize::from(wildcard)..].contains('*') {
                return Err(bad(&prefix, "a wildcard stands only at the beginning, as *.example.com"));
            }
            let location = if location.is_empty() && !wildcard { prefix.clone() } else { location };
            let mut mirrors = Vec::new();
            for mirror in table.mirror {
                let when = match mirror.pull_from_mirror.unwrap_or(When::Unset) {
                    When::Unset if table.mirror_by_digest_only => When::DigestOnly,
                    When::Unset => When::All,
                    _ if table.mirror_by_digest_only => {
                        return Err(bad(&prefix, "mirror-by-digest-only and pull-from-mirror exclude each other"));
                    }
                    when => when,
                };
                let location = trim(mirror.location);
                if location.is_empty() || location.contains("://") {
                    return Err(bad(&prefix, "a mirror's location is a host with an optional path, without http:// or https://"));
                }
                mirrors.push((location, mirror.insecure, when));
            }
            let registry = Registry { prefix, location, insecure: table.insecure, blocked: table.blocked, mirrors };
            self.registries.retain(|other| other.prefix != registry.prefix);
            self.registries.push(registry);
        }
        Ok(())
    }

    /// Where to pull an image from, the best place first. Never empty.
    pub fn sources(&self, image: &Reference) -> Result<Vec<Source>, RegistriesError> {
        let name = image.repository();
        let matching = self.registries.iter().filter_map(|registry| Some((matched(&registry.prefix, &name)?, registry)));
        let Some((length, registry)) = matching.max_by_key(|(_, registry)| registry.prefix.len()) else {
            return Ok(vec![source(&name, false, false)?]);
        };
        if registry.blocked {
            return Err(RegistriesError::Blocked { prefix: registry.prefix.clone() });
        }
        let by_digest = image.digest().is_some();
        let rest = &name[length..];
        let mut sources = Vec::new();
        for (location, insecure, when) in &registry.mirrors {
            if *when == When::All || (*when == When::DigestOnly) == by_digest {
                sources.push(source(&format!("{location}{rest}"), *insecure, true)?);
            }
        }
        let own = if registry.location.is_empty() { name.clone() } else { format!("{}{rest}", registry.location) };
        sources.push(source(&own, registry.insecure, false)?);
        Ok(sources)
    }
}

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
    (name.len() == end || matches!(name.as_bytes()[end], b'/' | b':')).then_some(end)
}

fn source(name: &str, insecure: bool, mirror: bool) -> Result<Source, RegistriesError> {
    let fail = |source| RegistriesError::Location { location: name.chars().take(300).collect(), source };
    let (host, repository) = name.split_once('/').ok_or_else(|| fail(BadReference::Empty))?;
    reference::check_domain(host).map_err(fail)?;
    reference::check_path(repository).map_err(fail)?;
    // Docker Hub's registry is not where its name says.
    let host = if host == "docker.io" { "registry-1.docker.io" } else { host };
    Ok(Source { host: host.to_string(), repository: repository.to_string(), insecure, mirror })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONF: &str = r#"
unqualified-search-registries = ["example.com"]
[[registry]]
prefix = "docker.io"
location = "docker.io"
[[registry.mirror]]
location = "mirror.local:5000/hub"
insecure = true
[[registry.mirror]]
location = "digests.local"
pull-from-mirror = "digest-only"
[[registry.mirror]]
location = "tags.local"
pull-from-mirror = "tag-only"

[[registry]]
prefix = "docker.io/blocked"
blocked = true

[[registry]]
location = "plain.local:5000"
insecure = true

[[registry]]
prefix = "old.example.com/team"
location = "new.example.com/staff"
mirror-by-digest-only = true
[[registry.mirror]]
location = "m.example.com/x"

[[registry]]
prefix = "*.wild.example.com"
insecure = true
"#;

    fn registries(text: &str) -> Result<Registries, RegistriesError> {
        let mut all = Registries::default();
        all.add(text, Path::new("registries.conf"))?;
        Ok(all)
    }

    #[test]
    fn images_are_sent_to_their_sources() {
        let all = registries(CONF).unwrap();
        let check = |image: &str, expected: &[&str]| {
            let sources = all.sources(&Reference::parse(image).unwrap()).unwrap();
            let shown: Vec<_> = sources
                .iter()
                .map(|s| format!("{}/{}{}{}", s.host, s.repository, if s.insecure { " insecure" } else { "" }, if s.mirror { " mirror" } else { "" }))
                .collect();
            assert_eq!(shown, expected, "{image}");
        };
        let digest = format!("@sha256:{}", "0".repeat(64));
        check(
            "busybox",
            &["mirror.local:5000/hub/library/busybox insecure mirror", "tags.local/library/busybox mirror", "registry-1.docker.io/library/busybox"],
        );
        check(
            &format!("user/app{digest}"),
            &["mirror.local:5000/hub/user/app insecure mirror", "digests.local/user/app mirror", "registry-1.docker.io/user/app"],
        );
        check("plain.local:5000/a", &["plain.local:5000/a insecure"]);
        check("plain.local/a", &["plain.local/a"]);
        check("plain.local:50000/a", &["plain.local:50000/a"]);
        check("old.example.com/team/app", &["new.example.com/staff/app"]);
        check(&format!("old.example.com/team/app{digest}"), &["m.example.com/x/app mirror", "new.example.com/staff/app"]);
        check("old.example.com/teams/app", &["old.example.com/teams/app"]);
        check("a.wild.example.com/x", &["a.wild.example.com/x insecure"]);
        check("a.b.wild.example.com:5000/x", &["a.b.wild.example.com:5000/x insecure"]);
        check("wild.example.com/x", &["wild.example.com/x"]);
        check(
            "docker.io/blocker/x",
            &["mirror.local:5000/hub/blocker/x insecure mirror", "tags.local/blocker/x mirror", "registry-1.docker.io/blocker/x"],
        );
        let blocked = all.sources(&Reference::parse("blocked/x").unwrap()).unwrap_err();
        assert_eq!(blocked.kind(), Kind::PermissionDenied);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let check = |text: &str, part: &str| {
            let error = registries(text).unwrap_err();
            let shown = crate::errchain::Chain(&error).to_string();
            assert!(shown.contains(part), "{text}: {shown}");
        };
        check("[[registry]]\n", "neither prefix nor location");
        check("[[registry]]\nlocation = 5\n", "line 2");
        check("[[registry]]\nlocation = \"http://a\"\n", "without http://");
        check("[registries.insecure]\nregistries = [\"a\"]\n", "version 1");
        check("[[registry]]\nprefix = \"a.*.b\"\n", "wildcard");
        check(
            "[[registry]]\nprefix = \"a\"\nmirror-by-digest-only = true\n[[registry.mirror]]\nlocation = \"b\"\npull-from-mirror = \"all\"\n",
            "exclude",
        );
        check("[[registry]]\nprefix = \"a\"\n[[registry.mirror]]\nlocation = \"b\"\npull-from-mirror = \"never\"\n", "never");
    }

    #[test]
    fn drop_ins_replace() {
        let directory = tempfile::tempdir().unwrap();
        let (file, drop_ins) = (directory.path().join("registries.conf"), directory.path().join("registries.conf.d"));
        let image = Reference::parse("reg.local/a").unwrap();
        assert!(!Registries::read(&file, &drop_ins).unwrap().sources(&image).unwrap()[0].insecure);
        std::fs::write(&file, "[[registry]]\nlocation = \"reg.local\"\nblocked = true\n").unwrap();
        assert!(Registries::read(&file, &drop_ins).unwrap().sources(&image).is_err());
        std::fs::create_dir(&drop_ins).unwrap();
        std::fs::write(drop_ins.join("10-a.conf"), "[[registry]]\nlocation = \"reg.local\"\ninsecure = true\n").unwrap();
        std::fs::write(drop_ins.join("ignored.toml"), "nonsense").unwrap();
        assert!(Registries::read(&file, &drop_ins).unwrap().sources(&image).unwrap()[0].insecure);
    }
}
