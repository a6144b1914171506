//! A control group of cgroup v2: one directory (Documentation/admin-guide/cgroup-v2.rst in the kernel's tree).

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::dir::{self, Dir};
use super::entrance::{Door, Entrance};
use super::stats::field;
use super::{CgroupError, convert, devices};
use crate::plan::{DeviceRule, Resources};
use crate::sys::bpf;

/// What a container's limits and statistics need, with whether a create fails without it.
const WANTED: [(&str, bool); 7] =
    [("cpu", true), ("memory", true), ("pids", true), ("cpuset", false), ("io", false), ("hugetlb", false), ("misc", false)];

/// The memory limit.
const MEMORY: &str = "memory.max";

/// The name under which our device filters are known again.
const FILTER: &str = "copepod_dev";

/// A group.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) root: PathBuf,
    /// Those of the hierarchy, whether or not they are enabled for this group.
    pub(super) controllers: Vec<String>,
    pub(super) dir: PathBuf,
}

impl Group {
    /// Makes the group. Gives the parents it made, as `:/path`, outermost first.
    pub(super) fn create(&self) -> Result<Vec<String>, CgroupError> {
        let mut made = dir::make_below(&self.root, &self.dir)?;
        if made.is_empty() {
            super::take_over(&self.dir)?;
            made.push(self.dir.clone());
        }
        if let Err(error) = self.hand_down() {
            for dir in made.iter().rev() {
                let _ = dir::remove(dir);
            }
            return Err(error);
        }
        made.pop();
        Ok(made.iter().filter_map(|dir| super::name_parent("", &self.root, dir)).collect())
    }

    /// Enables the controllers that this group needs in those above it, where they are missing. Takes nothing away.
    pub(super) fn hand_down(&self) -> Result<(), CgroupError> {
        let wanted: Vec<(&str, bool)> = WANTED.into_iter().filter(|(name, _)| self.controllers.iter().any(|has| has == name)).collect();
        let lacks = |text: &str| -> Vec<(&str, bool)> {
            wanted.iter().copied().filter(|(name, _)| text.split_whitespace().all(|has| has != *name)).collect()
        };
        if lacks(&Dir::open(&self.dir)?.read("cgroup.controllers")?.unwrap_or_default()).is_empty() {
            return Ok(());
        }
        let mut above: Vec<&Path> = self.dir.ancestors().skip(1).take_while(|path| path.starts_with(&self.root)).collect();
        above.reverse();
        for path in above {
            let dir = Dir::open(path)?;
            let Some(enabled) = dir.read("cgroup.subtree_control")? else { continue };
            let missing = lacks(&enabled);
            let all: Vec<String> = missing.iter().map(|(name, _)| format!("+{name}")).collect();
            if all.is_empty() || dir.try_write("cgroup.subtree_control", &all.join(" ")).is_ok() {
                continue;
            }
            // One that can't be had (the parent lacks it, real-time processes) takes all down with it: each by itself.
            for (name, needed) in missing {
                match dir.try_write("cgroup.subtree_control", &format!("+{name}")) {
                    Err(error) if needed => return Err(error),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    pub(super) fn set(&self, limits: &Resources) -> Result<(), CgroupError> {
        limits.unified.iter().try_for_each(|(key, _)| convert::check_unified(key))?;
        limits.hugepages.iter().try_for_each(|(size, _)| convert::check_page_size(size))?;
        let swap = convert::swap_max(limits.memory_swap, limits.memory_limit)?;

        let dir = Dir::open(&self.dir)?;
        let unified = limits.unified.iter().find(|(key, _)| key == MEMORY).and_then(|(_, value)| value.trim().parse().ok());
        for limit in [limits.memory_limit.filter(|&limit| limit != 0), unified].into_iter().flatten() {
            check_shrink(&dir, limit)?;
        }
        if let Some(weight) = limits.cpu_shares.and_then(convert::shares_to_weight) {
            dir.write("cpu.weight", &weight.to_string())?;
        }
        let now = || Ok(dir.read("cpu.max")?.unwrap_or_default());
        if let Some(max) = convert::cpu_max(limits.cpu_quota, limits.cpu_period, now)? {
            dir.write("cpu.max", &max)?;
        }
        if let Some(swap) = swap {
            write_swap(&dir, &swap)?;
        }
        if let Some(limit) = limits.memory_limit.filter(|&limit| limit != 0) {
            dir.write(MEMORY, &convert::limit_v2(limit))?;
        }
        if let Some(limit) = limits.pids_limit.filter(|&limit| limit != 0) {
            dir.write("pids.max", &convert::limit_v2(limit))?;
        }
        for (file, value) in [("cpuset.cpus", &limits.cpuset_cpus), ("cpuset.mems", &limits.cpuset_mems)] {
            if !value.is_empty() {
                dir.write(file, value)?;
            }
        }
        // Kubernetes sets a limit for every size even where there is no controller.
        if self.controllers.iter().any(|name| name == "hugetlb") {
            set_hugepages(&dir, limits)?;
        }
        for (key, value) in &limits.unified {
            // Files such as io.max take one line per write.
            for line in value.lines().filter(|line| !line.is_empty()) {
                if key == "memory.swap.max" { write_swap(&dir, line)? } else { dir.write(key, line)? }
            }
        }
        Ok(())
    }

    /// The files that [`set`](Self::set) may write for these limits, for an update to restore.
    pub(super) fn files(&self, limits: &Resources) -> Result<Vec<(Dir, String)>, CgroupError> {
        let mut names: Vec<String> = Vec::new();
        let mut add = |given: bool, file: &str| names.extend(given.then(|| file.to_string()));
        add(limits.cpu_shares.is_some(), "cpu.weight");
        add(limits.cpu_quota.is_some() || limits.cpu_period.is_some(), "cpu.max");
        add(limits.memory_limit.is_some(), MEMORY);
        add(limits.memory_limit.is_some() || limits.memory_swap.is_some(), "memory.swap.max");
        add(limits.pids_limit.is_some(), "pids.max");
        add(!limits.cpuset_cpus.is_empty(), "cpuset.cpus");
        add(!limits.cpuset_mems.is_empty(), "cpuset.mems");
        for (size, _) in &limits.hugepages {
            add(true, &format!("hugetlb.{size}.max"));
            add(true, &format!("hugetlb.{size}.rsvd.max"));
        }
        limits.unified.iter().for_each(|(key, _)| add(true, key));
        names.into_iter().map(|name| Ok((Dir::open(&self.dir)?, name))).collect()
    }

    pub(super) fn set_devices(&self, rules: &[DeviceRule]) -> Result<(), CgroupError> {
        let failed = |step| {
            let path = self.dir.clone();
            move |source| CgroupError::DeviceFilter { step, path, source }
        };
        let program = if rules.is_empty() { None } else { Some(devices::program(rules)?) };
        let dir = Dir::open(&self.dir)?;
        let mut old = Vec::new();
        for id in bpf::device_filters(dir.fd().as_fd()).map_err(failed("find"))? {
            let filter = bpf::program(id).map_err(failed("find"))?;
            if bpf::program_name(filter.as_fd()).map_err(failed("find"))? == FILTER {
                old.push(filter);
            }
        }
        // The new one first: in between both must allow, and at no time is there none.
        if let Some(program) = program {
            let filter = bpf::load_device_filter(FILTER, &program).map_err(failed("load"))?;
            bpf::attach_device_filter(dir.fd().as_fd(), filter.as_fd()).map_err(failed("attach"))?;
        }
        old.iter().try_for_each(|filter| bpf::detach_device_filter(dir.fd().as_fd(), filter.as_fd()).map_err(failed("detach")))
    }

    pub(super) fn entrance(&self) -> Result<Entrance, CgroupError> {
        let dir = Dir::open(&self.dir)?;
        let door = Door { file: dir.open_write("cgroup.procs")?, path: self.dir.clone() };
        Ok(Entrance { doors: Vec::new(), unified: Some((door, dir.into_fd())) })
    }

    pub(super) fn procs(&self, recursive: bool) -> Result<Vec<u32>, CgroupError> {
        let mut pids = Vec::new();
        if let Some(dir) = Dir::find(&self.dir)? {
            if recursive { dir.procs_below(&mut pids)? } else { dir.procs(&mut pids)? }
        }
        pids.sort_unstable();
        Ok(pids)
    }

    /// Kills all of it with one write (Linux 5.14), which no fork outruns, and waits until nothing is left. `false`: something is.
    pub(super) fn kill(&self, within: Duration) -> Result<bool, CgroupError> {
        let Some(dir) = Dir::find(&self.dir)? else { return Ok(true) };
        let deadline = Instant::now() + within;
        // Nothing to kill is the rule after an exit.
        if wait_for(&dir, "populated 0", Instant::now())? {
            return Ok(true);
        }
        loop {
            dir.write("cgroup.kill", "1")?;
            // Again now and then: a process may have been moved in meanwhile.
            let until = deadline.min(Instant::now() + Duration::from_millis(250));
            if wait_for(&dir, "populated 0", until)? {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
        }
    }

    pub(super) fn freeze(&self, within: Duration) -> Result<bool, CgroupError> {
        let dir = Dir::open(&self.dir)?;
        dir.write("cgroup.freeze", "1")?;
        wait_for(&dir, "frozen 1", Instant::now() + within)
    }

    pub(super) fn thaw(&self) -> Result<(), CgroupError> {
        Dir::open(&self.dir)?.write("cgroup.freeze", "0")
    }

    /// Nothing lives in it or below.
    pub(super) fn is_empty(&self) -> Result<bool, CgroupError> {
        match Dir::find(&self.dir)? {
            Some(dir) => wait_for(&dir, "populated 0", Instant::now()),
            None => Ok(true),
        }
    }

    pub(super) fn open_dir(&self) -> Result<OwnedFd, CgroupError> {
        Dir::open(&self.dir).map(Dir::into_fd)
    }
}

/// Sets `memory.swap.max`. A kernel without swap accounting has no such file, and nothing to limit: unlimited is what it has,
/// and none is what it can't go beyond.
fn write_swap(dir: &Dir, value: &str) -> Result<(), CgroupError> {
    const FILE: &str = "memory.swap.max";
    match dir.try_write(FILE, value)? {
        false if !matches!(value, "max" | "0") => Err(CgroupError::Unsupported { file: dir.file(FILE), value: value.to_string() }),
        _ => Ok(()),
    }
}

/// v2 takes any `memory.max` and kills what doesn't fit. v1 refused what it could not reclaim, and so do we.
fn check_shrink(dir: &Dir, limit: i64) -> Result<(), CgroupError> {
    let current = dir.number("memory.current")?.flatten().unwrap_or(0);
    let cache = || {
        let stat = dir.read("memory.stat")?.unwrap_or_default();
        Ok(field(&stat, "inactive_file").unwrap_or(0) + field(&stat, "active_file").unwrap_or(0))
    };
    convert::check_shrink(|| dir.file(MEMORY), limit, current, cache)
}

/// Limits huge pages, in a group that has the controller.
pub(super) fn set_hugepages(dir: &Dir, limits: &Resources) -> Result<(), CgroupError> {
    limits.hugepages.iter().try_for_each(|(size, limit)| {
        dir.write(&format!("hugetlb.{size}.max"), &limit.to_string())?;
        // Reservations are limited apart since Linux 5.7.
        dir.try_write(&format!("hugetlb.{size}.rsvd.max"), &limit.to_string()).map(drop)
    })
}

/// Waits until `cgroup.events` has a line. A group that is gone has nothing in it, and is as frozen as it will be.
fn wait_for(dir: &Dir, line: &str, deadline: Instant) -> Result<bool, CgroupError> {
    const FILE: &str = "cgroup.events";
    let failed = |errno: rustix::io::Errno| CgroupError::Read { file: dir.file(FILE), source: errno.into() };
    let Some(file) = dir.open_file(FILE)? else { return Ok(true) };
    let mut bytes = [0u8; 256];
    let mut pause = Duration::from_micros(100);
    loop {
        let n = match rustix::io::retry_on_intr(|| rustix::io::pread(&file, &mut bytes, 0)) {
            Ok(n) => n,
            Err(rustix::io::Errno::NODEV | rustix::io::Errno::NOENT) => return Ok(true),
            Err(errno) => return Err(failed(errno)),
        };
        if String::from_utf8_lossy(&bytes[..n]).lines().any(|have| have == line) {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        // A change since the last read wakes with POLLPRI; but the kernel lets 10 ms pass between two such, and what was
        // killed is mostly gone in less than one.
        let timeout = rustix::event::Timespec::try_from(left.min(pause)).ok();
        pause = (pause * 2).min(Duration::from_millis(100));
        match rustix::event::poll(&mut [PollFd::new(&file, PollFlags::PRI)], timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
}
