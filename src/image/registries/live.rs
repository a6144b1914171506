//! The files as they are now: read again when one of them has changed, and not otherwise.
//!
//! A change that can't be used is said (log and `Status`) and does nothing else: what was read last stays in force. Only where
//! nothing could ever be read do pulls fail.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;

use super::{Registries, RegistriesError};
use crate::errchain::Chain;

/// Bytes of one file; more is no configuration.
const MAX_FILE: u64 = 1 << 20;
/// A file that changed less than this before it was read may change again without it showing: clocks of file systems tick slowly.
const SETTLED: Duration = Duration::from_secs(2);

/// registries.conf and its drop-ins.
pub struct Live {
    file: PathBuf,
    drop_ins: PathBuf,
    state: Mutex<State>,
    /// What is wrong with the files, for readers who don't wait.
    problem: ArcSwapOption<String>,
}

#[derive(Default)]
struct State {
    current: Option<Arc<Registries>>,
    seen: Option<Vec<Seen>>,
    /// Why `current` is not what the files say.
    problem: Option<Arc<RegistriesError>>,
}

/// A file and what tells it from a changed one. No identity: it is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    path: PathBuf,
    identity: Option<(u64, u64, u64, i64, i64, i64, i64)>,
}

impl Live {
    /// Reads nothing yet.
    pub fn new(file: PathBuf, drop_ins: PathBuf) -> Self {
        Self { file, drop_ins, state: Mutex::default(), problem: ArcSwapOption::empty() }
    }

    /// What the files say, read again if they have changed. Blocks for a few calls of stat(2), rarely for reading.
    pub fn current(&self) -> Result<Arc<Registries>, Arc<RegistriesError>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken before reading: what changes meanwhile differs from it.
        let look = self.look();
        let seen = look.as_ref().ok();
        if seen.is_none() || state.seen.as_ref() != seen {
            let settled = seen.is_some_and(|files| files.iter().all(Seen::settled));
            state.seen = seen.filter(|_| settled).cloned();
            let read = look.and_then(|files| read(&files));
            self.take(&mut state, read);
        }
        match (&state.current, &state.problem) {
            (Some(current), _) => Ok(Arc::clone(current)),
            (None, Some(problem)) => Err(Arc::clone(problem)),
            (None, None) => Ok(Arc::default()),
        }
    }

    fn take(&self, state: &mut State, read: Result<Registries, RegistriesError>) {
        match read {
            Ok(registries) => {
                if state.problem.take().is_some() {
                    tracing::info!(path = %self.file.display(), "registries.conf can be used again");
                }
                for key in registries.unknown.iter().filter(|key| !state.current.as_ref().is_some_and(|old| old.unknown.contains(key))) {
                    tracing::warn!(key, "unknown key in registries.conf is ignored");
                }
                state.current = Some(Arc::new(registries));
                self.problem.store(None);
            }
            Err(error) => {
                let text = Chain(&error).to_string();
                if self.problem.load().as_deref() != Some(&text) {
                    tracing::error!(error = text, kept = state.current.is_some(), "registries.conf cannot be used");
                }
                state.problem = Some(Arc::new(error));
                self.problem.store(Some(Arc::new(text)));
            }
        }
    }

    /// What is wrong with the files. Never waits.
    pub fn problem(&self) -> Option<String> {
        self.problem.load().as_deref().cloned()
    }

    /// The file and its drop-ins (`*.conf`) in the order of their names, any of them absent.
    fn look(&self) -> Result<Vec<Seen>, RegistriesError> {
        let fail = |source| RegistriesError::Read { path: self.drop_ins.clone(), source };
        let mut paths = match std::fs::read_dir(&self.drop_ins) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(fail(error)),
            Ok(entries) => entries.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(fail)?,
        };
        paths.retain(|path| path.extension().is_some_and(|e| e == "conf"));
        paths.sort();
        std::iter::once(self.file.clone()).chain(paths).map(Seen::now).collect()
    }
}

impl Seen {
    fn now(path: PathBuf) -> Result<Self, RegistriesError> {
        let identity = match std::fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(RegistriesError::Read { path, source }),
            Ok(m) => Some((m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec())),
        };
        Ok(Self { path, identity })
    }

    fn settled(&self) -> bool {
        let Some((.., seconds, nanos)) = self.identity else { return true };
        let changed = UNIX_EPOCH + Duration::new(seconds.max(0) as u64, nanos.clamp(0, 999_999_999) as u32);
        SystemTime::now().duration_since(changed).is_ok_and(|age| age > SETTLED)
    }
}

fn read(files: &[Seen]) -> Result<Registries, RegistriesError> {
    let mut all = Registries::default();
    for file in files.iter().filter(|file| file.identity.is_some()) {
        if let Some(text) = text(&file.path)? {
            all.add(&text, &file.path)?;
        }
    }
    Ok(all)
}

fn text(path: &Path) -> Result<Option<String>, RegistriesError> {
    let fail = |source| RegistriesError::Read { path: path.to_path_buf(), source };
    match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(fail(error)),
        Ok(metadata) if metadata.len() > MAX_FILE => Err(fail(io::ErrorKind::FileTooLarge.into())),
        Ok(metadata) if !metadata.is_file() => Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"))),
        Ok(_) => std::fs::read_to_string(path).map(Some).map_err(fail),
    }
}
