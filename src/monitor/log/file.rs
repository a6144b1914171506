//! A container's log file: opened inside the pod's log directory and nowhere else, appended to in whole lines.
//!
//! A line is in the file whole or not at all. Where the disk is full, what was begun is taken back, the lines are counted
//! as lost and the next ones are tried again: the container never waits for space. No line of ours ever stands between
//! the container's own: losses go to the count and to stderr.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

use crate::errchain::{Chain, Kind, Kinded};
use crate::monitor::log::line;
use crate::monitor::say;
use crate::plan::LogPlan;

/// How long a file that can't be opened is left alone.
const REOPEN: Duration = Duration::from_secs(1);

/// Why a log can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The path has parts that could lead out of the directory.
    #[error("log path {path:?} is not a plain relative path")]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// The pod's log directory.
    #[error("cannot open log directory {path:?}")]
    Dir {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory between the pod's log directory and the file.
    #[error("cannot make log directory {path:?}")]
    Parent {
        /// The directory, from the pod's log directory on.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file.
    #[error("cannot open log file {path:?}")]
    Open {
        /// The file, from the root on.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else than a file stands there.
    #[error("log file {path:?} is not a regular file")]
    NotRegular {
        /// The file, from the root on.
        path: PathBuf,
    },
}

impl Kinded for LogError {
    fn kind(&self) -> Kind {
        match self {
            LogError::Path { .. } | LogError::NotRegular { .. } => Kind::InvalidArgument,
            LogError::Dir { .. } | LogError::Parent { .. } | LogError::Open { .. } => Kind::Internal,
        }
    }
}

/// Where losses are counted: a memfd of two native u64, bytes and lines, which the monitor reads without asking anybody and which
/// outlives the stdio process that writes it.
#[derive(Debug)]
pub struct Losses(pub OwnedFd);

impl Losses {
    /// Bytes and lines that reached no file so far.
    pub fn read(&self) -> (u64, u64) {
        let mut counts = [[0u8; 8]; 2];
        let _ = rustix::io::pread(&self.0, counts.as_flattened_mut(), 0);
        (u64::from_ne_bytes(counts[0]), u64::from_ne_bytes(counts[1]))
    }

    fn add(&self, bytes: u64, lines: u64) {
        let (had_bytes, had_lines) = self.read();
        let counts = [(had_bytes + bytes).to_ne_bytes(), (had_lines + lines).to_ne_bytes()];
        let _ = rustix::io::pwrite(&self.0, counts.as_flattened(), 0);
    }
}

/// A log that lines go to.
#[derive(Debug)]
pub struct Log {
    plan: LogPlan,
    file: Option<OwnedFd>,
    /// The file ends in mid-line and can't be cut: a newline comes first.
    torn: bool,
    /// Since when lines are lost, as bytes and lines; told when one is written again.
    losing: Option<(u64, u64)>,
    /// When a file that can't be opened is tried again.
    retry_at: Option<Instant>,
}

impl Log {
    /// Opens the plan's file; makes it and the directories above it where they are missing. An empty path: no file, and
    /// lines vanish uncounted.
    pub fn open(plan: LogPlan) -> Result<Self, LogError> {
        let file = if plan.path.as_os_str().is_empty() { None } else { Some(open(&plan)?) };
        let torn = file.as_ref().is_some_and(mend);
        Ok(Self { plan, file, torn, losing: None, retry_at: None })
    }

    /// A log whose file is opened with the first line: for a stdio process that takes over, where nobody waits for an
    /// answer and output must be drained whatever the file does.
    pub fn later(plan: LogPlan) -> Self {
        Self { plan, file: None, torn: false, losing: None, retry_at: None }
    }

    /// Nothing is written anywhere.
    pub fn is_discarded(&self) -> bool {
        self.plan.path.as_os_str().is_empty()
    }

    /// Bytes after which a line is cut; see [`LogPlan::max_line`].
    pub fn max_line(&self) -> u32 {
        self.plan.max_line
    }

    /// Opens the file anew by its name, which may be another file by now; lines go there from now on. On an error they go
    /// on where they went.
    pub fn reopen(&mut self) -> Result<(), LogError> {
        if !self.is_discarded() {
            let file = open(&self.plan)?;
            self.torn = mend(&file);
            self.file = Some(file);
            self.retry_at = None;
        }
        Ok(())
    }

    /// Appends whole lines, in the format of [`line`].
    pub fn append(&mut self, lines: &[u8], losses: &Losses) {
        if self.is_discarded() || lines.is_empty() {
            return;
        }
        let kept = self.write(lines);
        if kept == lines.len() {
            if let Some((bytes, count)) = self.losing.take() {
                say(format_args!("log {:?}: written again; {bytes} bytes in {count} lines were lost", self.plan.path));
            }
            return;
        }
        let (bytes, count) = line::measure(&lines[kept..]);
        losses.add(bytes, count);
        let (had_bytes, had_count) = self.losing.unwrap_or_default();
        self.losing = Some((had_bytes + bytes, had_count + count));
    }

    /// Writes lines; how many bytes of them are in the file afterwards, always a number of whole lines.
    fn write(&mut self, lines: &[u8]) -> usize {
        if self.file.is_none() {
            self.open_again();
        }
        let Some(file) = &self.file else { return 0 };
        if self.torn && !matches!(rustix::io::write(file, b"\n"), Ok(1)) {
            return 0;
        }
        self.torn = false;
        let mut written = 0;
        let error = loop {
            match rustix::io::write(file, &lines[written..]) {
                Ok(0) => break io::ErrorKind::WriteZero.into(),
                Ok(n) if written + n == lines.len() => return lines.len(),
                Ok(n) => written += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => break io::Error::from(error),
            }
        };
        if self.losing.is_none() {
            say(format_args!("log {:?}: lines are lost: {error}", self.plan.path));
        }
        let whole = lines[..written].iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        self.torn = written > whole && !take_back(file, written - whole);
        whole
    }

    fn open_again(&mut self) {
        let now = Instant::now();
        if self.retry_at.is_some_and(|at| now < at) {
            return;
        }
        self.retry_at = Some(now + REOPEN);
        if let Err(error) = self.reopen()
            && self.losing.is_none()
        {
            say(format_args!("log {:?}: lines are lost: {}", self.plan.path, Chain(&error)));
        }
    }
}

/// Cuts the last bytes off. We are the file's only writer.
fn take_back(file: &OwnedFd, bytes: usize) -> bool {
    let size = rustix::fs::fstat(file).map(|stat| stat.st_size as u64);
    size.is_ok_and(|size| rustix::fs::ftruncate(file, size.saturating_sub(bytes as u64)).is_ok())
}

/// Looks at the end of a file that a killed stdio process may have left in mid-line. A line without its header is cut off;
/// one that has it is kept, and the answer is true: it lacks a newline.
fn mend(file: &OwnedFd) -> bool {
    let Ok(stat) = rustix::fs::fstat(file) else { return false };
    let size = stat.st_size as u64;
    let mut last = [0u8; 1];
    if size == 0 || !matches!(rustix::io::pread(file, &mut last, size - 1), Ok(1)) || last == *b"\n" {
        return false;
    }
    let mut tail = vec![0; size.min(2 * u64::from(super::split::MAX_LINE)) as usize];
    let from = size - tail.len() as u64;
    let Ok(n) = rustix::io::pread(file, &mut tail[..], from) else { return true };
    tail.truncate(n);
    let begun = match tail.iter().rposition(|&b| b == b'\n') {
        Some(at) => tail.len() - at - 1,
        None if n as u64 == size => n,
        None => return true,
    };
    line::has_header(&tail[tail.len() - begun..]) || !take_back(file, begun)
}

fn open(plan: &LogPlan) -> Result<OwnedFd, LogError> {
    let plain = plan.path.components().all(|part| matches!(part, Component::Normal(_)));
    if !plain {
        return Err(LogError::Path { path: plan.path.clone() });
    }
    let whole = || plan.dir.join(&plan.path);
    // The directory is the node's own, where a symbolic link such as /var/log is its owner's business.
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(&plan.dir, directory, Mode::empty()).map_err(|e| LogError::Dir { path: plan.dir.clone(), source: e.into() })?;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let parents = plan.path.parent().map(|parent| make_parents(&dir, parent, beneath)).transpose()?.flatten();
    let name = plan.path.file_name().ok_or_else(|| LogError::Path { path: plan.path.clone() })?;
    // O_NONBLOCK: a FIFO in the file's place must not hold us. It means nothing to a regular file. Reading is for `mend`.
    let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat2(parents.as_ref().unwrap_or(&dir), name, flags, Mode::from_raw_mode(0o640), beneath)
        .map_err(|e| LogError::Open { path: whole(), source: e.into() })?;
    let stat = rustix::fs::fstat(&file).map_err(|e| LogError::Open { path: whole(), source: e.into() })?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(LogError::NotRegular { path: whole() });
    }
    Ok(file)
}

/// Opens the directory `path` below `dir` part by part, making what is missing. `None`: the path is empty.
fn make_parents(dir: &OwnedFd, path: &Path, beneath: ResolveFlags) -> Result<Option<OwnedFd>, LogError> {
    let mut at: Option<OwnedFd> = None;
    for part in path.components() {
        let parent = at.as_ref().unwrap_or(dir);
        let failed = |e: rustix::io::Errno| LogError::Parent { path: path.to_path_buf(), source: e.into() };
        match rustix::fs::mkdirat(parent, part.as_os_str(), Mode::from_raw_mode(0o750)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(failed(error)),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        at = Some(rustix::fs::openat2(parent, part.as_os_str(), flags, Mode::empty(), beneath).map_err(failed)?);
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::log::Stream;

    fn losses() -> Losses {
        Losses(rustix::fs::memfd_create("losses", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
    }

    fn lines(texts: &[&str]) -> Vec<u8> {
        let mut out = Vec::new();
        for text in texts {
            line::push(&mut out, &line::now(), Stream::Stdout, true, text.as_bytes(), b"");
        }
        out
    }

    fn plan(dir: &Path, path: &str) -> LogPlan {
        LogPlan { dir: dir.to_path_buf(), path: path.into(), max_line: 0 }
    }

    #[test]
    fn lines_go_to_the_file_and_after_a_rename_to_the_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let losses = losses();
        let mut log = Log::open(plan(dir.path(), "c/0.log")).unwrap();
        log.append(&lines(&["one"]), &losses);
        std::fs::rename(dir.path().join("c/0.log"), dir.path().join("c/0.old")).unwrap();
        log.append(&lines(&["two"]), &losses);
        log.reopen().unwrap();
        log.append(&lines(&["three"]), &losses);
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(read("c/0.old").contains("F one\n") && read("c/0.old").ends_with("F two\n"));
        assert!(read("c/0.log").ends_with("F three\n") && read("c/0.log").lines().count() == 1);
        assert_eq!(losses.read(), (0, 0));
    }

    #[test]
    fn nothing_outside_the_directory_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("pod");
        std::fs::create_dir_all(pod.join("dir")).unwrap();
        std::os::unix::fs::symlink(dir.path(), pod.join("out")).unwrap();
        std::os::unix::fs::symlink("/dev/null", pod.join("link")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, pod.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let check = |path: &str, names: &str| {
            let error = Log::open(plan(&pod, path)).expect_err(path);
            let chain = Chain(&error).to_string();
            assert!(chain.contains(names), "{path}: {chain}");
        };
        check("../x", "plain relative path");
        check("/etc/x", "plain relative path");
        check("out/x", "\"out\"");
        check("link", "link");
        check("fifo", "not a regular file");
        check("dir", "dir");
        assert!(Log::open(plan(&dir.path().join("absent"), "x")).is_err());
        assert!(!dir.path().join("x").exists());
        Log::open(plan(&pod, "")).unwrap().append(&lines(&["x"]), &losses());
    }

    #[test]
    fn a_file_left_in_mid_line_is_mended() {
        let check = |had: &str, want: &str| {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("log"), had).unwrap();
            let mut log = Log::open(plan(dir.path(), "log")).unwrap();
            log.append(&lines(&["next"]), &losses());
            let text = std::fs::read_to_string(dir.path().join("log")).unwrap();
            let next = text.lines().last().unwrap();
            assert!(next.ends_with(" stdout F next"), "{text:?}");
            assert_eq!(text.strip_suffix(&format!("{next}\n")), Some(want), "{had:?}");
        };
        let whole = "1970-01-01T00:00:00.000000007Z stdout F hello\n";
        check("", "");
        check(whole, whole);
        check(&whole[..20], "");
        check(&whole[..43], &format!("{}\n", &whole[..43]));
        check(&format!("{whole}{}", &whole[..30]), whole);
    }

    #[test]
    fn a_full_device_loses_whole_lines_and_counts_them() {
        let losses = losses();
        let file = rustix::fs::open("/dev/full", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let mut log = Log { file: Some(file), ..Log::later(plan(Path::new("/dev"), "full")) };
        log.append(&lines(&["abc", ""]), &losses);
        log.append(&lines(&["d"]), &losses);
        assert_eq!(losses.read(), (4 + 1 + 2, 3));
        assert_eq!(log.losing, Some((7, 3)));
    }
}
