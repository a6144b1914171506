//! Network configurations: the files of one directory, and the networks in them.
//!
//! A `.conflist` is a network, a `.conf` or `.json` is one plugin that becomes a network of its own (the form before CNI 0.3.0).
//! Plugins may also stand in a directory beside a conflist that bears the network's name (CNI 1.1). Nothing here runs a plugin,
//! and the plugins' own keys are passed on as they stand.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::args::is_name;

/// Bytes of one file, files of one directory and plugins of one network that are read; more is a mistake.
const MAX_FILE: u64 = 1 << 20;
const MAX_FILES: usize = 256;
const MAX_PLUGINS: usize = 64;
/// Bytes of a network's name: it is a part of the cache's file names.
const MAX_NAME: usize = 100;

/// A version of the specification that this client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(u8, u8, u8);

impl Version {
    pub(super) const V0_1_0: Self = Self(0, 1, 0);
    pub(super) const V0_3_0: Self = Self(0, 3, 0);
    pub(super) const V0_4_0: Self = Self(0, 4, 0);
    pub(super) const V1_1_0: Self = Self(1, 1, 0);
    const ALL: [Self; 7] = [Self::V0_1_0, Self(0, 2, 0), Self::V0_3_0, Self(0, 3, 1), Self::V0_4_0, Self(1, 0, 0), Self::V1_1_0];

    pub(super) fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.to_string() == text)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum BadConf {
    /// The file can't be read.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// It is no JSON, or a key has a value of the wrong type.
    #[error("it has not the form of a network configuration")]
    Form(#[source] serde_json::Error),
    /// No name, or one that is none.
    #[error("name {0:?} is not letters, digits, '_', '.' and '-', at most {MAX_NAME}")]
    Name(String),
    /// None of its versions is spoken here.
    #[error("cniVersion {0:?} is not one of 0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0")]
    Version(String),
    /// A plugin without a type, or with one that is no file name.
    #[error("type {0:?} of a plugin is no file name")]
    Type(String),
    /// A network without plugins.
    #[error("it has no plugins")]
    NoPlugins,
    /// More plugins than anyone chains.
    #[error("it has more than {MAX_PLUGINS} plugins")]
    TooManyPlugins,
    /// A value that is neither true nor false.
    #[error("{key} {value} is neither true nor false")]
    Bool {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// A file of the directory with the network's plugins.
    #[error("plugin {path}")]
    Plugin {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<BadConf>,
    },
}

/// One plugin of a network.
#[derive(Debug, Clone)]
pub(super) struct Plugin {
    /// The name of its file.
    pub(super) kind: String,
    /// The capabilities it declares.
    pub(super) capabilities: Vec<String>,
    /// Its configuration, each value as it was written.
    pub(super) keys: BTreeMap<String, Box<RawValue>>,
}

/// A network.
#[derive(Debug, Clone)]
pub(super) struct Network {
    pub(super) name: String,
    pub(super) version: Version,
    pub(super) disable_check: bool,
    pub(super) disable_gc: bool,
    pub(super) load_only_inlined: bool,
    pub(super) plugins: Vec<Plugin>,
    /// The whole list as JSON, all its plugins in it: what the cache keeps.
    pub(super) json: String,
}

#[derive(Deserialize)]
struct RawList {
    #[serde(default)]
    name: String,
    #[serde(default, rename = "cniVersion")]
    version: Option<String>,
    #[serde(default, rename = "cniVersions")]
    versions: Option<Vec<String>>,
    #[serde(default, rename = "disableCheck")]
    disable_check: Option<Box<RawValue>>,
    #[serde(default, rename = "disableGC")]
    disable_gc: Option<Box<RawValue>>,
    #[serde(default, rename = "loadOnlyInlinedPlugins")]
    load_only_inlined: Option<Box<RawValue>>,
    #[serde(default)]
    plugins: Option<Vec<Box<RawValue>>>,
}

impl Network {
    /// From the text of a conflist alone: plugins beside it are not looked for.
    pub(super) fn parse(text: &str) -> Result<Self, BadConf> {
        let network = Self::parse_inlined(text)?;
        if network.plugins.is_empty() { Err(BadConf::NoPlugins) } else { Ok(network) }
    }

    fn parse_inlined(text: &str) -> Result<Self, BadConf> {
        let raw: RawList = object(text).map_err(BadConf::Form)?;
        check_name(&raw.name)?;
        let plugins = raw.plugins.unwrap_or_default();
        if plugins.len() > MAX_PLUGINS {
            return Err(BadConf::TooManyPlugins);
        }
        Ok(Self {
            name: raw.name,
            version: version(raw.version.as_deref(), raw.versions.as_deref().unwrap_or_default())?,
            disable_check: boolean("disableCheck", raw.disable_check.as_deref())?,
            disable_gc: boolean("disableGC", raw.disable_gc.as_deref())?,
            load_only_inlined: boolean("loadOnlyInlinedPlugins", raw.load_only_inlined.as_deref())?,
            plugins: plugins.iter().map(|plugin| Plugin::parse(plugin.get())).collect::<Result<_, _>>()?,
            json: text.to_string(),
        })
    }

    /// From a file of the configuration directory. A conflist's other plugins are in the directory beside it that bears its name.
    fn load(path: &Path) -> Result<Self, BadConf> {
        let text = read(path).map_err(BadConf::Read)?;
        if path.extension().is_none_or(|extension| extension != "conflist") {
            return Self::wrap(&text);
        }
        let mut network = Self::parse_inlined(&text)?;
        if !network.load_only_inlined {
            let added = network.load_beside(&path.with_file_name(&network.name))?;
            if added {
                network.json = network.whole(&text)?;
            }
        }
        if network.plugins.is_empty() { Err(BadConf::NoPlugins) } else { Ok(network) }
    }

    /// Adds the plugins of a directory. Whether there are any.
    fn load_beside(&mut self, dir: &Path) -> Result<bool, BadConf> {
        let before = self.plugins.len();
        for path in files(dir, &["conf"]).map_err(BadConf::Read)? {
            let plugin = read(&path).map_err(BadConf::Read).and_then(|text| Plugin::parse(&text));
            self.plugins.push(plugin.map_err(|source| BadConf::Plugin { path, source: Box::new(source) })?);
        }
        if self.plugins.len() > MAX_PLUGINS { Err(BadConf::TooManyPlugins) } else { Ok(self.plugins.len() > before) }
    }

    /// The list with all its plugins inlined, so that it can be read again when the directory is gone.
    fn whole(&self, text: &str) -> Result<String, BadConf> {
        let mut list: BTreeMap<String, Box<RawValue>> = serde_json::from_str(text).map_err(BadConf::Form)?;
        let plugins: Vec<_> = self.plugins.iter().map(|plugin| &plugin.keys).collect();
        list.insert("plugins".to_string(), serde_json::value::to_raw_value(&plugins).map_err(BadConf::Form)?);
        list.insert("loadOnlyInlinedPlugins".to_string(), serde_json::value::to_raw_value(&true).map_err(BadConf::Form)?);
        serde_json::to_string(&list).map_err(BadConf::Form)
    }

    /// A network of one plugin.
    fn wrap(text: &str) -> Result<Self, BadConf> {
        #[derive(Deserialize)]
        struct Single {
            #[serde(default)]
            name: String,
            #[serde(default, rename = "cniVersion")]
            version: Option<String>,
        }
        let single: Single = object(text).map_err(BadConf::Form)?;
        check_name(&single.name)?;
        let plugin: Box<RawValue> = serde_json::from_str(text).map_err(BadConf::Form)?;
        let version = version(single.version.as_deref(), &[])?;
        let list = serde_json::json!({"name": single.name, "cniVersion": version.to_string()});
        // A RawValue does not survive json!.
        let list = list.to_string();
        Self::parse(&format!("{},\"plugins\":[{}]}}", list.trim_end_matches('}'), plugin.get()))
    }
}

impl Plugin {
    fn parse(text: &str) -> Result<Self, BadConf> {
        #[derive(Deserialize)]
        struct Raw {
            #[serde(default, rename = "type")]
            kind: String,
            #[serde(default)]
            capabilities: Option<BTreeMap<String, bool>>,
        }
        let raw: Raw = object(text).map_err(BadConf::Form)?;
        // The type is looked for in directories of plugins: anything but a plain file name would leave them.
        if raw.kind.is_empty() || raw.kind.len() > 255 || raw.kind.contains(['/', '\0']) || raw.kind == "." || raw.kind == ".." {
            return Err(BadConf::Type(raw.kind.chars().take(80).collect()));
        }
        let capabilities = raw.capabilities.unwrap_or_default().into_iter().filter(|(_, on)| *on).map(|(name, _)| name).collect();
        Ok(Self { kind: raw.kind, capabilities, keys: serde_json::from_str(text).map_err(BadConf::Form)? })
    }
}

/// The file of a plugin of this type: the first that can be executed.
pub(super) fn find(plugin: &str, bin_dirs: &[PathBuf]) -> Option<PathBuf> {
    bin_dirs.iter().map(|dir| dir.join(plugin)).find(|path| {
        let regular = std::fs::metadata(path).is_ok_and(|meta| meta.is_file());
        regular && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
    })
}

/// Reads a JSON object: serde would take an array for a struct, too.
pub(super) fn object<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, serde_json::Error> {
    if text.trim_start().starts_with('{') { serde_json::from_str(text) } else { Err(serde::de::Error::custom("not a JSON object")) }
}

fn check_name(name: &str) -> Result<(), BadConf> {
    if is_name(name) && name.len() <= MAX_NAME { Ok(()) } else { Err(BadConf::Name(name.chars().take(80).collect())) }
}

/// The highest version named that is spoken here. Without any: 0.1.0, as the specification says.
fn version(one: Option<&str>, list: &[String]) -> Result<Version, BadConf> {
    let named = || one.into_iter().chain(list.iter().map(String::as_str)).filter(|text| !text.is_empty());
    match named().filter_map(Version::parse).max() {
        Some(version) => Ok(version),
        None if named().next().is_none() => Ok(Version::V0_1_0),
        None => Err(BadConf::Version(named().collect::<Vec<_>>().join(", ").chars().take(80).collect())),
    }
}

/// true, false, or one of the two as a string, which libcni takes, too.
fn boolean(key: &'static str, value: Option<&RawValue>) -> Result<bool, BadConf> {
    match value.map(|value| value.get().trim_matches('"').to_ascii_lowercase()).as_deref() {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(BadConf::Bool { key, value: other.chars().take(80).collect() }),
    }
}

/// Files of a directory with one of these extensions, in lexical order. A directory that is not there has none.
fn files(dir: &Path, extensions: &[&str]) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let fits = path.extension().is_some_and(|found| extensions.iter().any(|extension| found == *extension));
        // A directory is none, whatever its name; a symbolic link may be a file.
        if fits && !path.is_dir() {
            paths.push(path);
        }
        if paths.len() > MAX_FILES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("more than {MAX_FILES} files")));
        }
    }
    paths.sort();
    Ok(paths)
}

/// Reads a regular file of bounded size. A FIFO or a device put in its place is refused, not waited for.
pub(super) fn read(path: &Path) -> io::Result<String> {
    read_at_most(path, MAX_FILE)
}

pub(super) fn read_at_most(path: &Path, limit: u64) -> io::Result<String> {
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut text = String::new();
    File::from(fd).take(limit + 1).read_to_string(&mut text)?;
    if text.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {limit} bytes")));
    }
    Ok(text)
}

/// What one look at the directory found.
#[derive(Debug)]
pub(super) struct Directory {
    /// The network of pods: the first that is valid, or the one asked for by name.
    pub(super) network: Option<Network>,
    /// Files that are of no use, and why.
    pub(super) bad: Vec<(PathBuf, BadConf)>,
    /// The directory itself is not there or can't be read.
    pub(super) unreadable: Option<io::Error>,
    /// Names of the valid networks before the one chosen, or of all.
    pub(super) others: Vec<String>,
}

impl Directory {
    /// Reads the directory. `name`: the network asked for.
    pub(super) fn load(dir: &Path, name: Option<&str>) -> Self {
        let mut found = Directory { network: None, bad: Vec::new(), unreadable: None, others: Vec::new() };
        let paths = std::fs::metadata(dir).and_then(|_| files(dir, &["conflist", "conf", "json"]));
        let paths = match paths {
            Ok(paths) => paths,
            Err(error) => {
                found.unreadable = Some(error);
                return found;
            }
        };
        for path in paths {
            match Network::load(&path) {
                Err(error) => found.bad.push((path, error)),
                Ok(network) if name.is_none_or(|name| name == network.name) => {
                    found.network = Some(network);
                    return found;
                }
                Ok(network) => found.others.push(network.name),
            }
        }
        found
    }
}

#[cfg(test)]
#[path = "conf_tests.rs"]
mod tests;
