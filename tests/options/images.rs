//! Images as clients of the CRI see them: one identifier, removal while in use, deadlines, streams, verbose answers.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::net::TcpListener;

use copepod::api;
use tokio_stream::StreamExt;
use tonic::{Code, Request};

use super::harness::Test;
use super::node::{BUSYBOX, Node, image_spec, shell};

/// The tests.
pub const TESTS: &[Test<Node>] = &[
    ("images_have_one_identifier", one_identifier),
    ("images_in_use_can_be_removed", in_use),
    ("images_are_listed_and_streamed", listed_and_streamed),
    ("images_are_shown_whole", shown_whole),
    ("images_pulls_end_with_the_callers_deadline", deadlines),
    ("images_errors_are_those_that_kubelet_knows", known_errors),
    ("images_problems_of_registries_conf_are_shown", problems_are_shown),
];

fn image(node: &Node, name: &str) -> Option<api::Image> {
    status(node, name, false).image
}

fn status(node: &Node, name: &str, verbose: bool) -> api::ImageStatusResponse {
    let request = api::ImageStatusRequest { image: Some(image_spec(name)), verbose };
    node.wait(node.images().image_status(request)).unwrap().into_inner()
}

fn remove(node: &Node, name: &str) {
    node.wait(node.images().remove_image(api::RemoveImageRequest { image: Some(image_spec(name)) })).unwrap();
}

/// A running container of busybox, with its pod.
fn running(node: &Node) -> (String, String) {
    let config = node.pod_config();
    let pod = node.run_pod(&config).unwrap();
    let container = node.create(&pod, &config, shell("main", "exec sleep 1000")).unwrap();
    node.start_container(&container).unwrap();
    (pod, container)
}

fn one_identifier(node: &mut Node) {
    let id = node.pull(BUSYBOX);
    let (pod, container) = running(node);
    let shown = node.status(&container).unwrap();
    let list = api::ListContainersRequest { filter: Some(api::ContainerFilter { id: container.clone(), ..Default::default() }) };
    let listed = node.wait(node.client().list_containers(list)).unwrap().into_inner().containers.remove(0);
    let found = image(node, BUSYBOX).unwrap();
    assert!(id.starts_with("sha256:") && id.len() == 71, "{id}");
    assert_eq!([&found.id, &shown.image_id, &shown.image_ref, &listed.image_id, &listed.image_ref], [&id; 5]);
    assert_eq!(found.spec.unwrap().image, id);
    for name in [&id, &id[7..], &id[7..19], &found.repo_digests[0]] {
        assert_eq!(image(node, name).map(|image| image.id), Some(id.clone()), "{name}");
    }
    assert!(found.size > 0 && !found.repo_tags.is_empty());
    assert!(image(node, "nothing.example.com/here:1").is_none());
    // A container can be made of the identifier, too.
    let config = node.pod_config();
    let other = node.run_pod(&config).unwrap();
    let by_id = api::ContainerConfig { image: Some(image_spec(&id)), ..shell("by-id", "true") };
    let made = node.create(&other, &config, by_id).unwrap();
    assert_eq!(node.status(&made).unwrap().image_id, id);
    node.remove_pod(&other);
    node.remove_pod(&pod);
}

fn in_use(node: &mut Node) {
    let id = node.pull(BUSYBOX);
    let (pod, container) = running(node);
    remove(node, BUSYBOX);
    remove(node, BUSYBOX);
    assert!(image(node, &id).is_none());
    // What runs keeps its files, and says what it was made of.
    let output = node.exec(&container, &["sh", "-c", "busybox true && echo here"], 10).unwrap();
    assert_eq!((output.stdout.as_slice(), node.status(&container).unwrap().image_id), (&b"here\n"[..], id.clone()));
    let config = node.pod_config();
    let other = node.run_pod(&config).unwrap();
    assert_eq!(node.create(&other, &config, shell("none", "true")).unwrap_err().code(), Code::NotFound);
    assert_eq!(node.pull(BUSYBOX), id);
    node.create(&other, &config, shell("some", "true")).unwrap();
    node.remove_pod(&other);
    node.remove_pod(&pod);
}

fn listed_and_streamed(node: &mut Node) {
    node.pull(BUSYBOX);
    let filter = |name: &str| Some(api::ImageFilter { image: Some(image_spec(name)) });
    let list = |filter| node.wait(node.images().list_images(api::ListImagesRequest { filter })).unwrap().into_inner().images;
    let stream = |filter| {
        node.wait(async {
            let stream = node.images().stream_images(api::StreamImagesRequest { filter }).await.unwrap().into_inner();
            let parts: Vec<_> = stream.collect().await;
            parts.into_iter().flat_map(|part| part.unwrap().images).collect::<Vec<_>>()
        })
    };
    assert!(!list(None).is_empty());
    assert_eq!(stream(None), list(None));
    assert_eq!(stream(filter(BUSYBOX)), list(filter(BUSYBOX)));
    assert_eq!(list(filter(BUSYBOX)).len(), 1);
    assert_eq!((list(filter("nothing.example.com/here")), stream(filter("nothing.example.com/here"))), (vec![], vec![]));
    assert_eq!(list(Some(api::ImageFilter::default())), list(None));
    let info = node.wait(node.images().image_fs_info(api::ImageFsInfoRequest {})).unwrap().into_inner();
    let (images, containers) = (&info.image_filesystems[0], &info.container_filesystems[0]);
    assert_eq!(images.fs_id, containers.fs_id);
    assert!(images.used_bytes.unwrap().value > 0 && images.inodes_used.unwrap().value > 0 && images.timestamp > 0);
}

fn shown_whole(node: &mut Node) {
    let id = node.pull(BUSYBOX);
    assert!(status(node, BUSYBOX, false).info.is_empty());
    let info: HashMap<String, serde_json::Value> = serde_json::from_str(&status(node, BUSYBOX, true).info["info"]).unwrap();
    assert_eq!(info["imageSpec"]["rootfs"]["type"], "layers");
    assert_eq!(format!("{}", info["manifest"]["config"]["digest"]), format!("\"{id}\""));
    assert_eq!(info["os"], "linux");
    assert!(info["pulledAt"].as_u64().unwrap() > 0 && !info["layers"].as_array().unwrap().is_empty());
}

/// A registry that takes connections and never answers.
struct Silent {
    host: String,
    /// Gets something when a connection has ended.
    ended: std::sync::mpsc::Receiver<()>,
}

impl Silent {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let (tell, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (tell, mut stream) = (tell.clone(), stream.unwrap());
                std::thread::spawn(move || {
                    let _ = stream.read_to_end(&mut Vec::new());
                    let _ = tell.send(());
                });
            }
        });
        Self { host, ended }
    }
}

fn deadlines(node: &mut Node) {
    let silent = Silent::start();
    // Two clocks run: the client's own answers Cancelled if it is the first. What the daemon does shows in its log and to the registry.
    let pull = |name: &str, limit: &str| {
        let request = api::PullImageRequest { image: Some(image_spec(name)), ..Default::default() };
        let mut request = Request::new(request);
        request.metadata_mut().insert("grpc-timeout", limit.parse().unwrap());
        let code = node.wait(node.images().pull_image(request)).unwrap_err().code();
        assert!(matches!(code, Code::DeadlineExceeded | Code::Cancelled), "{code:?}");
    };
    let given_up = |name: &str| {
        let log = node.dir.join("daemon.log");
        let line = node.wait_log(&log.to_string_lossy(), &format!("image=\"{name}\""));
        assert!(line.contains("the caller's deadline has passed"), "{line}");
    };
    let name = format!("{}/app:short", silent.host);
    pull(&name, "1m");
    given_up(&name);
    let name = format!("{}/app:long", silent.host);
    pull(&name, "500m");
    given_up(&name);
    silent.ended.recv_timeout(super::node::PATIENCE).expect("the connection is closed");
}

fn known_errors(node: &mut Node) {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let refused = |name: &str, sandbox_config| {
        let request = api::PullImageRequest { image: Some(image_spec(name)), auth: None, sandbox_config };
        node.wait(node.images().pull_image(request)).unwrap_err()
    };
    let status = refused(&format!("{nobody}/app:1"), None);
    assert_eq!(status.code(), Code::Unknown);
    assert!(status.message().starts_with("RegistryUnavailable: "), "{status:?}");
    for name in ["Not/Valid", &"0".repeat(64), &format!("sha256:{}", "0".repeat(64)), "a@sha512:00"] {
        let status = refused(name, None);
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(name), "{status:?}");
    }
    let auth = Some(api::AuthConfig { auth: "hidden!".into(), ..Default::default() });
    let request = api::PullImageRequest { image: Some(image_spec(BUSYBOX)), auth, sandbox_config: None };
    let status = node.wait(node.images().pull_image(request)).unwrap_err();
    assert!(status.message().contains("auth.auth") && !status.message().contains("hidden"), "{status:?}");
    let mut config = node.pod_config();
    config.metadata.as_mut().unwrap().namespace = "../../etc".into();
    let status = refused(BUSYBOX, Some(config));
    assert!(status.code() == Code::InvalidArgument && status.message().contains("../../etc"), "{status:?}");
}

fn problems_are_shown(node: &mut Node) {
    let problem = || {
        let request = api::StatusRequest { verbose: true };
        let info = node.wait(node.client().status(request)).unwrap().into_inner().info;
        serde_json::from_str::<serde_json::Value>(&info["registries"]).unwrap()["problem"].clone()
    };
    let broken = node.dir.join("registries.d/99-broken.conf");
    assert!(problem().is_null());
    fs::write(&broken, "[[registry]]\nlocation = 5\n").unwrap();
    // What was read before is in force: the mirror of the test's.
    node.pull(BUSYBOX);
    assert!(problem().as_str().unwrap().contains("99-broken.conf"), "{}", problem());
    // Short names are resolved without a restart.
    fs::write(&broken, format!("[aliases]\nbox = \"{}\"\n", BUSYBOX.split(':').next().unwrap())).unwrap();
    let tag = BUSYBOX.split(':').nth(1).unwrap();
    let id = node.pull(&format!("box:{tag}"));
    assert_eq!(image(node, &format!("box:{tag}")).map(|image| image.id), Some(id.clone()));
    assert_eq!(image(node, BUSYBOX).map(|image| image.id), Some(id));
    assert!(problem().is_null());
    fs::remove_file(&broken).unwrap();
    assert!(image(node, &format!("box:{tag}")).is_none());
}
