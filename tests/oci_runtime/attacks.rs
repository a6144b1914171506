//! What containers, images and volumes have tried on runtimes (the CVEs are named), and that it does not work here.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use copepod::errchain::Kind;
use copepod::plan::*;
use copepod::sys::process::{CloneArgs, spawn};

use super::driver::*;
use super::exec::waiting;
use super::files::all_capabilities;
use super::pod;

pub const TESTS: &[super::Test] = &[
    ("the_hosts_program_cannot_be_overwritten", the_hosts_program_cannot_be_overwritten),
    ("no_descriptor_leaks", no_descriptor_leaks),
    ("a_working_directory_cannot_be_a_descriptor", a_working_directory_cannot_be_a_descriptor),
    ("links_lead_nowhere_outside", links_lead_nowhere_outside),
    ("a_racing_writer_gets_nothing_outside", a_racing_writer_gets_nothing_outside),
    ("masked_files_are_under_the_real_null_device", masked_files_are_under_the_real_null_device),
    ("hostile_user_files", hostile_user_files),
    ("nobody_looks_into_our_processes", nobody_looks_into_our_processes),
    ("kernel_filesystems_are_never_behind_links", kernel_filesystems_are_never_behind_links),
    ("a_forged_terminal_is_refused", a_forged_terminal_is_refused),
];

/// With this argument the test's own program sits still in a container.
pub const SIT_STILL: &str = "--sit-still";

pub fn sit_still() -> ! {
    println!("sitting");
    loop {
        std::thread::sleep(Duration::from_secs(1000));
    }
}

/// CVE-2019-5736: the image has /proc/self/exe executed, which is the monitor's program on the host up to then.
fn the_hosts_program_cannot_be_overwritten(lab: &Lab) {
    let exe = std::env::current_exe().unwrap();
    let exe = if exe.is_file() { exe } else { PathBuf::from(std::env::args_os().next().unwrap()) };
    let before = std::fs::read(&exe).unwrap();
    // Our program may want its libraries: those of the host, read-only, for its own sake.
    let library_dirs = ["/lib", "/lib64", "/usr/lib"].map(PathBuf::from);
    let with_libraries = |plan: &mut ContainerPlan| {
        for dir in library_dirs.iter().filter(|dir| dir.exists()) {
            plan.mounts.push(Mount { readonly: true, ..bind(dir, dir.to_str().unwrap()) });
        }
    };
    let layer = lab.layer(|root| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::write(root.join("trap"), format!("#!/proc/self/exe {SIT_STILL}\n")).unwrap();
        std::fs::set_permissions(root.join("trap"), std::fs::Permissions::from_mode(0o755)).unwrap();
        symlink("/proc/self/exe", root.join("linked")).unwrap();
    });
    for args in [&["/proc/self/exe", SIT_STILL][..], &["/linked", SIT_STILL], &["/trap"]] {
        let mut plan = lab.plan("");
        lab.on_top(&mut plan, std::slice::from_ref(&layer));
        with_libraries(&mut plan);
        plan.process.args = args.iter().map(Into::into).collect();
        plan.process.capabilities = all_capabilities();
        let mut container = lab.create(plan).unwrap();
        container.start().unwrap();
        assert_eq!(container.line(), "sitting", "{args:?}");
        let mut attack = shell(
            "cp /proc/1/exe /copy && echo readable; echo x >/proc/1/exe; echo x >>/proc/1/exe; exec 9</proc/1/exe; echo x >/proc/self/fd/9; chmod 777 /proc/1/exe",
        );
        attack.capabilities = all_capabilities();
        let output = lab.exec(&container, ExecPlan { process: attack, timeout_ms: 0 }).unwrap().output();
        // That it can be read shows that the writing was tried on the right file.
        assert_eq!(output.stdout, "readable\n", "{args:?}: {}", output.stderr);
        assert_eq!(output.stderr.matches("Read-only file system").count() + output.stderr.matches("Text file busy").count(), 4, "{}", output.stderr);
        assert!(output.stderr.matches("Read-only file system").count() >= 3, "{}", output.stderr);
        lab.delete(container);
    }
    assert!(std::fs::read(&exe).unwrap() == before, "the program was changed");
}

/// CVE-2024-21626. Standard streams, and nothing else, in what is executed and in what waits for it.
fn no_descriptor_leaks(lab: &Lab) {
    // Some of this process's own are not close-on-exec, as a careless library's would be.
    let host_root = rustix::fs::open("/", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    rustix::io::fcntl_setfd(&host_root, rustix::io::FdFlags::empty()).unwrap();
    let mut container = lab.create(lab.plan("exec ls -l /proc/self/fd")).unwrap();
    for entry in std::fs::read_dir(format!("/proc/{}/fd", container.init.pid)).unwrap() {
        let target = std::fs::read_link(entry.unwrap().path()).unwrap();
        let target = target.to_str().unwrap();
        assert!(target == "/dev/null" || target.starts_with("pipe:") || target.starts_with("socket:"), "init has {target}");
    }
    container.start().unwrap();
    let listed = |output: &Output| -> Vec<String> {
        output
            .lines()
            .iter()
            .filter_map(|line| line.split_once(" -> ")?.0.split_whitespace().last()?.parse::<u32>().ok())
            .map(|n| n.to_string())
            .collect()
    };
    // What ls reads them through is listed without a target: it is closed by then.
    assert_eq!(listed(&container.output()), ["0", "1", "2"]);
    lab.delete(container);
    let container = waiting(lab, |_| {});
    let output = lab.exec_sh(&container, "ls -l /proc/self/fd; ls -l /proc/1/fd");
    assert_eq!(listed(&output), ["0", "1", "2", "0", "1", "2"], "{}", output.stdout);
    lab.delete(container);
}

fn a_working_directory_cannot_be_a_descriptor(lab: &Lab) {
    let container = waiting(lab, |_| {});
    for number in 0..24 {
        for cwd in [format!("/proc/self/fd/{number}"), format!("/proc/self/fd/{number}/../../../..")] {
            let mut plan = lab.plan("pwd; ls /");
            plan.process.cwd = cwd.clone().into();
            // Refused, or a directory of the container by that text; never one of the host.
            assert!(lab.run(plan).is_err(), "{cwd} in init");
            let process = Process { cwd: cwd.clone().into(), ..shell("pwd") };
            assert!(lab.exec(&container, ExecPlan { process, timeout_ms: 0 }).is_err(), "{cwd} in exec");
        }
    }
    for cwd in ["/proc/self/cwd", "/proc/1/root", "/proc/thread-self/root/tmp"] {
        let process = Process { cwd: cwd.into(), ..shell("pwd") };
        assert!(lab.exec(&container, ExecPlan { process, timeout_ms: 0 }).is_err(), "{cwd}");
    }
    lab.delete(container);
}

/// Every path below a directory, with what it is.
fn listing(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        found.push(entry.path().display().to_string());
        if entry.file_type().unwrap().is_dir() {
            found.extend(listing(&entry.path()));
        }
    }
    found.sort();
    found
}

/// CVE-2021-30465, CVE-2024-45310, CVE-2026-41579: links in the image, absolute, upwards, dangling, and through /proc.
fn links_lead_nowhere_outside(lab: &Lab) {
    std::fs::create_dir(lab.path("data")).unwrap();
    std::fs::create_dir(lab.path("outside")).unwrap();
    let outside = lab.path("outside");
    let up = format!("../../../../../../../../../../..{}", outside.display());
    for text in [outside.to_str().unwrap(), &up, "/", "../../..", "/proc/1/root/tmp", "/proc/self/cwd", "/dev"] {
        let layer = lab.layer(|root| symlink(text, root.join("data")).unwrap());
        for kind in ["directory", "file", "tmpfs"] {
            let mut plan = lab.plan("ls -d /data/new/er; cut -d' ' -f5 /proc/self/mountinfo | grep new");
            lab.on_top(&mut plan, std::slice::from_ref(&layer));
            plan.mounts.push(match kind {
                "directory" => bind(&lab.path("data"), "/data/new/er"),
                "file" => bind(&lab.path("layers/base/etc/passwd"), "/data/new/er"),
                _ => mount("/data/new/er", MountKind::Tmpfs),
            });
            plan.process.cwd = "/data/cwd/made".into();
            plan.masked_paths.push("/data/passwd".into());
            // It may fail, as below /proc; what counts is where anything is.
            if let Ok(output) = lab.run(plan) {
                assert!(output.stdout.contains("new/er"), "{text}: {}", output.stderr);
            }
        }
        assert_eq!(listing(&outside), [""; 0], "{text}");
        assert_eq!(listing(&lab.path("data")), [""; 0], "{text}");
    }
    assert!(!Path::new("/new").exists() && !Path::new("/cwd").exists() && !Path::new("/tmp/new").exists());
}

/// Swaps `path` between a directory and a link until it is killed.
pub fn swapper(path: &Path, link: &str) -> (rustix::process::Pid, std::os::fd::OwnedFd) {
    let (here, aside) = (path.to_path_buf(), path.with_extension("aside"));
    symlink(link, &aside).unwrap();
    std::fs::create_dir_all(&here).unwrap();
    let paths = [here, aside].map(|path| CString::new(path.as_os_str().as_bytes()).unwrap());
    spawn(CloneArgs::default(), None, || {
        loop {
            let exchange = rustix::fs::RenameFlags::EXCHANGE;
            let _ = rustix::fs::renameat_with(rustix::fs::CWD, &paths[0], rustix::fs::CWD, &paths[1], exchange);
        }
    })
    .unwrap()
}

/// CVE-2021-30465: a second container swaps directories of a shared volume for links while the first one is created.
fn a_racing_writer_gets_nothing_outside(lab: &Lab) {
    let (volume, outside) = (lab.path("volume"), lab.path("outside"));
    std::fs::create_dir_all(volume.join("a")).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::fs::create_dir(lab.path("data")).unwrap();
    let up = format!("../../../../../../../../../..{}", outside.display());
    for link in [outside.to_str().unwrap(), &up, "/"] {
        let path = volume.join("a/b");
        let (pid, pidfd) = swapper(&path, link);
        for round in 0..40 {
            let mut plan = lab.plan("cut -d' ' -f5 /proc/self/mountinfo; pwd -P");
            plan.mounts.push(bind(&volume, "/volume"));
            plan.mounts.push(bind(&lab.path("data"), "/volume/a/b/target"));
            plan.mounts.push(bind(&lab.path("layers/base/etc/passwd"), "/volume/a/b/file"));
            plan.process.cwd = format!("/volume/a/b/cwd{round}").into();
            plan.masked_paths.push("/volume/a/b/file".into());
            plan.readonly_paths.push("/volume/a/b".into());
            // It may fail; nothing may be anywhere else.
            if let Ok(output) = lab.run(plan) {
                assert!(output.stdout.contains("/target"), "{}", output.stdout);
            }
        }
        copepod::sys::process::signal(std::os::fd::AsFd::as_fd(&pidfd), libc::SIGKILL as u32).unwrap();
        reap(pid);
        assert_eq!(listing(&outside), [""; 0], "{link}");
        assert_eq!(listing(&lab.path("data")), [""; 0], "{link}");
        assert!(!Path::new("/target").exists() && !Path::new("/file").exists(), "{link}");
        std::fs::remove_dir_all(volume.join("a")).unwrap();
        std::fs::create_dir(volume.join("a")).unwrap();
    }
}

/// CVE-2025-31133: the image brings its own /dev/null.
fn masked_files_are_under_the_real_null_device(lab: &Lab) {
    for text in ["/proc/sysrq-trigger", "/etc/passwd"] {
        let layer = lab.layer(|root| {
            std::fs::create_dir(root.join("dev")).unwrap();
            symlink(text, root.join("dev/null")).unwrap();
            std::fs::write(root.join("hidden"), "secret").unwrap();
        });
        for with_dev in [true, false] {
            let mut plan = lab.plan("stat -c '%F %t:%T' /hidden; cat /hidden");
            lab.on_top(&mut plan, std::slice::from_ref(&layer));
            plan.masked_paths = vec!["/hidden".into()];
            if !with_dev {
                plan.mounts.retain(|mount| !mount.target.starts_with("/dev"));
            }
            assert_eq!(lab.run(plan).unwrap().stdout, "character special file 1:3\n");
        }
    }
}

/// CVE-2025-4437, CVE-2024-9676, CVE-2024-40635, CVE-2022-4318 and their like.
fn hostile_user_files(lab: &Lab) {
    std::fs::write(lab.path("secret"), "evil:x:7:7::/:/bin/sh\n").unwrap();
    let secret = format!("../../../../../../../../..{}", lab.path("secret").display());
    let refused = |fill: &dyn Fn(&Path), name: &str, text: &str| {
        let layer = lab.layer(|root| {
            std::fs::create_dir(root.join("etc")).unwrap();
            fill(&root.join("etc"));
        });
        let mut plan = lab.plan("id");
        lab.on_top(&mut plan, &[layer]);
        plan.process.user.name = name.into();
        fails(lab.create(plan), Kind::InvalidArgument, text);
    };
    let mknod = |path: PathBuf, kind: rustix::fs::FileType, device: u64| {
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, rustix::fs::Mode::from_raw_mode(0o666), device).unwrap();
    };
    let zero = rustix::fs::makedev(1, 5);
    refused(&|etc| mknod(etc.join("passwd"), rustix::fs::FileType::Fifo, 0), "root", "/etc/passwd in the container is not a regular file");
    refused(&|etc| mknod(etc.join("group"), rustix::fs::FileType::Fifo, 0), "0", "/etc/group in the container is not a regular file");
    refused(&|etc| mknod(etc.join("passwd"), rustix::fs::FileType::CharacterDevice, zero), "0", "is not a regular file");
    refused(&|etc| symlink("/dev/zero", etc.join("passwd")).unwrap(), "0", "is not a regular file");
    refused(&|etc| std::fs::File::create(etc.join("passwd")).unwrap().set_len(1 << 40).unwrap(), "0", "is larger than 1048576 bytes");
    refused(&|etc| std::fs::create_dir(etc.join("passwd")).unwrap(), "0", "is not a regular file");
    refused(&|etc| symlink(&secret, etc.join("passwd")).unwrap(), "evil", "no user \"evil\"");
    refused(&|etc| symlink("/proc/1/root/etc/passwd", etc.join("passwd")).unwrap(), "evil", "cannot look up users");
    refused(&|etc| std::fs::write(etc.join("passwd"), "a:x:1:1::/home\x0bx:\n").unwrap(), "a", "has control characters");
    refused(&|etc| std::fs::write(etc.join("passwd"), "a:x:4294967296:1::/:\nb:x:-1:0::/:\n").unwrap(), "a", "no user \"a\"");
    refused(&|etc| std::fs::write(etc.join("passwd"), "a:x:4294967295:1::/:\n").unwrap(), "a", "no user \"a\"");
}

/// In a shared PID namespace: pause, another container's init before its execve, an exec's helper.
fn nobody_looks_into_our_processes(lab: &Lab) {
    let pod = lab.pod(&SandboxPlan { shared_pid: true, ..pod::sandbox() }).unwrap();
    let waiting = lab.create_in(&pod.fds(), pod::in_pod(lab, "true", Namespace::Pod)).unwrap();
    let mut spy = lab.create_in(&pod.fds(), pod::in_pod(lab, "echo up; exec sleep 1000", Namespace::Pod)).unwrap();
    spy.start().unwrap();
    assert_eq!(spy.line(), "up");
    // $PPID is the helper; the other init is the one whose name says so.
    let look = "for pid in 1 $PPID $(grep -l '^copepod:init' /proc/[0-9]*/comm | cut -d/ -f3); do echo $(cat /proc/$pid/comm); \
                for f in root/ cwd/ fd/ exe environ maps mem; do ls /proc/$pid/$f >/dev/null 2>&1 && cat /proc/$pid/$f; done; done";
    let output = lab.exec_sh(&spy, look);
    assert_eq!(output.lines(), ["pause", "copepod:exec", "copepod:init"], "{}", output.stderr);

    // With CAP_SYS_PTRACE over the host's user namespace nothing is hidden; there is then nothing of the host at these roots.
    let mut process =
        shell("for pid in 1 $PPID $(grep -l '^copepod:init' /proc/[0-9]*/comm | cut -d/ -f3); do ls /proc/$pid/root/ | wc -w; done; ls / | wc -w");
    process.capabilities = all_capabilities();
    let output = lab.exec(&spy, ExecPlan { process, timeout_ms: 0 }).unwrap().output();
    let lines = output.lines();
    assert_eq!(lines[0], "0", "pause's root is empty: {}", output.stdout);
    assert!(lines[1] == lines[3] && lines[2] == lines[3], "each has its container's root: {}", output.stdout);
    lab.delete(waiting);
    lab.delete(spy);
    pod.stop(libc::SIGTERM);
}

/// CVE-2019-16884, CVE-2023-27561, CVE-2023-28642: a /proc that is somewhere else.
fn kernel_filesystems_are_never_behind_links(lab: &Lab) {
    for name in ["proc", "sys", "dev"] {
        let replace = |root: &Path, text: &str| {
            std::fs::remove_dir(root.join(name)).unwrap();
            symlink(text, root.join(name)).unwrap();
        };
        for text in ["/fake", "fake", "../../../fake", "/proc", "/tmp"] {
            // A whole root, since a link over a directory of a lower layer would be whited out.
            let root = lab.path(&format!("root-{name}"));
            std::fs::create_dir(&root).unwrap();
            for dir in ["proc", "sys", "dev", "fake", "tmp"] {
                std::fs::create_dir(root.join(dir)).unwrap();
            }
            replace(&root, text);
            let mut plan = lab.plan("true");
            plan.rootfs = Rootfs::Directory(root.clone());
            fails(lab.create(plan), Kind::InvalidArgument, "over a symbolic link");
            assert_eq!(listing(&root.join("fake")), [""; 0]);
            std::fs::remove_dir_all(root).unwrap();
        }
    }
}

/// CVE-2025-52565: something else where the container's devpts should be.
fn a_forged_terminal_is_refused(lab: &Lab) {
    let container = waiting(lab, |plan| {
        plan.mounts.retain(|mount| mount.kind != MountKind::Devpts);
        plan.mounts.push(mount("/dev/pts", MountKind::Tmpfs));
    });
    assert_eq!(lab.exec_sh(&container, "ln -s /dev/null /dev/pts/ptmx; echo made").stdout, "made\n");
    let process = Process { terminal: true, ..shell("true") };
    fails(lab.exec(&container, ExecPlan { process, timeout_ms: 0 }), Kind::FailedPrecondition, "/dev/pts in the container is not a devpts");
    lab.delete(container);
}
