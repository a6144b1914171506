//! What this node has: cgroup v1 (one hierarchy per controller or group of controllers, systemd's named one, and the hybrid's
//! v2 without controllers), or v2 alone.

use std::io;
use std::path::{Path, PathBuf};

use super::CgroupError;

/// Where hierarchies are mounted by convention.
const ROOT: &str = "/sys/fs/cgroup";
/// Where a v1 node's mounts are learnt.
const MOUNTINFO: &str = "/proc/self/mountinfo";
/// Huge page sizes of this kernel, as `hugepages-2048kB`.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages";

/// Every v1 controller there has been, to tell them from other mount options.
const V1_CONTROLLERS: [&str; 15] = [
    "cpu",
    "cpuacct",
    "cpuset",
    "memory",
    "devices",
    "freezer",
    "blkio",
    "pids",
    "hugetlb",
    "net_cls",
    "net_prio",
    "perf_event",
    "rdma",
    "misc",
    "debug",
];

/// The two interfaces of the kernel (cgroups(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Also the hybrid, in which v2 is mounted without controllers.
    V1,
    /// Unified.
    V2,
}

/// The hierarchies of this node.
#[derive(Debug, Clone)]
pub struct Hierarchy {
    pub(super) kind: Kind,
    /// As in file names: `2MB`.
    pub(super) page_sizes: Vec<String>,
}

#[derive(Debug, Clone)]
pub(super) enum Kind {
    V1(Vec<Mount>),
    V2 { root: PathBuf, controllers: Vec<String> },
}

/// One mounted hierarchy of a v1 node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// As /proc/PID/cgroup names it: `cpu,cpuacct`, `name=systemd`; empty: v2.
    pub(super) names: String,
    pub(super) root: PathBuf,
}

impl Mount {
    pub(super) fn has(&self, controller: &str) -> bool {
        self.names.split(',').any(|name| name == controller)
    }

    /// The name of its directory by convention: `cpu,cpuacct`, `systemd`, `unified`.
    pub(super) fn label(&self) -> &str {
        match self.names.as_str() {
            "" => "unified",
            names => names.strip_prefix("name=").unwrap_or(names),
        }
    }
}

impl Hierarchy {
    /// Finds what this node has. v2 wins where it is mounted at /sys/fs/cgroup itself.
    pub fn detect() -> Result<Self, CgroupError> {
        const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
        if rustix::fs::statfs(ROOT).is_ok_and(|fs| fs.f_type as u64 == CGROUP2_SUPER_MAGIC) {
            return Self::at(Path::new(ROOT), Version::V2);
        }
        let mounts = std::fs::read(MOUNTINFO).map_err(|source| CgroupError::Detect { path: MOUNTINFO.into(), source })?;
        let mounts = parse_mounts(&String::from_utf8_lossy(&mounts));
        if mounts.iter().any(|mount| !mount.names.is_empty() && !mount.names.starts_with("name=")) {
            return Ok(Self { kind: Kind::V1(mounts), page_sizes: page_sizes() });
        }
        match mounts.into_iter().find(|mount| mount.names.is_empty()) {
            Some(unified) => Self::at(&unified.root, Version::V2),
            None => Err(CgroupError::NoHierarchy),
        }
    }

    /// The hierarchies at `root` instead of what is mounted. v2: `root` is the mount. v1: each directory in `root` is one,
    /// named as by convention: `cpu,cpuacct`, `memory`, …, `systemd`, `unified`; symbolic links are passed over.
    pub fn at(root: &Path, version: Version) -> Result<Self, CgroupError> {
        let detect = |path: &Path| {
            let path = path.to_path_buf();
            move |source: io::Error| CgroupError::Detect { path, source }
        };
        let kind = match version {
            Version::V2 => {
                let file = root.join("cgroup.controllers");
                let controllers = std::fs::read_to_string(&file).map_err(detect(&file))?;
                Kind::V2 { root: root.to_path_buf(), controllers: controllers.split_whitespace().map(str::to_string).collect() }
            }
            Version::V1 => {
                let mut mounts = Vec::new();
                for entry in std::fs::read_dir(root).map_err(detect(root))? {
                    let entry = entry.map_err(detect(root))?;
                    let label = entry.file_name().to_string_lossy().into_owned();
                    let names = match label.as_str() {
                        "unified" => String::new(),
                        "systemd" => "name=systemd".to_string(),
                        _ => label,
                    };
                    if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                        mounts.push(Mount { names, root: entry.path() });
                    }
                }
                mounts.sort_by(|a, b| a.names.cmp(&b.names));
                Kind::V1(mounts)
            }
        };
        Ok(Self { kind, page_sizes: page_sizes() })
    }

    /// cgroup v2 alone; else v1 or the hybrid.
    pub fn is_v2(&self) -> bool {
        matches!(self.kind, Kind::V2 { .. })
    }

    /// The names of the controllers, as the version has them (`io` is v2's name for `blkio`).
    pub fn controllers(&self) -> Vec<&str> {
        match &self.kind {
            Kind::V2 { controllers, .. } => controllers.iter().map(String::as_str).collect(),
            Kind::V1(mounts) => {
                mounts.iter().flat_map(|m| m.names.split(',')).filter(|name| !name.is_empty() && !name.starts_with("name=")).collect()
            }
        }
    }

    /// Every mounted hierarchy: the name of its directory in /sys/fs/cgroup by convention (`cpu,cpuacct`, `systemd`, `unified`;
    /// empty for v2 alone), and where it is mounted.
    pub fn mounts(&self) -> Vec<(&str, &Path)> {
        match &self.kind {
            Kind::V2 { root, .. } => vec![("", root.as_path())],
            Kind::V1(mounts) => mounts.iter().map(|mount| (mount.label(), mount.root.as_path())).collect(),
        }
    }
}

/// The hierarchies in the text of a mountinfo (proc_pid_mountinfo(5)), each once; one at /sys/fs/cgroup/… is preferred to others.
fn parse_mounts(text: &str) -> Vec<Mount> {
    let mut mounts: Vec<Mount> = Vec::new();
    for line in text.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (Some(root), Some(kind), Some(options)) = (left.split(' ').nth(4), right.split(' ').next(), right.split(' ').nth(2)) else { continue };
        let names = match kind {
            "cgroup2" => String::new(),
            "cgroup" => {
                let named = |option: &&str| V1_CONTROLLERS.contains(option) || *option == "name=systemd";
                let names: Vec<&str> = options.split(',').filter(named).collect();
                if names.is_empty() {
                    continue;
                }
                names.join(",")
            }
            _ => continue,
        };
        let root = unescape(root);
        match mounts.iter_mut().find(|mount| mount.names == names) {
            Some(known) if !known.root.starts_with(ROOT) && root.starts_with(ROOT) => known.root = root,
            Some(_) => {}
            None => mounts.push(Mount { names, root }),
        }
    }
    mounts
}

/// Undoes mountinfo's octal escapes.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let code = text.get(i + 1..i + 4).filter(|_| bytes[i] == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(code.unwrap_or(bytes[i]));
        i += if code.is_some() { 4 } else { 1 };
    }
    std::ffi::OsString::from_vec(out).into()
}

/// The kernel's huge page sizes, as cgroup files name them.
fn page_sizes() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(HUGE_PAGES) else { return Vec::new() };
    let mut kilobytes: Vec<u64> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()).collect();
    kilobytes.sort_unstable();
    kilobytes.into_iter().map(page_size).collect()
}

/// `2048` as `2MB`: the kernel's own way to name sizes (mm/hugetlb_cgroup.c, mem_fmt).
fn page_size(kilobytes: u64) -> String {
    match kilobytes {
        0..1024 => format!("{kilobytes}KB"),
        1024..1_048_576 => format!("{}MB", kilobytes / 1024),
        _ => format!("{}GB", kilobytes / 1_048_576),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found() {
        let check = |text: &str, want: &[(&str, &str)]| {
            let want: Vec<Mount> = want.iter().map(|(names, root)| Mount { names: names.to_string(), root: root.into() }).collect();
            assert_eq!(parse_mounts(text), want, "{text}");
        };
        check("30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate", &[("", "/sys/fs/cgroup")]);
        check("25 1 0:2 / / rw - ext4 /dev/vda rw\n", &[]);
        check(
            "30 25 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
             31 30 0:27 / /mnt/a\\040b rw - cgroup cgroup rw,cpu,cpuacct\n\
             32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
             33 30 0:28 / /sys/fs/cgroup/other rw - cgroup cgroup rw,name=other\n\
             34 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
             35 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
             36 30 0:29 / /mnt/again rw - cgroup2 cgroup2 rw\n",
            &[("cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct"), ("name=systemd", "/sys/fs/cgroup/systemd"), ("", "/sys/fs/cgroup/unified")],
        );
        assert_eq!(unescape("/a\\040b\\134\\9"), Path::new("/a b\\\\9"));
    }

    #[test]
    fn page_sizes_have_the_kernels_names() {
        for (kilobytes, name) in [(64, "64KB"), (2048, "2MB"), (32_768, "32MB"), (1_048_576, "1GB"), (16_777_216, "16GB")] {
            assert_eq!(page_size(kilobytes), name);
        }
    }

    #[test]
    fn hierarchies_at_a_root() {
        let root = tempfile::tempdir().unwrap();
        for name in ["cpu,cpuacct", "memory", "systemd", "unified"] {
            std::fs::create_dir(root.path().join(name)).unwrap();
        }
        std::os::unix::fs::symlink("cpu,cpuacct", root.path().join("cpu")).unwrap();
        let v1 = Hierarchy::at(root.path(), Version::V1).unwrap();
        assert!(!v1.is_v2());
        assert_eq!(v1.controllers(), ["cpu", "cpuacct", "memory"]);
        let labels: Vec<&str> = v1.mounts().into_iter().map(|(label, _)| label).collect();
        assert_eq!(labels, ["unified", "cpu,cpuacct", "memory", "systemd"]);

        assert!(Hierarchy::at(root.path(), Version::V2).is_err());
        std::fs::write(root.path().join("cgroup.controllers"), "cpu io memory\n").unwrap();
        let v2 = Hierarchy::at(root.path(), Version::V2).unwrap();
        assert!(v2.is_v2());
        assert_eq!(v2.controllers(), ["cpu", "io", "memory"]);
        assert_eq!(v2.mounts(), [("", root.path())]);
    }
}
