//! Control groups, over plain files: made, limited, entered, frozen, killed, measured and removed, on cgroup v1 and v2.
//!
//! Creators (forked children of the monitor) make and enter groups, the monitor kills and removes them, the daemon reads
//! statistics. Not here: calls of systemd ([`systemd`] has names and values for them), and any policy about which group a container gets. Nothing here starts a
//! thread, writes to a standard stream, or waits without a deadline.
//!
//! On v1 a group is the same path in every mounted hierarchy, systemd's named one and the hybrid's v2 included. On v2 it is
//! one directory, always a leaf of ours: no process is ever put into a parent (the "no internal processes" rule).

mod convert;
mod devices;
mod dir;
mod entrance;
mod error;
mod hierarchy;
mod kill;
mod stats;
pub mod systemd;
mod v1;
mod v2;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use self::entrance::Entrance;
pub use self::error::CgroupError;
pub use self::hierarchy::{Hierarchy, Version};
pub use self::stats::{CpuStats, HugepageStats, IoStats, MemoryStats, PidsStats, Pressure, PressureShare, Stats, SwapStats};

use self::dir::Dir;
use crate::plan::{DeviceRule, Resources};

/// A control group: a name, which may or may not exist. Holds no descriptor.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: String,
    page_sizes: Vec<String>,
    inner: Inner,
}

#[derive(Debug, Clone)]
enum Inner {
    V1(v1::Group),
    V2(v2::Group),
}

impl Cgroup {
    /// The group of a path such as `/kubepods/burstable/podX/ID`: absolute, with one part at least, none of them empty, `.`,
    /// `..`, longer than 255 bytes or with control characters. The root has no limits, and killing it would be the end.
    pub fn new(hierarchy: &Hierarchy, path: &str) -> Result<Self, CgroupError> {
        check_path(path)?;
        let inner = match &hierarchy.kind {
            hierarchy::Kind::V1(mounts) => {
                let places = mounts.iter().map(|mount| v1::Place { mount: mount.clone(), dir: below(&mount.root, path) });
                Inner::V1(v1::Group { places: places.collect() })
            }
            hierarchy::Kind::V2 { root, controllers } => {
                Inner::V2(v2::Group { root: root.clone(), controllers: controllers.clone(), dir: below(root, path) })
            }
        };
        Ok(Self { path: path.to_string(), page_sizes: hierarchy.page_sizes.clone(), inner })
    }

    /// The group in which a process is, from /proc/PID/cgroup: where an exec goes when a container's own group has become a
    /// parent. On v1 each hierarchy's own; those where the process is in the root are left out.
    pub fn of_process(hierarchy: &Hierarchy, pid: u32) -> Result<Self, CgroupError> {
        let file = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = std::fs::read_to_string(&file).map_err(|source| CgroupError::Read { file, source })?;
        Self::of_text(hierarchy, &text)
    }

    /// From the text of /proc/PID/cgroup: lines `id:controllers:path`.
    fn of_text(hierarchy: &Hierarchy, text: &str) -> Result<Self, CgroupError> {
        let path_in = |names: &str| {
            text.lines().find_map(|line| {
                let (has, path) = line.split_once(':')?.1.split_once(':')?;
                // A removed group's name has this suffix.
                (has == names).then(|| path.strip_suffix(" (deleted)").unwrap_or(path))
            })
        };
        match &hierarchy.kind {
            hierarchy::Kind::V2 { .. } => Self::new(hierarchy, path_in("").unwrap_or_default()),
            hierarchy::Kind::V1(mounts) => {
                let found = mounts.iter().filter_map(|mount| Some((mount, path_in(&mount.names).filter(|path| *path != "/")?)));
                let found: Vec<(&hierarchy::Mount, &str)> = found.collect();
                found.iter().try_for_each(|(_, path)| check_path(path))?;
                let path = found.iter().find(|(mount, _)| mount.has("memory")).or(found.first()).map(|(_, path)| path.to_string());
                let path = path.ok_or(CgroupError::BadPath { path: "/".to_string(), why: "it is the root" })?;
                let places = found.iter().map(|(mount, path)| v1::Place { mount: (*mount).clone(), dir: below(&mount.root, path) });
                Ok(Self { path, page_sizes: hierarchy.page_sizes.clone(), inner: Inner::V1(v1::Group { places: places.collect() }) })
            }
        }
    }

    /// The path, as it was given.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Its directory in each hierarchy, named as in [`Hierarchy::mounts`].
    pub fn dirs(&self) -> Vec<(&str, &Path)> {
        match &self.inner {
            Inner::V1(group) => group.places.iter().map(|place| (place.mount.label(), place.dir.as_path())).collect(),
            Inner::V2(group) => vec![("", group.dir.as_path())],
        }
    }

    /// It is there; on v1, in all hierarchies.
    pub fn exists(&self) -> bool {
        self.dirs().iter().all(|(_, dir)| rustix::fs::stat(*dir).is_ok())
    }

    /// Makes the group, new: one of the same name that has no process in it (left by a crash) is replaced, so that no counter
    /// or limit of its past remains; one that has is [`CgroupError::InUse`]. On an error nothing of it is left.
    ///
    /// Missing parents are made, and returned, outermost first, for [`remove_parents`]. Existing ones are not configured, but
    /// for controllers that v2's need to hand down: those are enabled, none is ever disabled. On v1 what is made gets the
    /// parent's CPUs and memory nodes, since a cpuset without them takes no process.
    pub fn create(&self) -> Result<Vec<String>, CgroupError> {
        match &self.inner {
            Inner::V1(group) => group.create(),
            Inner::V2(group) => group.create(),
        }
    }

    /// Takes a group that systemd has made instead: what [`create`](Self::create) does beyond making it. NotFound: it is gone.
    pub fn adopt(&self) -> Result<(), CgroupError> {
        match &self.inner {
            Inner::V1(_) => Err(CgroupError::BadPath { path: self.path.clone(), why: "systemd makes groups of cgroup v2 only" }),
            Inner::V2(group) => group.hand_down(),
        }
    }

    /// The group above it; `None`: that is the root.
    pub fn parent(&self, hierarchy: &Hierarchy) -> Option<Self> {
        Self::new(hierarchy, self.path.rsplit_once('/')?.0).ok()
    }

    /// Sets the limits that are given, and leaves the others; 0 is "not given" but for huge pages, as in the CRI. Serves a new
    /// group and an update alike: limits go up and down in an order that the kernel takes.
    ///
    /// Tolerated, as Kubernetes expects: huge page limits where there is no hugetlb controller; no swap or any swap where swap
    /// isn't accounted. A memory limit below what can't be reclaimed is refused (ResourceExhausted) and nothing is killed.
    pub fn set(&self, resources: &Resources) -> Result<(), CgroupError> {
        // A kernel without huge pages knows no size, and has nothing to limit.
        let unknown = |size: &String| !self.page_sizes.is_empty() && !self.page_sizes.contains(size);
        if let Some((size, _)) = resources.hugepages.iter().find(|(size, _)| unknown(size)) {
            let why = "this node has no pages of that size";
            return Err(CgroupError::BadValue { what: "huge page size", value: size.chars().take(200).collect(), why });
        }
        match &self.inner {
            Inner::V1(group) => group.set(resources),
            Inner::V2(group) => group.set(resources),
        }
    }

    /// The same for a group in use, all or nothing: on an error each file that was written holds again what it held before.
    /// (Of a `unified` file with a line for each device, the lines of devices that it had.)
    pub fn update(&self, resources: &Resources) -> Result<(), CgroupError> {
        let files = match &self.inner {
            Inner::V1(group) => group.files(resources)?,
            Inner::V2(group) => group.files(resources)?,
        };
        let mut before = Vec::new();
        for (dir, file) in files {
            before.extend(dir.read(&file)?.map(|text| (dir, file, text)));
        }
        self.set(resources).inspect_err(|_| {
            // The kernel takes some only in an order (a quota and its period, memory with and without swap).
            for _ in 0..2 {
                before.retain(|(dir, file, text)| !dir.restore(file, text));
            }
        })
    }

    /// Lets processes of the group use these devices only: for each of read, write and mknod the last rule that matches holds,
    /// and without one it is refused. No rules: no filter. Replaces what an earlier call set.
    ///
    /// v1 can't take a device out of a wider rule; such lists are refused ([`CgroupError::DeviceRule`]). It also can't replace
    /// the rules of a group that has groups below it (EINVAL), and can't allow what the parent doesn't (EPERM).
    pub fn set_devices(&self, rules: &[DeviceRule]) -> Result<(), CgroupError> {
        match &self.inner {
            Inner::V1(group) => group.set_devices(rules),
            Inner::V2(group) => group.set_devices(rules),
        }
    }

    /// Moves a process in, on v1 in every hierarchy; 0: the caller, which has one thread only. Its children born later are in
    /// it, those that it has are not. Costs about 10 ms; a new process goes in by an [`entrance`](Self::entrance).
    /// FailedPrecondition: v2's group has become a parent of groups with controllers; NotFound: either is gone.
    pub fn enter(&self, pid: u32) -> Result<(), CgroupError> {
        match &self.inner {
            Inner::V1(group) => group.enter(pid),
            Inner::V2(group) => Dir::open(&group.dir)?.enter(pid),
        }
    }

    /// Opens the way in for a process that is about to be cloned. Errors as of [`enter`](Self::enter).
    pub fn entrance(&self) -> Result<Entrance, CgroupError> {
        match &self.inner {
            Inner::V1(group) => group.entrance(),
            Inner::V2(group) => group.entrance(),
        }
    }

    /// The directory, for CLONE_INTO_CGROUP. `None` on v1: the child must [`enter`](Self::enter), or its directory can't be opened.
    pub fn open_dir(&self) -> Option<OwnedFd> {
        match &self.inner {
            Inner::V1(_) => None,
            Inner::V2(group) => group.open_dir().ok(),
        }
    }

    /// The processes in it, and with `recursive` below it; none where it doesn't exist. Zombies don't count. Sorted, each once.
    pub fn procs(&self, recursive: bool) -> Result<Vec<u32>, CgroupError> {
        match &self.inner {
            Inner::V1(group) => group.procs(recursive),
            Inner::V2(group) => group.procs(recursive),
        }
    }

    /// No process lives in it or below, or it doesn't exist.
    pub fn is_empty(&self) -> Result<bool, CgroupError> {
        match &self.inner {
            Inner::V1(group) => Ok(group.procs(true)?.is_empty()),
            Inner::V2(group) => group.is_empty(),
        }
    }

    /// Stops every process in it and below; each is stopped when this returns. Not in time: thawed again, and
    /// [`CgroupError::NotFrozen`].
    pub fn freeze(&self, within: Duration) -> Result<(), CgroupError> {
        let frozen = match &self.inner {
            Inner::V1(group) => group.freeze(within),
            Inner::V2(group) => group.freeze(within),
        };
        if !matches!(frozen, Ok(true)) {
            let _ = self.thaw();
        }
        match frozen? {
            true => Ok(()),
            false => Err(CgroupError::NotFrozen { path: self.first_dir(), ms: within.as_millis() }),
        }
    }

    /// Lets the processes run on. A group that isn't frozen stays as it is.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        match &self.inner {
            Inner::V1(group) => group.thaw(false),
            Inner::V2(group) => group.thaw(),
        }
    }

    /// Kills everything in it and below, and waits until nothing lives; zombies don't count. One that doesn't exist is Ok.
    /// With no time at all, everything has been sent SIGKILL once when [`CgroupError::StillAlive`] is returned.
    pub fn kill(&self, within: Duration) -> Result<(), CgroupError> {
        let dead = match &self.inner {
            Inner::V1(group) => kill::kill_v1(group, &self.path, within)?,
            Inner::V2(group) => group.kill(within)?,
        };
        if dead {
            return Ok(());
        }
        let mut pids = self.procs(true)?;
        pids.truncate(16);
        Err(CgroupError::StillAlive { path: self.path.clone(), pids, ms: within.as_millis() })
    }

    /// Removes the group and all below it, deepest first; one that doesn't exist is Ok. The kernel lets go of a group a little
    /// later than its last process dies, so "busy" is tried again until the time is up. Parents stay.
    pub fn remove(&self, within: Duration) -> Result<(), CgroupError> {
        let deadline = Instant::now() + within;
        let mut pause = Duration::from_micros(200);
        loop {
            let mut busy = None;
            for (_, dir) in self.dirs() {
                if !dir::remove_tree(dir)? {
                    busy = Some(dir.to_path_buf());
                }
            }
            let Some(path) = busy else { return Ok(()) };
            if Instant::now() >= deadline {
                return Err(CgroupError::Remove { path, source: rustix::io::Errno::BUSY.into() });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// How many processes the kernel's OOM killer has ended in it and below, whatever limit it was for. NotFound: it is gone.
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        match &self.inner {
            Inner::V1(group) => match group.find("memory")? {
                Some(dir) => oom_kills_v1(&dir),
                None => Err(CgroupError::NoController { controller: "memory" }),
            },
            Inner::V2(group) => {
                let events = Dir::open(&group.dir)?.read("memory.events")?.ok_or(CgroupError::NoController { controller: "memory" })?;
                // A group kill counts each victim as well; the other is for a kernel that would count the group alone.
                let count = |name| stats::field(&events, name).unwrap_or(0);
                Ok(count("oom_kill").max(count("oom_group_kill")))
            }
        }
    }

    /// What it uses now. NotFound: it is gone.
    pub fn stats(&self) -> Result<Stats, CgroupError> {
        match &self.inner {
            Inner::V1(group) => stats::read_v1(group, &self.page_sizes),
            Inner::V2(group) => stats::read_v2(group, &self.page_sizes),
        }
    }

    fn first_dir(&self) -> PathBuf {
        self.dirs().first().map(|(_, dir)| dir.to_path_buf()).unwrap_or_default()
    }
}

/// Removes parents that [`Cgroup::create`] returned, innermost first. One that is gone, or in use by now, is left.
pub fn remove_parents(hierarchy: &Hierarchy, parents: &[String]) -> Result<(), CgroupError> {
    let mounts = hierarchy.mounts();
    for name in parents.iter().rev() {
        let Some((label, path)) = name.split_once(':') else {
            return Err(CgroupError::BadPath { path: name.clone(), why: "it names no hierarchy" });
        };
        check_path(path)?;
        if let Some((_, root)) = mounts.iter().find(|(has, _)| *has == label) {
            dir::remove(&below(root, path))?;
        }
    }
    Ok(())
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// A parent's name in [`Cgroup::create`]'s answer.
fn name_parent(label: &str, root: &Path, dir: &Path) -> Option<String> {
    Some(format!("{label}:/{}", dir.strip_prefix(root).ok()?.to_str()?))
}

/// Replaces a directory that exists by a new one, unless a process is in it.
fn take_over(path: &Path) -> Result<(), CgroupError> {
    let in_use = || CgroupError::InUse { path: path.to_path_buf() };
    if let Some(dir) = Dir::find(path)? {
        let mut pids = Vec::new();
        dir.procs_below(&mut pids)?;
        if !pids.is_empty() {
            return Err(in_use());
        }
    }
    if dir::remove_tree(path)? && dir::make(path)? { Ok(()) } else { Err(in_use()) }
}

/// v1 counts in each group alone.
fn oom_kills_v1(dir: &Dir) -> Result<u64, CgroupError> {
    let mut count = dir.read("memory.oom_control")?.and_then(|text| stats::field(&text, "oom_kill")).unwrap_or(0);
    for child in dir.children()? {
        if let Some(child) = Dir::find(&child)? {
            count += oom_kills_v1(&child)?;
        }
    }
    Ok(count)
}

fn check_path(path: &str) -> Result<(), CgroupError> {
    let bad = |why| Err(CgroupError::BadPath { path: path.chars().take(200).collect(), why });
    let Some(parts) = path.strip_prefix('/') else { return bad("it is not absolute") };
    if parts.is_empty() {
        return bad("it is the root");
    }
    for part in parts.split('/') {
        match part {
            "" => return bad("it has an empty part"),
            "." | ".." => return bad("it has a part . or .."),
            _ if part.len() > 255 => return bad("a part is longer than 255 bytes"),
            _ if part.chars().any(char::is_control) => return bad("it has control characters"),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
