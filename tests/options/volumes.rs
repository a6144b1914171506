//! Images as mounts, and the volumes that an image defines.

use std::fs;

use copepod::api;
use tonic::Code;

use super::harness::Test;
use super::mounts::{mount, scratch, with};
use super::node::{BUSYBOX, Node, image_spec, shell};
use super::observe::{output_of, refused, run, same, security};

/// The tests.
pub const TESTS: &[Test<Node>] = &[
    ("volumes_image", image),
    ("volumes_image_sub_path", image_sub_path),
    ("volumes_image_refused", image_refused),
    ("volumes_image_is_held", image_is_held),
    ("volumes_of_the_image", of_the_image),
    ("volumes_of_the_image_give_way", of_the_image_give_way),
];

/// An image with volumes, files and links (`hack/test-images`).
const VOLUMES: &str = "registry.k8s.io/copepod/volumes:1";

fn image_mount(image: &str, sub_path: &str) -> api::Mount {
    api::Mount {
        container_path: "/image".into(),
        readonly: true,
        image: Some(api::ImageSpec { user_specified_image: VOLUMES.into(), ..image_spec(image) }),
        image_sub_path: sub_path.into(),
        ..Default::default()
    }
}

fn image(node: &mut Node) {
    let id = node.pull(VOLUMES);
    let script = "cat /image/etc/image-volume; touch /image/x 2>/dev/null || echo read-only; /image/bin/echo runs; \
                  mount -o remount,rw /image 2>/dev/null; test -e /image/proc/self || echo no proc";
    for name in [VOLUMES, &id] {
        assert_eq!(output_of(node, script, same, with(&[image_mount(name, "")])), "of the image\nread-only\nruns\nno proc\n");
    }
    // An image of one layer.
    let output = output_of(node, "/image/bin/cat /image/etc/passwd | head -1", same, with(&[image_mount(BUSYBOX, "")]));
    assert_eq!(output, "root:x:0:0:root:/root:/bin/sh\n");
    // Nobody makes it writable, whatever may be mounted in the container.
    let all = |config: &mut api::ContainerConfig| {
        security(config, |security| security.privileged = true);
        config.mounts = vec![image_mount(VOLUMES, "")];
    };
    let pod = |pod: &mut api::PodSandboxConfig| pod.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    let output = output_of(node, "mount -o remount,rw /image 2>/dev/null; touch /image/x 2>/dev/null || echo read-only", pod, all);
    assert_eq!(output, "read-only\n");
    let pod_config = node.pod_config();
    let pod = node.run_pod(&pod_config).unwrap();
    let mut config = shell("main", "true");
    config.mounts = vec![mount(scratch(node, "beside"), "/beside"), image_mount(&id, "etc")];
    let container = node.create(&pod, &pod_config, config.clone()).unwrap();
    let mut want = config.mounts;
    want[1].image.as_mut().unwrap().image_ref = id;
    assert_eq!(node.status(&container).unwrap().mounts, want);
    node.remove_pod(&pod);
}

fn image_sub_path(node: &mut Node) {
    node.pull(VOLUMES);
    let check = |sub_path: &str, script: &str, want: &str| {
        assert_eq!(output_of(node, script, same, with(&[image_mount(VOLUMES, sub_path)])), want, "{sub_path}");
    };
    check("data", "cat /image/file; touch /image/x 2>/dev/null || echo read-only", "from the image\nread-only\n");
    check("./data//sub/", "cat /image/deep", "deep\n");
    check("alias/sub", "cat /image/deep", "deep\n");
    check("data/file", "cat /image; (echo x >>/image) 2>/dev/null || echo read-only", "from the image\nread-only\n");
    check("alias/link", "head -1 /image", "root:x:0:0:root:/root:/bin/sh\n");
    // Links end within the image, however far up they want.
    check("out", "cat /image/image-volume", "of the image\n");
}

fn image_refused(node: &mut Node) {
    node.pull(VOLUMES);
    let check = |mount: api::Mount, code, words: &[&str]| refused(node, same, with(&[mount]), code, words);
    let invalid = Code::InvalidArgument;
    check(image_mount(VOLUMES, "not/there"), invalid, &["ImageVolumeMountFailed: ", "/image", "not/there"]);
    check(image_mount(VOLUMES, "data/file/below"), invalid, &["ImageVolumeMountFailed: ", "data/file/below"]);
    // What the link names is not in the image: never the host's.
    check(image_mount(VOLUMES, "host"), invalid, &["ImageVolumeMountFailed: ", "host"]);
    check(image_mount(VOLUMES, "host/etc"), invalid, &["ImageVolumeMountFailed: ", "host/etc"]);
    check(image_mount(VOLUMES, "../etc"), invalid, &["config.mounts.image_sub_path", "../etc"]);
    check(image_mount(VOLUMES, "/etc"), invalid, &["config.mounts.image_sub_path", "/etc"]);
    check(image_mount("nothing/here:1", ""), Code::NotFound, &["ImageVolumeMountFailed: cannot mount an image at /image", "nothing/here:1"]);
    check(image_mount("UPPER", ""), invalid, &["ImageVolumeMountFailed: ", "UPPER"]);
    check(image_mount("", ""), invalid, &["config.mounts.image.image", "missing"]);
    check(api::Mount { readonly: false, ..image_mount(VOLUMES, "") }, invalid, &["config.mounts.readonly", "image"]);
    check(api::Mount { host_path: "/tmp".into(), ..image_mount(VOLUMES, "") }, invalid, &["config.mounts.host_path", "/tmp"]);
    check(api::Mount { propagation: 1, ..image_mount(VOLUMES, "") }, invalid, &["config.mounts.propagation", "image"]);
    check(api::Mount { image: None, host_path: "/tmp".into(), ..image_mount("", "etc") }, invalid, &["config.mounts.image_sub_path", "etc"]);
    let over_file = api::Mount { container_path: "/etc/passwd".into(), ..image_mount(VOLUMES, "") };
    check(over_file, invalid, &["/etc/passwd", "is not a directory"]);
}

fn image_is_held(node: &mut Node) {
    let id = node.pull(VOLUMES);
    let remove = |node: &Node, image: &str| {
        let request = api::RemoveImageRequest { image: Some(image_spec(image)) };
        node.wait(node.images().remove_image(request)).map(drop)
    };
    let held = |node: &Node, container: &str| {
        for name in [VOLUMES, &id] {
            let status = remove(node, name).unwrap_err();
            assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
            assert!(status.message().contains(&id) && status.message().contains(container), "{status:?}");
        }
    };
    let pod_config = node.pod_config();
    let pod = node.run_pod(&pod_config).unwrap();
    let mut config = shell("main", "sleep 1000");
    config.mounts = vec![image_mount(VOLUMES, "data")];
    let container = node.create(&pod, &pod_config, config).unwrap();
    node.start_container(&container).unwrap();
    held(node, &container);
    node.kill();
    node.start(None);
    held(node, &container);
    let read = node.exec(&container, &["cat", "/image/file"], 30).unwrap();
    assert_eq!(read.stdout, b"from the image\n");
    assert_eq!(node.status(&container).unwrap().mounts[0].image.as_ref().unwrap().image_ref, id);
    node.remove_pod(&pod);
    remove(node, VOLUMES).unwrap();
    remove(node, VOLUMES).unwrap();
    node.assert_nothing_left();
}

/// A container of the image with volumes.
fn of_volumes(change: impl Fn(&mut api::ContainerConfig)) -> impl Fn(&mut api::ContainerConfig) {
    move |config| {
        config.image = Some(image_spec(VOLUMES));
        change(config);
    }
}

fn of_the_image(node: &mut Node) {
    node.pull(VOLUMES);
    let script = "stat -c '%n %F %a %u:%g %h' /data /data/file /data/second /data/program /data/sub /data/link; cat /data/file /data/sub/deep; \
                  readlink /data/link; stat -c %Y /data /data/file; for p in /data /empty /out/hole; do echo x >$p/new && echo $p; done; \
                  touch /x 2>/dev/null || echo root is read-only; ls -d /etc/hole; ls -A /out/hole";
    let read_only = of_volumes(|config| security(config, |security| security.readonly_rootfs = true));
    let want = "/data directory 2750 1000:2000 3\n/data/file regular file 640 1000:2000 2\n/data/second regular file 640 1000:2000 2\n\
                /data/program regular file 4755 0:0 1\n/data/sub directory 1777 0:0 2\n/data/link symbolic link 777 0:0 1\n\
                from the image\ndeep\n../../../etc/passwd\n1000000000\n1000000000\n/data\n/empty\n/out/hole\nroot is read-only\n/etc/hole\nnew\n";
    // Twice: what the first has written is not in the second.
    for _ in 0..2 {
        assert_eq!(output_of(node, script, same, &read_only), want);
    }
    // They are no part of the root: a filesystem of its own may be mounted over, and nothing of them is in the writable layer.
    let output =
        output_of(node, "grep -cE ' (/data|/empty|/etc/hole) ' /proc/self/mountinfo; grep -c /proc/x /proc/self/mountinfo", same, |config| {
            of_volumes(|_| {})(config);
            config.command[2] += "; true";
        });
    assert_eq!(output, "3\n0\n");
    node.assert_nothing_left();
}

fn of_the_image_give_way(node: &mut Node) {
    node.pull(VOLUMES);
    let dir = scratch(node, "give-way");
    fs::write(dir.join("own"), "").unwrap();
    let at = |target: &str| {
        let mounts = vec![mount(&dir, target)];
        of_volumes(move |config| config.mounts = mounts.clone())
    };
    // In place of one; above one, with a volume still in it; below one.
    let (code, output) = run(node, "ls /data; grep -c ' /data ' /proc/self/mountinfo", same, at("/data")).unwrap();
    assert_eq!((code, output.as_str()), (0, "own\n1\n"));
    assert_eq!(output_of(node, "ls /data/sub; cat /data/file", same, at("/data/sub")), "own\nfrom the image\n");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing of the image is in kubelet's volume");
}
