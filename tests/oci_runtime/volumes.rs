//! Images as mounts, volumes that an image defines, labels of volumes, sources that are made.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use copepod::errchain::Kind;
use copepod::plan::*;

use super::driver::*;

pub const TESTS: &[super::Test] = &[
    ("an_image_is_mounted_read_only", an_image_is_mounted_read_only),
    ("a_sub_path_ends_in_its_image", a_sub_path_ends_in_its_image),
    ("a_volume_begins_with_what_the_image_has", a_volume_begins_with_what_the_image_has),
    ("a_hostile_volume_stays_in_its_root", a_hostile_volume_stays_in_its_root),
    ("a_volume_is_labelled", a_volume_is_labelled),
    ("a_racing_writer_gets_no_label_outside", a_racing_writer_gets_no_label_outside),
    ("a_missing_source_is_made", a_missing_source_is_made),
];

/// An image of these layers.
pub fn image(lab: &Lab, lower: &[String], sub_path: &str, target: &str) -> Mount {
    let mut lower = lower.to_vec();
    if lower.len() == 1 {
        lower.push(lab.path("pivot").to_string_lossy().into_owned());
    }
    let layers = Overlay { layers_dir: lab.path("layers"), lower, ..Overlay::default() };
    let kind = MountKind::Image(ImageMount { layers, sub_path: sub_path.into() });
    Mount { target: target.into(), kind, readonly: true, ..Mount::default() }
}

fn an_image_is_mounted_read_only(lab: &Lab) {
    let pod = lab.pod(&SandboxPlan { id: "p".into(), new_ipc: true, shm_bytes: 1 << 20, ..SandboxPlan::default() }).unwrap();
    // Few layers with short names, many with long ones: more than one option of fsconfig(2) takes.
    for (count, length) in [(1, 4), (2, 4), (40, 60)] {
        let names: Vec<String> = (0..count).map(|n| format!("{n:0length$}")).collect();
        for (n, name) in names.iter().enumerate() {
            let layer = lab.path("layers").join(name);
            std::fs::create_dir_all(layer.join("all")).unwrap();
            std::fs::write(layer.join("all").join(n.to_string()), "").unwrap();
            std::fs::write(layer.join("all/top"), name).unwrap();
        }
        for (fds, sub_path) in [(pod.fds(), ""), (pod.fds(), "all"), (Default::default(), ""), (Default::default(), "all")] {
            let below = if sub_path.is_empty() { "/image/all" } else { "/image" };
            let mut plan = lab.plan(&format!("ls {below} | wc -l; cat {below}/top; touch {below}/x || echo read-only"));
            plan.mounts.push(image(lab, &names, sub_path, "/image"));
            let output = lab.run_in(&fds, plan).unwrap();
            assert_eq!(output.lines(), [(count + 1).to_string(), format!("{}read-only", names[0])], "{}", output.stderr);
        }
        names.iter().for_each(|name| std::fs::remove_dir_all(lab.path("layers").join(name)).unwrap());
    }
    pod.stop(libc::SIGKILL);
    let mut plan = lab.plan("true");
    plan.mounts.push(image(lab, &["missing".into(), "gone".into()], "", "/image"));
    fails(lab.create(plan), Kind::Internal, "ImageVolumeMountFailed: cannot put the image's layers together");
}

fn a_sub_path_ends_in_its_image(lab: &Lab) {
    std::fs::create_dir(lab.path("outside")).unwrap();
    std::fs::write(lab.path("outside/secret"), "secret").unwrap();
    let outside = lab.path("outside").to_string_lossy().into_owned();
    let layer = lab.layer(|root| {
        std::fs::create_dir_all(root.join("etc/deep")).unwrap();
        std::fs::write(root.join("etc/deep/file"), "of the image\n").unwrap();
        symlink("../../../../../../etc", root.join("up")).unwrap();
        symlink(&outside, root.join("host")).unwrap();
        symlink(format!("../../../../../../../../..{outside}"), root.join("relative")).unwrap();
        symlink("/proc/self/root", root.join("magic")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, root.join("fifo"), fifo, rustix::fs::Mode::from_raw_mode(0o666), 0).unwrap();
    });
    let plan = |sub_path: &str, script: &str| {
        let mut plan = lab.plan(script);
        plan.mounts.push(image(lab, std::slice::from_ref(&layer), sub_path, "/image"));
        plan
    };
    for (sub_path, script) in [("up/deep", "cat /image/file"), ("etc/deep/file", "cat /image"), ("up/../etc/deep", "cat /image/file")] {
        assert_eq!(lab.run(plan(sub_path, script)).unwrap().stdout, "of the image\n", "{sub_path}");
    }
    for sub_path in ["host", "relative", "host/secret", "magic", "magic/etc", "loop", "etc/missing", "etc/deep/file/x"] {
        fails(lab.create(plan(sub_path, "true")), Kind::InvalidArgument, &format!("ImageVolumeMountFailed: cannot open sub-path {sub_path}"));
    }
    fails(lab.create(plan("fifo", "true")), Kind::InvalidArgument, "is neither a directory nor a regular file");
}

/// A volume that the image defines.
pub fn volume(lab: &Lab, name: &str, target: &str) -> Mount {
    std::fs::create_dir_all(lab.path(name)).unwrap();
    Mount { target: target.into(), kind: MountKind::Volume(lab.path(name)), ..Mount::default() }
}

fn a_volume_begins_with_what_the_image_has(lab: &Lab) {
    let layer = lab.layer(|root| {
        let data = root.join("srv/data");
        std::fs::create_dir_all(data.join("a/b")).unwrap();
        std::fs::write(data.join("a/file"), vec![7; 300_000]).unwrap();
        std::fs::hard_link(data.join("a/file"), data.join("a/b/second")).unwrap();
        std::fs::set_permissions(data.join("a/file"), PermissionsExt::from_mode(0o4711)).unwrap();
        std::os::unix::fs::chown(data.join("a/b"), Some(5), Some(6)).unwrap();
        std::fs::set_permissions(data.join("a/b"), PermissionsExt::from_mode(0o1700)).unwrap();
        let value = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(data.join("a"), "user.note", b"kept", value).unwrap();
        let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        std::fs::write(data.join("ping"), "").unwrap();
        std::os::unix::fs::chown(data.join("ping"), Some(9), None).unwrap();
        rustix::fs::setxattr(data.join("ping"), "security.capability", &capability, value).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o622);
        rustix::fs::mknodat(rustix::fs::CWD, data.join("fifo"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, data.join("zero"), rustix::fs::FileType::CharacterDevice, mode, rustix::fs::makedev(1, 5)).unwrap();
        for node in ["fifo", "zero"] {
            std::fs::set_permissions(data.join(node), PermissionsExt::from_mode(0o622)).unwrap();
        }
        symlink("/nowhere", data.join("link")).unwrap();
        std::os::unix::fs::lchown(data.join("link"), Some(3), Some(4)).unwrap();
    });
    let mut plan = lab.plan("rm -r /srv/data/a/b; echo x >/srv/data/new; touch /root-file || echo read-only; ls /plain");
    lab.on_top(&mut plan, std::slice::from_ref(&layer));
    plan.rootfs_readonly = true;
    plan.mounts.push(volume(lab, "volume", "/srv/data"));
    plan.mounts.push(volume(lab, "plain", "/plain"));
    std::fs::write(lab.path("plain/there"), "").unwrap();
    let check = |at: &Path| {
        let meta = |path: &str| std::fs::symlink_metadata(at.join(path)).unwrap();
        let (file, second) = (meta("a/file"), meta("a/b/second"));
        assert_eq!((file.mode() & 0o7777, file.nlink(), file.ino()), (0o4711, 2, second.ino()));
        assert_eq!(std::fs::read(at.join("a/file")).unwrap(), vec![7; 300_000]);
        assert_eq!((meta("a/b").mode() & 0o7777, meta("a/b").uid(), meta("a/b").gid()), (0o1700, 5, 6));
        assert_eq!((meta("link").uid(), meta("link").gid(), std::fs::read_link(at.join("link")).unwrap().as_path()), (3, 4, Path::new("/nowhere")));
        assert_eq!((meta("fifo").mode(), meta("zero").mode(), meta("zero").rdev()), (0o010622, 0o020622, rustix::fs::makedev(1, 5)));
        let mut value = [0; 64];
        assert_eq!(rustix::fs::getxattr(at.join("a"), "user.note", &mut value[..]), Ok(4));
        assert_eq!(rustix::fs::getxattr(at.join("ping"), "security.capability", &mut value[..]), Ok(20));
        assert_eq!(meta("ping").uid(), 9);
        meta("a").mtime()
    };
    let original = check(&lab.path("layers").join(&layer).join("srv/data"));
    let container = lab.create(plan).unwrap();
    assert_eq!(check(&lab.path("volume")), original);
    let mut container = container;
    container.start().unwrap();
    assert_eq!(container.output().lines(), ["read-only", "there"]);
    lab.delete(container);
    assert!(lab.path("volume/new").exists() && !lab.path("volume/a/b").exists());
    assert!(lab.path("layers").join(&layer).join("srv/data/a/b/second").exists());
}

fn a_hostile_volume_stays_in_its_root(lab: &Lab) {
    std::fs::create_dir(lab.path("outside")).unwrap();
    std::fs::write(lab.path("outside/secret"), "secret").unwrap();
    let outside = lab.path("outside").to_string_lossy().into_owned();
    let layer = lab.layer(|root| {
        symlink(&outside, root.join("absolute")).unwrap();
        symlink(format!("../../../../../../../../..{outside}"), root.join("relative")).unwrap();
        symlink("/proc/1/root", root.join("magic")).unwrap();
        std::fs::create_dir_all(root.join("data")).unwrap();
        symlink(&outside, root.join("data/link")).unwrap();
        std::fs::create_dir_all(root.join("deep").join("d/".repeat(300))).unwrap();
        std::fs::write(root.join("file"), "").unwrap();
    });
    // CVE-2022-23648: what the volume's path leads to on the host is never read or written.
    for (n, target) in ["/absolute", "/relative", "/data"].into_iter().enumerate() {
        let mut plan = lab.plan(&format!("ls -A {target}; : >{target}/made"));
        lab.on_top(&mut plan, std::slice::from_ref(&layer));
        plan.mounts.push(volume(lab, &format!("volume{n}"), target));
        let output = lab.run(plan).unwrap();
        assert_eq!(output.stdout, if target == "/data" { "link\n" } else { "" }, "{target}: {}", output.stderr);
        assert!(lab.path(&format!("volume{n}/made")).exists(), "{target}");
    }
    assert_eq!(std::fs::read_dir(lab.path("outside")).unwrap().count(), 1);
    let refused = |target: &str, text: &str| {
        let mut plan = lab.plan("true");
        lab.on_top(&mut plan, std::slice::from_ref(&layer));
        plan.mounts.push(volume(lab, "refused", target));
        fails(lab.create(plan), Kind::InvalidArgument, text);
    };
    refused("/deep", "deeper than 256 directories");
    refused("/file", "is not a directory");
    refused("/magic", "cannot open /magic in the container");
}

fn label_of(path: &Path) -> String {
    let mut label = [0; 128];
    match rustix::fs::lgetxattr(path, "security.selinux", &mut label[..]) {
        Ok(n) => String::from_utf8_lossy(&label[..n]).trim_end_matches('\0').to_string(),
        Err(_) => String::new(),
    }
}

/// What sets labels is tried without a policy: an attribute is an attribute.
fn a_volume_is_labelled(lab: &Lab) {
    const LABEL: &str = "system_u:object_r:container_file_t:s0:c1,c2";
    std::fs::create_dir_all(lab.path("data/below/deep")).unwrap();
    std::fs::create_dir(lab.path("outside")).unwrap();
    std::fs::write(lab.path("data/below/file"), "").unwrap();
    std::fs::write(lab.path("outside/file"), "").unwrap();
    symlink(lab.path("outside"), lab.path("data/below/link")).unwrap();
    symlink(lab.path("data"), lab.path("volume")).unwrap();
    let plan = |source: &Path| {
        let mut plan = lab.plan("true");
        let bind = Bind { source: source.into(), relabel: LABEL.into(), ..Bind::default() };
        plan.mounts.push(Mount { target: "/data".into(), kind: MountKind::Bind(bind), ..Mount::default() });
        plan
    };
    for _ in 0..2 {
        lab.run(plan(&lab.path("volume"))).unwrap();
        for path in ["data", "data/below", "data/below/deep", "data/below/file", "data/below/link"] {
            assert_eq!(label_of(&lab.path(path)), LABEL, "{path}");
        }
        for path in ["outside", "outside/file", "volume"] {
            assert_ne!(label_of(&lab.path(path)), LABEL, "{path}");
        }
    }
    lab.run(plan(&lab.path("outside/file"))).unwrap();
    assert_eq!(label_of(&lab.path("outside/file")), LABEL);
    // A volume that the image defines, without being asked for.
    let mut defined = lab.plan("true");
    defined.mounts.push(Mount { context: LABEL.into(), ..volume(lab, "defined", "/defined") });
    lab.run(defined).unwrap();
    assert_eq!(label_of(&lab.path("defined")), LABEL);
    // CVE-2021-43816, also behind a link.
    symlink("/usr", lab.path("usr")).unwrap();
    for source in ["/", "/etc", "/proc/sys"].map(Path::new).into_iter().chain([lab.path("usr").as_path()]) {
        fails(lab.create(plan(source)), Kind::InvalidArgument, "is refused: the whole node depends on its labels");
    }
}

/// A container that has the volume already swaps directories for links while the labels are set.
fn a_racing_writer_gets_no_label_outside(lab: &Lab) {
    const LABEL: &str = "system_u:object_r:container_file_t:s0:c3,c4";
    let (volume, outside) = (lab.path("volume"), lab.path("outside"));
    std::fs::create_dir_all(outside.join("below")).unwrap();
    std::fs::write(outside.join("file"), "").unwrap();
    std::fs::create_dir(&volume).unwrap();
    for link in [outside.to_str().unwrap(), "../../outside"] {
        let path = volume.join("a/b");
        std::fs::create_dir(volume.join("a")).unwrap();
        let (pid, pidfd) = super::attacks::swapper(&path, link);
        for name in ["below", "file"] {
            // In the directory that is swapped, which is at one of the two paths.
            let _ = std::fs::create_dir_all(path.join(name)).or_else(|_| std::fs::create_dir_all(path.with_extension("aside").join(name)));
        }
        for _ in 0..200 {
            let mut plan = lab.plan("true");
            // What is mounted comes after the labels, and fails: a container need not start.
            let bind = Bind { source: volume.clone(), relabel: LABEL.into(), ..Bind::default() };
            plan.mounts.insert(0, Mount { target: "/v".into(), kind: MountKind::Bind(bind), ..Mount::default() });
            plan.mounts.insert(1, bind_of_nothing(lab));
            fails(lab.create(plan), Kind::NotFound, "nothing on the host");
        }
        copepod::sys::process::signal(std::os::fd::AsFd::as_fd(&pidfd), libc::SIGKILL as u32).unwrap();
        reap(pid);
        assert_eq!(label_of(&volume.join("a")), LABEL);
        for path in ["", "below", "file"] {
            assert_ne!(label_of(&outside.join(path)), LABEL, "{link}: {path:?}");
        }
        std::fs::remove_dir_all(volume.join("a")).unwrap();
    }
}

fn bind_of_nothing(lab: &Lab) -> Mount {
    bind(&lab.path("nothing"), "/nothing")
}

fn a_missing_source_is_made(lab: &Lab) {
    let plan = |make_source| {
        let mut plan = lab.plan("echo x >/data/file");
        let bind = Bind { source: lab.path("made/below"), make_source, ..Bind::default() };
        plan.mounts.push(Mount { target: "/data".into(), kind: MountKind::Bind(bind), ..Mount::default() });
        plan
    };
    fails(lab.create(plan(false)), Kind::NotFound, "made/below on the host");
    assert!(!lab.path("made").exists());
    lab.run(plan(true)).unwrap();
    assert_eq!(std::fs::metadata(lab.path("made/below")).unwrap().mode() & 0o7777, 0o755);
    assert!(lab.path("made/below/file").exists());
    symlink("nowhere", lab.path("made/link")).unwrap();
    let mut dangling = plan(true);
    let MountKind::Bind(bind) = &mut dangling.mounts.last_mut().unwrap().kind else { unreachable!() };
    bind.source = lab.path("made/link");
    fails(lab.create(dangling), Kind::NotFound, "made/link on the host");
}
