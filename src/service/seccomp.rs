//! Which seccomp filter a container or a pause process gets, compiled once per profile.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::errchain::{Kind, Kinded};
use crate::model::container::SecurityProfile;
use crate::model::spec::Filter;
use crate::seccomp::{Arch, Cache, Flags, Host, SeccompError, from_json};

/// Bytes of a profile's file. The largest in use, Docker's, has 14 KiB.
const MAX_FILE: u64 = 1 << 20;

/// A profile that can't become a filter.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// A profile on this node is named by its path.
    #[error("seccomp profile {path:?} is not an absolute path")]
    Relative {
        /// What was asked for.
        path: PathBuf,
    },
    /// The file can't be read.
    #[error("cannot read seccomp profile {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is a directory, a pipe or a device.
    #[error("seccomp profile {path} is not a regular file")]
    NotRegular {
        /// The file.
        path: PathBuf,
    },
    /// It is too large.
    #[error("seccomp profile {path} is larger than {MAX_FILE} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It is no profile.
    #[error("seccomp profile {path} is invalid")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Why.
        source: SeccompError,
    },
    /// The default profile.
    #[error("cannot compile the default seccomp profile")]
    Default(#[source] SeccompError),
}

impl Kinded for ProfileError {
    fn kind(&self) -> Kind {
        match self {
            ProfileError::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => Kind::FailedPrecondition,
            ProfileError::Read { .. } | ProfileError::Default(_) => Kind::Internal,
            _ => Kind::InvalidArgument,
        }
    }
}

/// The compiled filters of this node.
pub struct Filters {
    cache: Cache,
    kernel: (u32, u32),
}

impl Filters {
    /// For this machine and kernel.
    pub fn new() -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
        Self { cache: Cache::new(), kernel: (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) }
    }

    /// The filter for a profile and a bounding set. Reads the file of a profile of the node's own, at each call: what is
    /// cached is what its content was compiled to. May block on the disk.
    pub fn filter(&self, profile: &SecurityProfile, capabilities: u64) -> Result<Filter, ProfileError> {
        match profile {
            SecurityProfile::Unset | SecurityProfile::Unconfined => Ok(Filter::default()),
            SecurityProfile::RuntimeDefault => {
                let program = self.cache.runtime_default(capabilities, Arch::NATIVE, self.kernel).map_err(ProfileError::Default)?;
                Ok(filter(&program, Flags::default()))
            }
            SecurityProfile::Localhost(path) => {
                let path = Path::new(path);
                let invalid = |source| ProfileError::Invalid { path: path.into(), source };
                let host = Host { capabilities, arch: Arch::NATIVE, kernel: self.kernel };
                let profile = from_json(&read(path)?, &host).map_err(invalid)?;
                let program = self.cache.profile(&profile, Arch::NATIVE).map_err(invalid)?;
                Ok(filter(&program, profile.flags))
            }
        }
    }
}

fn filter(program: &[u8], flags: Flags) -> Filter {
    Filter { program: program.to_vec(), log: flags.log, mitigate: !flags.spec_allow }
}

fn read(path: &Path) -> Result<Vec<u8>, ProfileError> {
    if !path.is_absolute() {
        return Err(ProfileError::Relative { path: path.into() });
    }
    let failed = |source| ProfileError::Read { path: path.into(), source };
    // A FIFO without a writer must not hold the request: opened without waiting, and not read.
    let file: File = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(ProfileError::NotRegular { path: path.into() });
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE { Err(ProfileError::TooLarge { path: path.into() }) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errchain::Chain;

    #[test]
    fn profiles_of_the_node_are_read_from_their_files() {
        let dir = tempfile::tempdir().unwrap();
        let filters = Filters::new();
        let path = dir.path().join("profile.json");
        let get = |path: &Path| filters.filter(&SecurityProfile::Localhost(path.to_string_lossy().into_owned()), 0);
        let refused = |path: &Path, kind: Kind, words: &[&str]| {
            let error = get(path).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            for word in words {
                assert!(Chain(&error).to_string().contains(word), "{} lacks {word}", Chain(&error));
            }
        };
        refused(&path, Kind::FailedPrecondition, &["profile.json", "No such file"]);
        refused(Path::new("profiles/x.json"), Kind::InvalidArgument, &["profiles/x.json", "absolute"]);
        refused(dir.path(), Kind::InvalidArgument, &["not a regular file"]);
        rustix::fs::mknodat(rustix::fs::CWD, dir.path().join("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        refused(&dir.path().join("fifo"), Kind::InvalidArgument, &["not a regular file"]);
        fs::write(&path, "{").unwrap();
        refused(&path, Kind::InvalidArgument, &["profile.json", "parse"]);
        fs::write(&path, r#"{"defaultAction": "SCMP_ACT_FLY"}"#).unwrap();
        refused(&path, Kind::InvalidArgument, &["defaultAction", "SCMP_ACT_FLY"]);
        fs::write(&path, vec![b' '; MAX_FILE as usize + 1]).unwrap();
        refused(&path, Kind::InvalidArgument, &["larger"]);

        let profile = |action: &str, flags: &str| format!(r#"{{"defaultAction": "{action}", "flags": {flags}}}"#);
        fs::write(&path, profile("SCMP_ACT_ALLOW", "null")).unwrap();
        let first = get(&path).unwrap();
        assert!(!first.program.is_empty() && !first.log && !first.mitigate);
        // The content counts, not the name.
        fs::write(&path, profile("SCMP_ACT_LOG", r#"["SECCOMP_FILTER_FLAG_LOG"]"#)).unwrap();
        let second = get(&path).unwrap();
        assert!(second.program != first.program && second.log && second.mitigate);
    }

    #[test]
    fn the_default_profile_follows_the_capabilities_and_none_is_none() {
        let filters = Filters::new();
        let default = |capabilities| filters.filter(&SecurityProfile::RuntimeDefault, capabilities).unwrap().program;
        assert_ne!(default(0), default(1 << 21));
        assert_eq!(filters.filter(&SecurityProfile::Unset, 0).unwrap(), Filter::default());
        assert_eq!(filters.filter(&SecurityProfile::Unconfined, 0).unwrap(), Filter::default());
    }
}
