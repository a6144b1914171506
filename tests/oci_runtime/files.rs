//! Roots and mounts: overlays of many layers, binds, propagation.

use std::os::fd::AsFd;
use std::path::Path;

use copepod::errchain::Kind;
use copepod::plan::*;
use copepod::sys::mount::{Attributes, NewFs, Propagation as Kept, attach_at, set_propagation};

use super::driver::*;

pub const TESTS: &[super::Test] = &[
    ("an_overlay_of_many_layers", an_overlay_of_many_layers),
    ("a_directory_as_the_root", a_directory_as_the_root),
    ("binds_of_files_and_directories", binds_of_files_and_directories),
    ("read_only_binds", read_only_binds),
    ("propagation_is_what_the_plan_says", propagation_is_what_the_plan_says),
    ("targets_behind_links_of_the_image", targets_behind_links_of_the_image),
    ("tmpfs_options", tmpfs_options),
];

fn an_overlay_of_many_layers(lab: &Lab) {
    // Names as long as a digest would make them: together more than one option of fsconfig(2), and than mount(2), can take.
    for (count, length) in [(3, 4), (40, 60), (90, 60)] {
        let names: Vec<String> = (0..count).map(|n| format!("{n:0length$}")).collect();
        for (n, name) in names.iter().enumerate() {
            let layer = lab.path("layers").join(name);
            std::fs::create_dir_all(layer.join("many")).unwrap();
            std::fs::write(layer.join("top"), name).unwrap();
            std::fs::write(layer.join("many").join(n.to_string()), "").unwrap();
        }
        let mut plan = lab.plan("cat /top; echo; ls /many | wc -l; echo new >/top; rm /many/1; ls /many | wc -l");
        lab.on_top(&mut plan, &names);
        let Rootfs::Overlay(overlay) = plan.rootfs.clone() else { unreachable!() };
        let options = names.join(":").len();
        match lab.run(plan) {
            Ok(output) => assert_eq!(output.lines(), [names[0].clone(), count.to_string(), (count - 1).to_string()], "{}", output.stderr),
            // Before Linux 6.7 there is no other way than mount(2), and one page is all that it takes.
            Err(error) => {
                assert!(options > 3500, "{options} bytes: {}", copepod::errchain::Chain(&error));
                fails::<()>(Err(error), Kind::ResourceExhausted, "this kernel takes 4095");
                names.iter().for_each(|name| std::fs::remove_dir_all(lab.path("layers").join(name)).unwrap());
                continue;
            }
        }
        assert_eq!(std::fs::read_to_string(overlay.upper.join("top")).unwrap(), "new\n");
        assert_eq!(std::fs::read_to_string(lab.path("layers").join(&names[0]).join("top")).unwrap(), names[0]);
        names.iter().for_each(|name| std::fs::remove_dir_all(lab.path("layers").join(name)).unwrap());
    }
    let mut plan = lab.plan("true");
    lab.on_top(&mut plan, &["missing".into()]);
    fails(lab.create(plan), Kind::Internal, "cannot mount an overlay of 2 layers");
}

fn a_directory_as_the_root(lab: &Lab) {
    let mut plan = lab.plan("mkdir -p /a/b && mount -t tmpfs x /a/b; touch /a/made; echo done");
    plan.rootfs = Rootfs::Directory(lab.path("layers/base"));
    plan.process.capabilities = all_capabilities();
    assert_eq!(lab.run(plan).unwrap().stdout, "done\n");
    assert!(lab.path("layers/base/a/made").exists());
    assert_eq!(lab.path("layers/base/dev").read_dir().unwrap().count(), 0, "what was mounted was never on the host");
}

/// What this process has.
pub fn all_capabilities() -> Capabilities {
    let set = copepod::sys::creds::bounding();
    Capabilities { bounding: set, permitted: set, effective: set, ..Capabilities::default() }
}

fn binds_of_files_and_directories(lab: &Lab) {
    std::fs::create_dir_all(lab.path("data/below")).unwrap();
    std::fs::write(lab.path("data/file"), "content\n").unwrap();
    std::os::unix::fs::symlink("data/file", lab.path("link")).unwrap();
    let mut plan = lab.plan(
        "cat /mnt/data/file /single /etc/over; echo new >/mnt/data/below/new; touch /mnt/nosuid/x; \
         grep -E ' /(mnt/nosuid|mnt/data) ' /proc/self/mountinfo | cut -d' ' -f6",
    );
    plan.mounts.push(bind(&lab.path("data"), "/mnt/data"));
    plan.mounts.push(bind(&lab.path("data/file"), "/single"));
    plan.mounts.push(bind(&lab.path("link"), "/etc/over"));
    plan.mounts.push(Mount { nosuid: true, nodev: true, noexec: true, noatime: true, ..bind(&lab.path("data"), "/mnt/nosuid") });
    let output = lab.run(plan).unwrap();
    assert_eq!(output.lines()[..3], ["content", "content", "content"], "{}", output.stderr);
    assert_eq!(output.lines()[4], "rw,nosuid,nodev,noexec,noatime");
    assert_eq!(std::fs::read_to_string(lab.path("data/below/new")).unwrap(), "new\n");
    for (target, source, text) in
        [("/etc/passwd", "data", "is not a directory"), ("/bin", "data/file", "is not a file"), ("/", "data", "no absolute path below")]
    {
        let mut plan = lab.plan("true");
        plan.mounts.push(bind(&lab.path(source), target));
        fails(lab.create(plan), Kind::InvalidArgument, text);
    }
}

/// A tmpfs in the lab. The test's mount namespace is its own; it is taken off again all the same.
fn with_tmpfs(path: &Path, propagation: Kept, work: impl FnOnce()) {
    std::fs::create_dir_all(path).unwrap();
    let fs = NewFs::open("tmpfs").unwrap();
    let tree = fs.mount(Attributes::default()).unwrap();
    attach_at(tree.as_fd(), path).unwrap();
    set_propagation(tree.as_fd(), propagation).unwrap();
    drop(tree);
    work();
    rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH).unwrap();
}

fn read_only_binds(lab: &Lab) {
    with_tmpfs(&lab.path("data/below"), Kept::Private, || {
        let run = |readonly_recursive: bool, recursive: bool| {
            let mut plan = lab.plan("touch /data/x || echo top; touch /data/below/x || echo below");
            let bind = Bind { source: lab.path("data"), recursive, readonly_recursive, ..Bind::default() };
            plan.mounts.push(Mount { target: "/data".into(), kind: MountKind::Bind(bind), readonly: true, ..Mount::default() });
            lab.run(plan).unwrap().stdout
        };
        assert_eq!(run(false, true), "top\n");
        assert_eq!(run(true, true), "top\nbelow\n");
        // Without the mounts below there is the directory under them, and it is read-only.
        assert_eq!(run(false, false), "top\nbelow\n");
    });
}

fn propagation_is_what_the_plan_says(lab: &Lab) {
    let path = lab.path("shared");
    let container = |propagation: Propagation| {
        let mut plan =
            lab.plan("mkdir -p /data/inside && mount -t tmpfs inside /data/inside; echo up; read x; ls -d /data/host/mark; umount /data/inside");
        let bind = Bind { source: path.clone(), recursive: true, propagation, ..Bind::default() };
        plan.mounts.push(Mount { target: "/data".into(), kind: MountKind::Bind(bind), ..Mount::default() });
        plan.process.capabilities = all_capabilities();
        plan
    };
    // Propagation, does the host see the container's mount, does the container see the host's.
    let cases = [(Propagation::Private, false, false), (Propagation::Slave, false, true), (Propagation::Shared, true, true)];
    with_tmpfs(&path, Kept::Shared, || {
        for (propagation, host_sees, container_sees) in cases {
            let (stdin, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
            let mut running = lab.create_with(&Default::default(), container(propagation.clone()), Some(stdin)).unwrap();
            running.start().unwrap();
            assert_eq!(running.line(), "up");
            let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert_eq!(table.contains(path.join("inside").to_str().unwrap()), host_sees, "{propagation:?}");
            with_tmpfs(&path.join("host"), Kept::Private, || {
                std::fs::write(path.join("host/mark"), "").unwrap();
                rustix::io::write(&write, b"go\n").unwrap();
                let output = running.output();
                assert_eq!(output.stdout.contains("/data/host/mark"), container_sees, "{propagation:?}: {}", output.stderr);
            });
            lab.delete(running);
        }
    });
    with_tmpfs(&path, Kept::Private, || {
        for propagation in [Propagation::Slave, Propagation::Shared] {
            fails(lab.create(container(propagation)), Kind::InvalidArgument, "on the host is not on a shared");
        }
    });
}

fn targets_behind_links_of_the_image(lab: &Lab) {
    std::fs::create_dir(lab.path("data")).unwrap();
    let layer = lab.layer(|root| {
        std::fs::create_dir(root.join("var")).unwrap();
        std::os::unix::fs::symlink("/run", root.join("var/run")).unwrap();
        std::os::unix::fs::symlink("../../../../run/deep", root.join("up")).unwrap();
    });
    let mut plan = lab.plan("grep -o ' /run/[^ ]*' /proc/self/mountinfo");
    lab.on_top(&mut plan, &[layer]);
    plan.mounts.push(bind(&lab.path("data"), "/var/run/secrets/token"));
    plan.mounts.push(bind(&lab.path("data"), "/up/er"));
    plan.mounts.push(mount("/var/run/tmp", MountKind::Tmpfs));
    let output = lab.run(plan).unwrap();
    assert_eq!(output.lines(), [" /run/secrets/token", " /run/deep/er", " /run/tmp"]);
}

fn tmpfs_options(lab: &Lab) {
    let mut plan = lab.plan("grep ' /t ' /proc/mounts; touch /t/x || echo read-only; ls -d /t/in");
    plan.mounts.push(Mount { options: "size=4m,mode=711,uid=5".into(), readonly: true, ..mount("/t", MountKind::Tmpfs) });
    plan.mounts.push(mount("/t/in", MountKind::Tmpfs));
    let output = lab.run(plan).unwrap();
    let options = "tmpfs /t tmpfs ro,nosuid,nodev,noexec,relatime,size=4096k,mode=711,uid=5";
    assert!(output.lines()[0].starts_with(options), "{}", output.stdout);
    assert_eq!(output.lines()[1..], ["read-only", "/t/in"]);
    let mut plan = lab.plan("true");
    plan.mounts.push(Mount { options: "no-such-option=1".into(), ..mount("/t", MountKind::Tmpfs) });
    fails(lab.create(plan), Kind::Internal, "option no-such-option of tmpfs");
}
