//! Groups in temporary directories, which take what the kernel's would. What needs the kernel is in tests/cgroup.rs.

use std::fs;
use std::path::Path;

use super::*;
use crate::errchain::{Kind, Kinded};

/// Every v1 controller in one directory, as if mounted together.
const V1: &str = "cpu,cpuacct,cpuset,memory,devices,freezer,blkio,pids,hugetlb";
const V2: &str = "cpu cpuset io memory pids hugetlb\n";

/// A group `/a/b` that exists, with these files in it.
fn group(version: Version, files: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf, Cgroup) {
    let root = tempfile::tempdir().unwrap();
    let top = match version {
        Version::V1 => root.path().join(V1),
        Version::V2 => root.path().to_path_buf(),
    };
    fs::create_dir_all(top.join("a/b")).unwrap();
    fs::write(root.path().join("cgroup.controllers"), V2).unwrap();
    let hierarchy = Hierarchy::at(root.path(), version).unwrap();
    for (name, value) in files {
        fs::write(top.join("a/b").join(name), value).unwrap();
    }
    (root, top.join("a/b"), Cgroup::new(&hierarchy, "/a/b").unwrap())
}

/// Sets limits in a group with `files`: what they hold then, or the kind of the error and a part of its text.
fn check_set(version: Version, limits: Resources, files: &[(&str, &str)], want: Result<&[(&str, &str)], (Kind, &str)>) {
    let (_root, dir, group) = group(version, files);
    match (group.set(&limits), want) {
        (Ok(()), Ok(want)) => {
            for (name, value) in want {
                assert_eq!(fs::read_to_string(dir.join(name)).unwrap(), *value, "{name} after {limits:?}");
            }
        }
        (Err(error), Err((kind, text))) => {
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
        (result, want) => panic!("{limits:?}: {result:?}, not {want:?}"),
    }
}

#[test]
fn limits_reach_the_files_of_v1() {
    let check = |limits, files: &[(&str, &str)], want: Result<&[(&str, &str)], (Kind, &str)>| check_set(Version::V1, limits, files, want);
    let none = Resources::default;
    check(none(), &[], Ok(&[]));
    check(Resources { cpu_shares: Some(1), ..none() }, &[("cpu.shares", "1024")], Ok(&[("cpu.shares", "2")]));
    check(Resources { cpu_shares: Some(512), ..none() }, &[], Err((Kind::Unimplemented, "cpu.shares")));
    check(
        Resources { cpu_quota: Some(-1), cpu_period: Some(20_000), ..none() },
        &[("cpu.cfs_quota_us", ""), ("cpu.cfs_period_us", "")],
        Ok(&[("cpu.cfs_quota_us", "-1"), ("cpu.cfs_period_us", "20000")]),
    );
    let memory = [("memory.limit_in_bytes", "9223372036854771712"), ("memory.memsw.limit_in_bytes", "9223372036854771712")];
    check(
        Resources { memory_limit: Some(4096), memory_swap: Some(8192), ..none() },
        &memory,
        Ok(&[("memory.limit_in_bytes", "4096"), ("memory.memsw.limit_in_bytes", "8192")]),
    );
    check(
        Resources { memory_limit: Some(-1), ..none() },
        &[("memory.limit_in_bytes", "4096"), ("memory.memsw.limit_in_bytes", "4096")],
        Ok(&[("memory.limit_in_bytes", "-1"), ("memory.memsw.limit_in_bytes", "-1")]),
    );
    for (swap, fits) in [(4096, true), (-1, true), (0, true), (8192, false)] {
        let want: Result<&[(&str, &str)], _> =
            if fits { Ok(&[("memory.limit_in_bytes", "4096")]) } else { Err((Kind::Unimplemented, "memory.memsw")) };
        check(Resources { memory_limit: Some(4096), memory_swap: Some(swap), ..none() }, &memory[..1], want);
    }
    check(Resources { pids_limit: Some(-1), ..none() }, &[("pids.max", "5")], Ok(&[("pids.max", "max")]));
    check(Resources { pids_limit: Some(0), ..none() }, &[("pids.max", "5")], Ok(&[("pids.max", "5")]));
    check(
        Resources { cpuset_cpus: "0-1,3".into(), ..none() },
        &[("cpuset.cpus", ""), ("cpuset.mems", "0")],
        Ok(&[("cpuset.cpus", "0-1,3"), ("cpuset.mems", "0")]),
    );
    check(
        Resources { hugepages: vec![("2MB".into(), 0)], ..none() },
        &[("hugetlb.2MB.limit_in_bytes", "")],
        Ok(&[("hugetlb.2MB.limit_in_bytes", "0")]),
    );
    check(Resources { hugepages: vec![("../2MB".into(), 0)], ..none() }, &[], Err((Kind::InvalidArgument, "huge page size")));
    check(
        Resources { unified: vec![("memory.high".into(), "1".into())], pids_limit: Some(1), ..none() },
        &[("pids.max", "5")],
        Err((Kind::InvalidArgument, "memory.high")),
    );
}

#[test]
fn an_update_is_all_or_nothing() {
    let check = |version, files: &[(&str, &str)], limits: Resources| {
        let (_root, dir, group) = group(version, files);
        let error = group.update(&limits).unwrap_err();
        for (name, value) in files {
            assert_eq!(fs::read_to_string(dir.join(name)).unwrap(), *value, "{name} after {error}");
        }
    };
    // The last to be set has no file.
    let limits = Resources { cpu_shares: Some(512), cpu_quota: Some(5000), memory_limit: Some(1 << 20), pids_limit: Some(5), ..Resources::default() };
    check(
        Version::V1,
        &[
            ("cpu.shares", "1024"),
            ("cpu.cfs_quota_us", "-1"),
            ("cpu.cfs_period_us", "100000"),
            ("memory.limit_in_bytes", "2097152"),
            ("memory.memsw.limit_in_bytes", "4194304"),
        ],
        limits.clone(),
    );
    check(Version::V2, &[("cpu.weight", "100"), ("cpu.max", "max 100000"), ("memory.max", "2097152")], limits);
    let used =
        [("cpu.shares", "1024"), ("memory.limit_in_bytes", "4096"), ("memory.usage_in_bytes", "4000"), ("memory.stat", "total_inactive_file 9")];
    check(Version::V1, &used, Resources { cpu_shares: Some(2), memory_limit: Some(2048), ..Resources::default() });
    let unified = Resources { unified: vec![("memory.max".into(), "2048".into())], ..Resources::default() };
    check(Version::V2, &[("memory.max", "4096"), ("memory.current", "4000"), ("memory.stat", "")], unified);
}

#[test]
fn limits_reach_the_files_of_v2() {
    let check = |limits, files: &[(&str, &str)], want: Result<&[(&str, &str)], (Kind, &str)>| check_set(Version::V2, limits, files, want);
    let none = Resources::default;
    check(none(), &[], Ok(&[]));
    check(
        Resources { cpu_shares: Some(1024), cpu_quota: Some(50_000), cpu_period: Some(100_000), ..none() },
        &[("cpu.weight", ""), ("cpu.max", "max 100000")],
        Ok(&[("cpu.weight", "100"), ("cpu.max", "50000 100000")]),
    );
    check(Resources { cpu_period: Some(5000), ..none() }, &[("cpu.max", "7000 100000\n")], Ok(&[("cpu.max", "7000 5000")]));
    check(
        Resources { memory_limit: Some(4096), memory_swap: Some(8192), ..none() },
        &[("memory.max", "max"), ("memory.swap.max", "max")],
        Ok(&[("memory.max", "4096"), ("memory.swap.max", "4096")]),
    );
    for (swap, fits) in [(4096, true), (-1, true), (0, true), (8192, false)] {
        let want: Result<&[(&str, &str)], _> = if fits { Ok(&[("memory.max", "4096")]) } else { Err((Kind::Unimplemented, "memory.swap.max")) };
        check(Resources { memory_limit: Some(4096), memory_swap: Some(swap), ..none() }, &[("memory.max", "max")], want);
    }
    check(
        Resources { memory_limit: Some(4096), memory_swap: Some(4095), ..none() },
        &[("memory.max", "max"), ("memory.swap.max", "max")],
        Err((Kind::InvalidArgument, "4095")),
    );
    let used = [("memory.max", "max"), ("memory.current", "10000"), ("memory.stat", "anon 7000\ninactive_file 2000\nactive_file 1000\n")];
    check(Resources { memory_limit: Some(7000), ..none() }, &used, Ok(&[("memory.max", "7000")]));
    check(Resources { memory_limit: Some(6999), ..none() }, &used, Err((Kind::ResourceExhausted, "7000 bytes are in use")));
    check(Resources { memory_limit: Some(-1), ..none() }, &used, Ok(&[("memory.max", "max")]));
    check(Resources { pids_limit: Some(7), ..none() }, &[("pids.max", "")], Ok(&[("pids.max", "7")]));
    check(
        Resources { hugepages: vec![("1GB".into(), 1 << 30)], ..none() },
        &[("hugetlb.1GB.max", ""), ("hugetlb.1GB.rsvd.max", "")],
        Ok(&[("hugetlb.1GB.max", "1073741824"), ("hugetlb.1GB.rsvd.max", "1073741824")]),
    );
    check(
        Resources { unified: vec![("memory.high".into(), "5".into()), ("memory.swap.max".into(), "0".into())], ..none() },
        &[("memory.high", "")],
        Ok(&[("memory.high", "5")]),
    );
    check(Resources { unified: vec![("memory.low".into(), "5".into())], ..none() }, &[], Err((Kind::Unimplemented, "memory.low")));
    for key in ["cgroup.procs", "../a.b", "cgroup.kill"] {
        check(Resources { unified: vec![(key.into(), "1".into())], ..none() }, &[(key, "")], Err((Kind::InvalidArgument, key)));
    }
}

#[test]
fn only_plain_paths_name_groups() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("cgroup.controllers"), "").unwrap();
    let hierarchy = Hierarchy::at(root.path(), Version::V2).unwrap();
    let long = format!("/{}", "a".repeat(256));
    for (path, fits) in [
        ("/kubepods/burstable/podX/ID", true),
        ("/a b/ä", true),
        (&long[..256], true),
        (&long, false),
        ("", false),
        ("/", false),
        ("a", false),
        ("/a/", false),
        ("//a", false),
        ("/a//b", false),
        ("/a/../b", false),
        ("/./a", false),
        ("/a\n", false),
        ("/a\0b", false),
    ] {
        assert_eq!(Cgroup::new(&hierarchy, path).is_ok(), fits, "{path:?}");
    }
}

#[test]
fn parents_are_made_named_and_removed() {
    for version in [Version::V1, Version::V2] {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "").unwrap();
        for label in ["memory/pods", "systemd"] {
            fs::create_dir_all(root.path().join(label)).unwrap();
        }
        let hierarchy = Hierarchy::at(root.path(), version).unwrap();
        let group = Cgroup::new(&hierarchy, "/pods/pod/ID").unwrap();
        assert!(!group.exists());
        let parents = group.create().unwrap();
        let want: &[&str] = match version {
            // memory/pods was there.
            Version::V1 => &["memory:/pods/pod", "systemd:/pods", "systemd:/pods/pod"],
            Version::V2 => &[":/pods", ":/pods/pod"],
        };
        assert_eq!(parents, want);
        assert!(group.exists());
        // In use: stays.
        remove_parents(&hierarchy, &parents).unwrap();
        assert!(group.exists());
        group.remove(Duration::ZERO).unwrap();
        group.remove(Duration::ZERO).unwrap();
        remove_parents(&hierarchy, &parents).unwrap();
        remove_parents(&hierarchy, &parents).unwrap();
        assert!(!root.path().join("systemd/pods").exists() && !root.path().join("pods").exists());
        assert!(root.path().join("memory/pods").exists());
        assert!(remove_parents(&hierarchy, &["memory:/../x".to_string()]).is_err());
    }
}

#[test]
fn v2_enables_what_parents_lack() {
    let (root, _, group) = group(Version::V2, &[]);
    let file = |dir: &str, name: &str| root.path().join(dir).join(name);
    fs::remove_dir(root.path().join("a/b")).unwrap();
    fs::write(file("", "cgroup.subtree_control"), "cpu cpuset io memory pids hugetlb misc\n").unwrap();
    fs::write(file("a", "cgroup.subtree_control"), "memory rdma\n").unwrap();
    group.create().unwrap();
    let control = |dir| fs::read_to_string(file(dir, "cgroup.subtree_control")).unwrap();
    assert_eq!(control(""), "cpu cpuset io memory pids hugetlb misc\n");
    assert_eq!(control("a"), "+cpu +pids +cpuset +io +hugetlb");
}

#[test]
fn a_process_is_found_where_it_is() {
    let root = tempfile::tempdir().unwrap();
    for label in ["cpu,cpuacct", "memory", "pids", "unified"] {
        fs::create_dir(root.path().join(label)).unwrap();
    }
    let hierarchy = Hierarchy::at(root.path(), Version::V1).unwrap();
    let group = Cgroup::of_text(&hierarchy, "9:cpu,cpuacct:/a/x\n8:memory:/a/y\n3:pids:/\n1:name=systemd:/z\n0::/a/u (deleted)\n").unwrap();
    assert_eq!(group.path(), "/a/y");
    let dirs: Vec<PathBuf> = group.dirs().into_iter().map(|(_, dir)| dir.strip_prefix(root.path()).unwrap().to_path_buf()).collect();
    assert_eq!(dirs, [Path::new("unified/a/u"), Path::new("cpu,cpuacct/a/x"), Path::new("memory/a/y")]);
    for text in ["", "8:memory:/\n", "8:memory:/../x\n", "0:\n"] {
        assert!(Cgroup::of_text(&hierarchy, text).is_err(), "{text:?}");
    }
}

#[test]
fn statistics_of_v2() {
    let files = [
        ("cgroup.procs", "12\n13\n0\n"),
        ("cpu.stat", "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 4\nnr_throttled 2\nthrottled_usec 7\n"),
        ("memory.current", "10000\n"),
        ("memory.max", "20000\n"),
        (
            "memory.stat",
            "anon 5000\nfile 4000\nkernel 300\nfile_mapped 10\ninactive_file 2500\nworkingset_refault_anon 9\npgfault 77\npgmajfault 3\n",
        ),
        ("memory.events", "low 0\nhigh 0\nmax 5\noom 1\noom_kill 2\noom_group_kill 1\n"),
        ("memory.swap.current", "0\n"),
        ("memory.swap.max", "max\n"),
        ("pids.current", "3\n"),
        ("pids.max", "max\n"),
        ("io.stat", "8:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n253:1 rbytes=1\n"),
        ("cpu.pressure", "some avg10=1.50 avg60=0.20 avg300=0.03 total=42\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"),
        ("io.pressure", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n"),
    ];
    let (_root, _, group) = group(Version::V2, &files);
    let stats = group.stats().unwrap();
    assert_eq!(stats.processes.len(), 2);
    let cpu = CpuStats { usage_ns: 1_500_000, user_ns: 1_000_000, system_ns: 500_000, periods: 4, throttled_periods: 2, throttled_ns: 7000 };
    assert_eq!(stats.cpu, Some(cpu));
    let memory = MemoryStats {
        usage: 10_000,
        peak: None,
        working_set: 7500,
        rss: 5000,
        cache: 4000,
        mapped_file: 10,
        kernel: Some(300),
        page_faults: 77,
        major_page_faults: 3,
        limit_hits: 5,
        oom_kills: 2,
        limit: Some(20_000),
        available: Some(12_500),
    };
    assert_eq!(stats.memory, Some(memory));
    assert_eq!(stats.swap, Some(SwapStats { usage: 0, limit: None }));
    assert_eq!(stats.pids, Some(PidsStats { current: 3, limit: None }));
    let first = IoStats { major: 8, minor: 0, read_bytes: 4096, write_bytes: 8192, reads: 1, writes: 2 };
    assert_eq!(stats.io, [first, IoStats { major: 253, minor: 1, read_bytes: 1, ..IoStats::default() }]);
    assert_eq!(stats.cpu_pressure.unwrap().some, PressureShare { avg10: 1.5, avg60: 0.2, avg300: 0.03, total_us: 42 });
    assert_eq!(stats.io_pressure.unwrap().full, PressureShare::default());
    assert_eq!(stats.memory_pressure, None);
    assert_eq!(group.oom_kills().unwrap(), 2);
}

#[test]
fn statistics_of_v1() {
    let files = [
        ("cgroup.procs", "12\n"),
        ("cpuacct.usage", "1500\n"),
        ("cpuacct.usage_user", "1000\n"),
        ("cpuacct.usage_sys", "500\n"),
        ("cpu.stat", "nr_periods 4\nnr_throttled 2\nthrottled_time 7\n"),
        ("memory.usage_in_bytes", "1000\n"),
        ("memory.limit_in_bytes", "9223372036854771712\n"),
        ("memory.memsw.limit_in_bytes", "9223372036854771712\n"),
        ("memory.stat", "inactive_file 1\ntotal_rss 400\ntotal_cache 1100\ntotal_inactive_file 1100\ntotal_swap 8\ntotal_pgfault 5\n"),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
        ("pids.current", "1\n"),
        ("pids.max", "10\n"),
        ("blkio.throttle.io_service_bytes_recursive", "8:0 Read 10\n8:0 Write 20\n8:0 Total 30\nTotal 30\n"),
        ("blkio.throttle.io_serviced_recursive", "8:0 Read 1\n8:0 Write 2\n"),
    ];
    let (_root, dir, group) = group(Version::V1, &files);
    let stats = group.stats().unwrap();
    let cpu = CpuStats { usage_ns: 1500, user_ns: 1000, system_ns: 500, periods: 4, throttled_periods: 2, throttled_ns: 7 };
    assert_eq!(stats.cpu, Some(cpu));
    let memory = stats.memory.unwrap();
    // Cache that is being dropped while it is read can exceed the usage.
    assert_eq!((memory.usage, memory.working_set, memory.rss, memory.limit, memory.available), (1000, 0, 400, None, None));
    assert_eq!(stats.swap, Some(SwapStats { usage: 8, limit: None }));
    assert_eq!(stats.pids, Some(PidsStats { current: 1, limit: Some(10) }));
    assert_eq!(stats.io, [IoStats { major: 8, minor: 0, read_bytes: 10, write_bytes: 20, reads: 1, writes: 2 }]);
    assert_eq!(stats.cpu_pressure, None);

    // Each group counts its own.
    fs::create_dir(dir.join("sub")).unwrap();
    fs::write(dir.join("sub/memory.oom_control"), "oom_kill 4\n").unwrap();
    assert_eq!(group.oom_kills().unwrap(), 7);
}

#[test]
fn what_is_gone_is_not_found_or_done() {
    let (_root, dir, group) = group(Version::V2, &[]);
    fs::remove_dir(dir).unwrap();
    for error in [group.stats().unwrap_err(), group.oom_kills().unwrap_err(), group.enter(0).unwrap_err()] {
        assert_eq!(error.kind(), Kind::NotFound, "{error}");
    }
    assert_eq!(group.procs(true).unwrap(), [] as [u32; 0]);
    assert!(group.is_empty().unwrap() && group.open_dir().is_none());
    group.kill(Duration::ZERO).unwrap();
    group.remove(Duration::ZERO).unwrap();
}

#[test]
fn a_group_in_use_is_not_taken_over() {
    for version in [Version::V1, Version::V2] {
        let (_root, _, group) = group(version, &[("cgroup.procs", "12\n")]);
        assert_eq!(group.create().unwrap_err().kind(), Kind::AlreadyExists);
    }
}
