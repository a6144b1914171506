//! Follows the directories that networks depend on, with inotify(7).
//!
//! A directory that is not there yet is seen coming through the nearest parent that is. After any event that matters all watches
//! are made anew before the directory is read, so that nothing falls between the two. What inotify can't see (a mount over the
//! directory, the target of a symbolic link in it) is found by looking now and then.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{sleep, timeout};

use super::networks::Networks;
use crate::sys::reactor::register;

/// STATUS is not asked more often than this but after a change.
const LEAST: Duration = Duration::from_secs(1);

/// Reads the directory again whenever something in it changes.
pub(super) async fn follow(networks: &Arc<Networks>) {
    loop {
        // Reading a directory can hang as its disk does: not on a worker.
        let looking = networks.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let watches = Watches::new(&looking);
            looking.reload();
            watches
        });
        let Ok(watches) = looked.await else { return };
        let seen = async {
            match watches.and_then(|watches| Ok((register(watches.fd, Interest::READABLE)?, watches.wanted))) {
                Ok((fd, wanted)) => changed(&fd, &wanted).await,
                // No inotify instance is left: look now and then.
                Err(_) => std::future::pending().await,
            }
        };
        let _ = timeout(networks.config.look_every, seen).await;
    }
}

/// Asks STATUS as often as its answer gets old, and at once after a change.
pub(super) async fn ask(networks: &Arc<Networks>) {
    let mut changes = networks.changes();
    loop {
        let _ = networks.status().await;
        tokio::select! {
            () = sleep(networks.config.status_age.max(LEAST)) => {}
            _ = changes.changed() => {}
        }
    }
}

/// Which names matter in a watched directory. `None`: all.
type Wanted = HashMap<i32, Option<Vec<OsString>>>;

struct Watches {
    fd: OwnedFd,
    wanted: Wanted,
}

impl Watches {
    fn new(networks: &Networks) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let mut watches = Self { fd, wanted: HashMap::new() };
        let config = &networks.config;
        watches.add(&config.conf_dir)?;
        for dir in &config.bin_dirs {
            watches.add(dir)?;
        }
        // Plugins of a network may stand in a directory beside its file.
        for entry in std::fs::read_dir(&config.conf_dir).into_iter().flatten().flatten().take(256) {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                watches.watch(&entry.path(), None)?;
            }
        }
        Ok(watches)
    }

    /// Watches a directory for everything, and each of its parents for the next step towards it.
    fn add(&mut self, dir: &Path) -> io::Result<()> {
        self.watch(dir, None)?;
        let mut below = dir;
        while let (Some(parent), Some(name)) = (below.parent(), below.file_name()) {
            self.watch(parent, Some(name))?;
            below = parent;
        }
        Ok(())
    }

    /// A directory that is not there is seen coming through its parent.
    fn watch(&mut self, dir: &Path, name: Option<&OsStr>) -> io::Result<()> {
        // Not IN_MODIFY: a file is of interest once it is whole.
        let what = WatchFlags::CREATE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        let id = match inotify::add_watch(&self.fd, dir, what) {
            Ok(id) => id,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS | Errno::LOOP) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        // The same directory may be met twice: as one to follow and as another's parent.
        match (self.wanted.entry(id).or_insert_with(|| Some(Vec::new())), name) {
            (Some(names), Some(name)) => names.push(name.to_os_string()),
            (wanted, None) => *wanted = None,
            (None, Some(_)) => {}
        }
        Ok(())
    }
}

/// Waits for an event that matters.
async fn changed(fd: &AsyncFd<OwnedFd>, wanted: &Wanted) -> io::Result<()> {
    loop {
        let mut ready = fd.readable().await?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(fd.get_ref(), &mut buffer);
        let mut matters = false;
        loop {
            match events.next() {
                Ok(event) => {
                    let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
                    matters |= match (wanted.get(&event.wd()), name) {
                        // The queue overflowed (wd -1), or a directory is gone.
                        (None, _) | (_, None) => true,
                        (Some(None), _) => true,
                        // A parent's own attributes, and names beside the path, are no business of ours.
                        (Some(Some(names)), Some(name)) => !event.events().is_empty() && names.iter().any(|wanted| wanted == name),
                    } && !event.events().contains(ReadFlags::IGNORED);
                }
                Err(Errno::WOULDBLOCK) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if matters {
            return Ok(());
        }
        ready.clear_ready();
    }
}
