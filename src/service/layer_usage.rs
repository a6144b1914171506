//! What writable layers use, measured in the background and at a bounded cost.
//!
//! A layer may hold millions of files and lie on a disk that hangs, and kubelet asks every few seconds: nobody waits for a
//! walk. One thread walks the layers that somebody asked about lately, a slice of each in turn. A layer that is done within
//! its first slice is measured at once; a larger one is walked for a tenth of the time at most, and the larger it is, the
//! rarer. The container writes into the tree meanwhile: directories are opened beneath the layer's own, no link is followed.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use tokio::sync::watch;

use super::now;

/// A figure is measured again when it is asked for at this age, or at [`PAUSE`] times what measuring it took.
const AGE: Duration = Duration::from_secs(10);
const PAUSE: u32 = 20;
/// Entries of one slice, and how much longer than it the thread rests.
const SLICE: usize = 2000;
const REST: u32 = 9;
/// Directories that were found and not yet read, of one layer: beyond it they count, and what they hold doesn't.
const MAX_PENDING: usize = 100_000;
/// Files with several names, which count once.
const MAX_LINKED: usize = 100_000;
/// A path that is longer begins at a directory that is held open; how many such.
const LONGEST: usize = 2048;
const MAX_HELD: usize = 64;

/// The filesystem of the layers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filesystem {
    /// Where it is known by.
    pub mountpoint: String,
    /// Its device's numbers.
    pub device: (u32, u32),
    /// Bytes.
    pub size: u64,
    /// Inodes.
    pub inodes: u64,
    /// Inodes that are free.
    pub inodes_free: u64,
}

/// The size of a writable layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerUsage {
    /// Nanoseconds since the epoch.
    pub at: u64,
    /// Where it is.
    pub filesystem: Filesystem,
    /// Bytes.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

/// What is known of one layer.
#[derive(Debug)]
pub struct Layer {
    state: Mutex<State>,
    measured: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    known: Option<LayerUsage>,
    measured_at: Option<Instant>,
    walking: bool,
    took: Duration,
}

impl Default for Layer {
    fn default() -> Self {
        Self { state: Mutex::default(), measured: watch::Sender::new(false) }
    }
}

impl Layer {
    /// The last figure; before there is one, waits for it until `until`.
    pub async fn known(&self, until: tokio::time::Instant) -> Option<LayerUsage> {
        let mut measured = self.measured.subscribe();
        let _ = tokio::time::timeout_at(until, measured.wait_for(|done| *done)).await;
        self.state.lock().unwrap_or_else(PoisonError::into_inner).known.clone()
    }

    /// Takes the walk, if the figure is old enough for one and none is under way.
    fn take(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let age = AGE.max(state.took * PAUSE);
        let due = !state.walking && state.measured_at.is_none_or(|at| at.elapsed() >= age);
        state.walking |= due;
        due
    }

    fn done(&self, found: Option<LayerUsage>, took: Duration) {
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.walking = false;
            state.measured_at = Some(Instant::now());
            state.took = took;
            state.known = found.or(state.known.take());
        }
        self.measured.send_replace(true);
    }
}

/// The thread that walks. It ends when this is dropped.
#[derive(Debug)]
pub struct Walker {
    wanted: Sender<(Weak<Layer>, PathBuf)>,
}

impl Walker {
    /// Starts it, for layers on the filesystem of `root`.
    pub fn start(root: PathBuf) -> io::Result<Self> {
        let (wanted, receive) = mpsc::channel();
        std::thread::Builder::new().name("layer-usage".into()).spawn(move || walk_all(&root, &receive))?;
        Ok(Self { wanted })
    }

    /// Somebody wants to know what the layer at `dir` uses. Never waits.
    pub fn ask(&self, layer: &Arc<Layer>, dir: impl FnOnce() -> PathBuf) {
        if layer.take() && self.wanted.send((Arc::downgrade(layer), dir())).is_err() {
            layer.done(None, Duration::ZERO);
        }
    }
}

fn walk_all(root: &Path, wanted: &Receiver<(Weak<Layer>, PathBuf)>) {
    let mut walks: VecDeque<(Weak<Layer>, Walk)> = VecDeque::new();
    let begin = |(layer, dir): (Weak<Layer>, PathBuf), walks: &mut VecDeque<_>| match Walk::new(&dir) {
        Ok(walk) => walks.push_front((layer, walk)),
        // It has been removed meanwhile.
        Err(_) => {
            if let Some(layer) = layer.upgrade() {
                layer.done(None, Duration::ZERO);
            }
        }
    };
    loop {
        if walks.is_empty() {
            let Ok(job) = wanted.recv() else { return };
            begin(job, &mut walks);
        }
        while let Ok(job) = wanted.try_recv() {
            begin(job, &mut walks);
        }
        let Some((layer, mut walk)) = walks.pop_front() else { continue };
        if layer.strong_count() == 0 {
            continue;
        }
        let began = Instant::now();
        let done = walk.step(SLICE);
        let worked = began.elapsed();
        walk.took += worked;
        if done {
            let found = LayerUsage { at: now(), filesystem: filesystem(root), bytes: walk.bytes, inodes: walk.inodes };
            if let Some(layer) = layer.upgrade() {
                layer.done(Some(found), walk.took);
            }
            continue;
        }
        walks.push_back((layer, walk));
        match wanted.recv_timeout(worked * REST) {
            Ok(job) => begin(job, &mut walks),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn filesystem(root: &Path) -> Filesystem {
    let mountpoint = root.to_string_lossy().into_owned();
    let device = rustix::fs::stat(root).map(|stat| (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev))).unwrap_or_default();
    match rustix::fs::statvfs(root) {
        Ok(fs) => Filesystem { mountpoint, device, size: fs.f_blocks * fs.f_frsize, inodes: fs.f_files, inodes_free: fs.f_ffree },
        Err(_) => Filesystem { mountpoint, device, ..Filesystem::default() },
    }
}

/// One walk through one layer.
struct Walk {
    /// Directories to be read: one that is held open, and a path from there.
    pending: Vec<(Rc<OwnedFd>, PathBuf)>,
    /// The one that is being read.
    open: Option<(Rc<OwnedFd>, PathBuf, OwnedFd, Dir)>,
    held: usize,
    linked: HashSet<u64>,
    bytes: u64,
    inodes: u64,
    took: Duration,
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Walk {
    fn new(dir: &Path) -> io::Result<Self> {
        let base = Rc::new(rustix::fs::open(dir, DIRECTORY, Mode::empty())?);
        let own = rustix::fs::fstat(&*base)?;
        Ok(Self {
            pending: vec![(base, PathBuf::from("."))],
            open: None,
            held: 0,
            linked: HashSet::new(),
            bytes: own.st_blocks as u64 * 512,
            inodes: 1,
            took: Duration::ZERO,
        })
    }

    /// Counts `entries` more. Whether that was all.
    fn step(&mut self, entries: usize) -> bool {
        for _ in 0..entries {
            if self.open.is_none() {
                let Some((base, path)) = self.pending.pop() else { return true };
                let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
                // What vanishes or is replaced meanwhile doesn't count.
                let Ok(fd) = rustix::fs::openat2(&*base, &path, DIRECTORY, Mode::empty(), resolve) else { continue };
                let Ok(dir) = Dir::read_from(&fd) else { continue };
                self.open = Some((base, path, fd, dir));
            }
            let Some((base, path, fd, dir)) = &mut self.open else { continue };
            let Some(Ok(entry)) = dir.next() else {
                self.open = None;
                continue;
            };
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let Ok(stat) = rustix::fs::statat(&*fd, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if !is_dir && stat.st_nlink > 1 && self.linked.len() < MAX_LINKED && !self.linked.insert(stat.st_ino) {
                continue;
            }
            self.inodes += 1;
            self.bytes += stat.st_blocks as u64 * 512;
            if is_dir && self.pending.len() < MAX_PENDING {
                let below = path.join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name.to_bytes()));
                if below.as_os_str().len() < LONGEST {
                    self.pending.push((base.clone(), below));
                } else if self.held < MAX_HELD
                    && let Ok(fd) = rustix::fs::openat(&*fd, name, DIRECTORY, Mode::empty())
                {
                    self.held += 1;
                    self.pending.push((Rc::new(fd), PathBuf::from(".")));
                }
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure(dir: &Path) -> (u64, u64) {
        let mut walk = Walk::new(dir).unwrap();
        // Slices of one entry end in the same figures.
        while !walk.step(1) {}
        (walk.bytes, walk.inodes)
    }

    #[test]
    fn a_tree_is_measured_without_following_links() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::write(dir.path().join("d/f"), [1; 5000]).unwrap();
        std::fs::hard_link(dir.path().join("d/f"), dir.path().join("again")).unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("l")).unwrap();
        let (bytes, inodes) = measure(dir.path());
        assert_eq!(inodes, 4, "the directory, d, f once, l");
        assert!((5000..100_000).contains(&bytes), "{bytes}");
    }

    #[test]
    fn depth_hides_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let name = "n".repeat(250);
        let mut fd = rustix::fs::open(dir.path(), DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..40 {
            rustix::fs::mkdirat(&fd, &name, Mode::RWXU).unwrap();
            fd = rustix::fs::openat(&fd, &name, DIRECTORY, Mode::empty()).unwrap();
        }
        let file = rustix::fs::openat(&fd, "deep", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
        rustix::io::write(&file, &[1; 70_000]).unwrap();
        let (bytes, inodes) = measure(dir.path());
        assert_eq!(inodes, 42);
        assert!(bytes >= 70_000);
    }

    #[tokio::test]
    async fn the_walker_answers_who_asks() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("f"), [1; 5000]).unwrap();
        let walker = Walker::start(dir.path().to_path_buf()).unwrap();
        let soon = || tokio::time::Instant::now() + Duration::from_secs(60);
        let layer = Arc::new(Layer::default());
        walker.ask(&layer, || dir.path().to_path_buf());
        let found = layer.known(soon()).await.unwrap();
        assert_eq!((found.inodes, found.filesystem.mountpoint.as_str()), (2, dir.path().to_str().unwrap()));
        assert!(found.filesystem.size > 0 && found.filesystem.device != (0, 0));
        // A figure that is young is not measured again, and nobody waits.
        walker.ask(&layer, || panic!("measured again"));
        assert_eq!(layer.known(tokio::time::Instant::now()).await, Some(found));
        let gone = Arc::new(Layer::default());
        walker.ask(&gone, || dir.path().join("gone"));
        assert_eq!(gone.known(soon()).await, None);
    }
}
