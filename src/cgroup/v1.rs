//! A control group of cgroup v1: the same path in every mounted hierarchy
//! (Documentation/admin-guide/cgroup-v1/ in the kernel's tree).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::devices;
use super::dir::{self, Dir};
use super::entrance::{Door, Entrance};
use super::hierarchy::Mount;
use super::stats::field;
use super::{CgroupError, convert, v2};
use crate::plan::{DeviceRule, Resources};

/// The limit of memory, and that of memory and swap together.
const MEMORY: &str = "memory.limit_in_bytes";
const TOGETHER: &str = "memory.memsw.limit_in_bytes";

/// A group's directory in one hierarchy.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) mount: Mount,
    pub(super) dir: PathBuf,
}

/// A group.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) places: Vec<Place>,
}

impl Group {
    /// The group's directory for a controller. `None`: the controller isn't mounted.
    pub(super) fn find(&self, controller: &str) -> Result<Option<Dir>, CgroupError> {
        match self.places.iter().find(|place| place.mount.has(controller)) {
            Some(place) => Dir::open(&place.dir).map(Some),
            None => Ok(None),
        }
    }

    /// The group's directory for a controller that a limit needs.
    fn need(&self, controller: &'static str) -> Result<Dir, CgroupError> {
        self.find(controller)?.ok_or(CgroupError::NoController { controller })
    }

    /// Makes the group in every hierarchy. Gives the parents it made, as `label:/path`, outermost first.
    pub(super) fn create(&self) -> Result<Vec<String>, CgroupError> {
        let mut made = Vec::new();
        let mut parents = Vec::new();
        for place in &self.places {
            if let Err(error) = create_in(place, &mut made, &mut parents) {
                for dir in made.iter().rev() {
                    let _ = dir::remove(dir);
                }
                return Err(error);
            }
        }
        Ok(parents)
    }

    pub(super) fn set(&self, limits: &Resources) -> Result<(), CgroupError> {
        // A setting that can't be kept is refused before any other is written.
        if let Some((key, _)) = limits.unified.first() {
            return Err(CgroupError::UnifiedOnV1 { key: key.clone() });
        }
        self.set_cpu(limits)?;
        self.set_memory(limits)?;
        if let Some(limit) = limits.pids_limit.filter(|&limit| limit != 0) {
            self.need("pids")?.write("pids.max", &convert::limit_v2(limit))?;
        }
        if !limits.cpuset_cpus.is_empty() || !limits.cpuset_mems.is_empty() {
            let dir = self.need("cpuset")?;
            for (file, value) in [("cpuset.cpus", &limits.cpuset_cpus), ("cpuset.mems", &limits.cpuset_mems)] {
                if !value.is_empty() {
                    dir.write(file, value)?;
                }
            }
        }
        for (size, _) in &limits.hugepages {
            convert::check_page_size(size)?;
        }
        if limits.hugepages.is_empty() {
            return Ok(());
        }
        // Kubernetes sets a limit for every size even where there is no controller.
        match (self.find("hugetlb")?, self.hybrid_hugetlb()?) {
            (Some(dir), _) => limits.hugepages.iter().try_for_each(|(size, limit)| {
                dir.write(&format!("hugetlb.{size}.limit_in_bytes"), &limit.to_string())?;
                // Reservations are limited apart since Linux 5.7.
                dir.try_write(&format!("hugetlb.{size}.rsvd.limit_in_bytes"), &limit.to_string()).map(drop)
            }),
            (None, Some(dir)) => v2::set_hugepages(&dir, limits),
            (None, None) => Ok(()),
        }
    }

    /// The group's directory in a hybrid's v2 hierarchy, if that has the hugetlb controller and hands it down to the group.
    pub(super) fn hybrid_hugetlb(&self) -> Result<Option<Dir>, CgroupError> {
        let Some(dir) = self.find("")? else { return Ok(None) };
        let controllers = dir.read("cgroup.controllers")?.unwrap_or_default();
        Ok(controllers.split_whitespace().any(|name| name == "hugetlb").then_some(dir))
    }

    /// The files that [`set`](Self::set) may write for these limits, for an update to restore.
    pub(super) fn files(&self, limits: &Resources) -> Result<Vec<(Dir, String)>, CgroupError> {
        let mut names: Vec<(&str, String)> = Vec::new();
        let mut add = |given: bool, controller, files: &[&str]| {
            names.extend(files.iter().filter(|_| given).map(|file| (controller, file.to_string())));
        };
        add(limits.cpu_shares.is_some(), "cpu", &["cpu.shares"]);
        add(limits.cpu_quota.or(limits.cpu_period.map(|_| 0)).is_some(), "cpu", &["cpu.cfs_quota_us", "cpu.cfs_period_us"]);
        add(limits.memory_limit.or(limits.memory_swap).is_some(), "memory", &[MEMORY, TOGETHER]);
        add(limits.pids_limit.is_some(), "pids", &["pids.max"]);
        add(!limits.cpuset_cpus.is_empty(), "cpuset", &["cpuset.cpus"]);
        add(!limits.cpuset_mems.is_empty(), "cpuset", &["cpuset.mems"]);
        for (size, _) in &limits.hugepages {
            add(true, "hugetlb", &[&format!("hugetlb.{size}.limit_in_bytes"), &format!("hugetlb.{size}.rsvd.limit_in_bytes")]);
            add(true, "", &[&format!("hugetlb.{size}.max"), &format!("hugetlb.{size}.rsvd.max")]);
        }
        let mut files = Vec::new();
        for (controller, file) in names {
            files.extend(self.find(controller)?.map(|dir| (dir, file)));
        }
        Ok(files)
    }

    fn set_cpu(&self, limits: &Resources) -> Result<(), CgroupError> {
        let shares = limits.cpu_shares.filter(|&n| n != 0);
        let quota = limits.cpu_quota.filter(|&n| n != 0);
        let period = limits.cpu_period.filter(|&n| n != 0);
        if shares.is_none() && quota.is_none() && period.is_none() {
            return Ok(());
        }
        let dir = self.need("cpu")?;
        if let Some(shares) = shares {
            dir.write("cpu.shares", &shares.clamp(2, 262_144).to_string())?;
        }
        let write_period = || period.map_or(Ok(()), |n| dir.write("cpu.cfs_period_us", &n.to_string()));
        let write_quota = || quota.map_or(Ok(()), |n| dir.write("cpu.cfs_quota_us", &convert::limit_v1(n)));
        // Each write alone must keep the share of CPU within the parent's: where one order doesn't, the other does.
        match write_period() {
            Ok(()) => write_quota(),
            Err(_) if quota.is_some() => write_quota().and_then(|()| write_period()),
            Err(error) => Err(error),
        }
    }

    fn set_memory(&self, limits: &Resources) -> Result<(), CgroupError> {
        let memory = limits.memory_limit.filter(|&n| n != 0);
        let mut together = limits.memory_swap.filter(|&n| n != 0);
        if memory.is_none() && together.is_none() {
            return Ok(());
        }
        let dir = self.need("memory")?;
        if let Some(limit) = memory {
            check_shrink(&dir, limit)?;
        }
        let now = match dir.number(TOGETHER)? {
            Some(now) => now.unwrap_or(u64::MAX),
            None => {
                // Without swap accounting there is nothing to limit, unless swap is to be limited apart from memory.
                if let Some(limit) = together.filter(|&n| n > 0 && Some(n) != memory) {
                    return Err(CgroupError::Unsupported { file: dir.file(TOGETHER), value: limit.to_string() });
                }
                together = None;
                0
            }
        };
        if memory.is_some_and(|n| n < 0) && together.is_none() && now != 0 {
            together = Some(-1);
        }
        let write_memory = || memory.map_or(Ok(()), |n| dir.write(MEMORY, &convert::limit_v1(n)));
        let write_together = || together.map_or(Ok(()), |n| dir.write(TOGETHER, &convert::limit_v1(n)));
        // Memory's limit may never be above that of memory and swap, so the upper one goes up first and comes down last.
        if together.is_some_and(|n| n < 0 || n as u64 >= now) {
            write_together().and_then(|()| write_memory())
        } else {
            write_memory().and_then(|()| write_together())
        }
    }

    pub(super) fn set_devices(&self, rules: &[DeviceRule]) -> Result<(), CgroupError> {
        if rules.is_empty() {
            return Ok(());
        }
        let exceptions = devices::exceptions(rules)?;
        let dir = self.need("devices")?;
        let (all, other) = if exceptions.allow { ("devices.allow", "devices.deny") } else { ("devices.deny", "devices.allow") };
        // Resets the list too.
        dir.write(all, "a")?;
        exceptions.list.iter().try_for_each(|exception| dir.write(other, exception))
    }

    pub(super) fn enter(&self, pid: u32) -> Result<(), CgroupError> {
        if pid == 0 {
            return self.entrance()?.enter_self();
        }
        self.places.iter().try_for_each(|place| Dir::open(&place.dir)?.enter(pid))
    }

    pub(super) fn entrance(&self) -> Result<Entrance, CgroupError> {
        let mut entrance = Entrance { doors: Vec::new(), unified: None };
        for place in &self.places {
            let dir = Dir::open(&place.dir)?;
            // A hybrid's v2 takes whole processes only.
            let file = if place.mount.names.is_empty() { "cgroup.procs" } else { "tasks" };
            let door = Door { file: dir.open_write(file)?, path: place.dir.clone() };
            if place.mount.names.is_empty() { entrance.unified = Some((door, dir.into_fd())) } else { entrance.doors.push(door) }
        }
        Ok(entrance)
    }

    /// The processes of all hierarchies together: one may have been moved in some of them only. Sorted, each once.
    pub(super) fn procs(&self, recursive: bool) -> Result<Vec<u32>, CgroupError> {
        let mut pids = Vec::new();
        for place in &self.places {
            if let Some(dir) = Dir::find(&place.dir)? {
                if recursive { dir.procs_below(&mut pids)? } else { dir.procs(&mut pids)? }
            }
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Asks for all of it to be frozen, and waits. `false`: it is not, yet.
    pub(super) fn freeze(&self, within: Duration) -> Result<bool, CgroupError> {
        let dir = self.need("freezer")?;
        let deadline = Instant::now() + within;
        loop {
            // Written again each time: the kernel looks at tasks that were not ready only then.
            dir.write("freezer.state", "FROZEN")?;
            if dir.read("freezer.state")?.is_none_or(|state| state.trim() == "FROZEN") {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Thaws it; with `below`, also the groups in it that were frozen on their own.
    pub(super) fn thaw(&self, below: bool) -> Result<(), CgroupError> {
        match self.find("freezer") {
            Ok(Some(dir)) => thaw(&dir, below),
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The kernel gives back page cache, and swaps, before it refuses a limit: one that can't be reached is refused before.
fn check_shrink(dir: &Dir, limit: i64) -> Result<(), CgroupError> {
    let current = dir.number("memory.usage_in_bytes")?.flatten().unwrap_or(0);
    let cache = || {
        let stat = dir.read("memory.stat")?.unwrap_or_default();
        Ok(field(&stat, "total_inactive_file").unwrap_or(0) + field(&stat, "total_active_file").unwrap_or(0))
    };
    convert::check_shrink(|| dir.file(MEMORY), limit, current, cache)
}

fn thaw(dir: &Dir, below: bool) -> Result<(), CgroupError> {
    dir.write("freezer.state", "THAWED")?;
    if below {
        for child in dir.children()? {
            if let Some(child) = Dir::find(&child)? {
                thaw(&child, true)?;
            }
        }
    }
    Ok(())
}

fn create_in(place: &Place, made: &mut Vec<PathBuf>, parents: &mut Vec<String>) -> Result<(), CgroupError> {
    let mut new = dir::make_below(&place.mount.root, &place.dir)?;
    if new.is_empty() {
        super::take_over(&place.dir)?;
        new.push(place.dir.clone());
    }
    made.extend(new.iter().cloned());
    let (_, above) = new.split_last().unwrap_or((&place.dir, &[]));
    parents.extend(above.iter().filter_map(|dir| super::name_parent(place.mount.label(), &place.mount.root, dir)));
    // The rest of v2's controllers are v1's on such a node.
    let has_hugetlb =
        || Ok(Dir::open(&place.mount.root)?.read("cgroup.controllers")?.is_some_and(|names| names.split_whitespace().any(|name| name == "hugetlb")));
    if place.mount.names.is_empty() && has_hugetlb()? {
        v2::Group { root: place.mount.root.clone(), controllers: vec!["hugetlb".to_string()], dir: place.dir.clone() }.hand_down()?;
    }
    if place.mount.has("cpuset") { new.iter().try_for_each(|dir| fill_cpuset(dir)) } else { Ok(()) }
}

/// A new cpuset has no CPUs and no memory nodes, and nothing can run in it: it gets its parent's.
fn fill_cpuset(path: &Path) -> Result<(), CgroupError> {
    let dir = Dir::open(path)?;
    let Some(parent) = path.parent() else { return Ok(()) };
    let parent = Dir::open(parent)?;
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let Some(own) = dir.read(file)? else { continue };
        if !own.trim().is_empty() {
            continue;
        }
        let from = parent.read(file)?.unwrap_or_default();
        match from.trim() {
            "" => return Err(CgroupError::EmptyCpuset { file: parent.file(file) }),
            value => dir.write(file, value)?,
        }
    }
    Ok(())
}
