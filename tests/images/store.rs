//! The store: leases, damage, a full disk, and a process killed at each of its steps.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use copepod::errchain::{Chain, Kind, Kinded};
use copepod::image::{Config, ImageError, Images, Step};
use copepod::sys::process::command;

use super::root::root;
use super::sample::{Content, Layer, Sample, noise};
use super::server::Server;
use super::{Node, check_files, config, fails, pulled};

#[tokio::test(flavor = "multi_thread")]
async fn leased_layers_stay() {
    if !root("leased_layers_stay") {
        return;
    }
    let sample = Sample::simple("x");
    let content = Content::default().add("x", &sample);
    let server = Server::start(move |request| content.answer(request)).await;
    let node = Node::new(&[&server.host]);
    let images = node.open();
    images.collect().await;
    let image = pulled(&images, &format!("{}/r:x", server.host)).await;
    let lease = images.lease(&image).unwrap();
    assert_eq!((lease.names(), lease.layers_dir()), (&image.layers[..], &*node.path("layers")));
    assert!(lease.names().iter().all(|name| name.len() <= 8));
    images.remove(&image.id).await.unwrap();
    check_files(&node, &image, &sample, &[("base", b"base"), ("top", b"x")]);
    // The daemon is killed (this is what it leaves) and started again: the container's record names the layers.
    let copy = copy_of(&node);
    drop(lease);
    images.collect().await;
    assert_eq!(layer_names(&images).len(), 0);
    drop(images);
    let images = Images::open(copy).unwrap();
    let lease = images.lease_layers(&image.layers).unwrap();
    images.collect().await;
    assert_eq!(layer_names(&images).len(), 2);
    drop(lease);
    images.collect().await;
    assert_eq!(layer_names(&images).len(), 0);
    assert_eq!(images.lease_layers(&image.layers).unwrap_err().kind(), Kind::NotFound);
}

fn layer_names(images: &Arc<Images>) -> Vec<String> {
    let empty = images.lease_layers(&[]).unwrap();
    std::fs::read_dir(empty.layers_dir()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).filter(|n| !n.contains('.')).collect()
}

fn copy_of(node: &Node) -> Config {
    let to = node.directory.path().join("copy");
    assert!(command("cp").arg("-a").arg(node.path("")).arg(&to).status().unwrap().success());
    Config { root: to, ..node.config.clone() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_layer_is_fetched_alone() {
    if !root("a_damaged_layer_is_fetched_alone") {
        return;
    }
    let sample = Sample::simple("x");
    let content = Content::default().add("x", &sample);
    let server = Server::start(move |request| content.answer(request)).await;
    let mut node = Node::new(&[&server.host]);
    node.config.orphan_grace = Duration::from_secs(600);
    let reference = format!("{}/r:x", server.host);
    let image = pulled(&node.open(), &reference).await;
    let check = async |images: &Arc<Images>| {
        server.forget();
        let again = pulled(images, &reference).await;
        check_files(&node, &again, &sample, &[("base", b"base"), ("top", b"x")]);
        assert_eq!(server.count("/blobs/"), server.count(&sample.layers[0].digest().to_string()) + server.count(&sample.id()));
        assert_eq!(server.count(&sample.layers[0].digest().to_string()), 1);
    };
    std::fs::remove_dir_all(node.path("layers").join(&image.layers[1])).unwrap();
    let images = node.open();
    assert!(images.list().is_empty());
    images.collect().await;
    check(&images).await;
    // The same while it runs.
    let image = images.list()[0].clone();
    std::fs::remove_dir_all(node.path("layers").join(&image.layers[1])).unwrap();
    check(&images).await;
    // A record that was tampered with is no image any more.
    drop(images);
    let path = node.path("images").join(&node.names("images")[0]);
    let text = std::fs::read_to_string(&path).unwrap().replace("A=b", "A=c");
    std::fs::write(&path, text).unwrap();
    assert!(node.open().list().is_empty());
}

/// A tmpfs of its own, unmounted when dropped.
struct Small(PathBuf);

impl Small {
    fn mount(path: &Path, size: &str) -> Self {
        std::fs::create_dir_all(path).unwrap();
        let options = std::ffi::CString::new(format!("size={size}")).unwrap();
        rustix::mount::mount("tmpfs", path, "tmpfs", rustix::mount::MountFlags::empty(), Some(options.as_c_str())).unwrap();
        Self(path.to_path_buf())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_fails_a_pull_and_nothing_else() {
    if !root("a_full_disk_fails_a_pull_and_nothing_else") {
        return;
    }
    let (small, large) =
        (Sample::simple("small"), Sample::new("large", &[Layer::new(&[("a", &noise(900_000, 1))]), Layer::new(&[("b", &noise(5_000_000, 2))])]));
    let content = Content::default().add("small", &small).add("large", &large);
    let server = Server::start(move |request| content.answer(request)).await;
    let node = Node::new(&[&server.host]);
    let _disk = Small::mount(&node.path(""), "2m");
    let mut config = node.config.clone();
    config.orphan_grace = Duration::from_secs(600);
    let images = Images::open(config).unwrap();
    images.collect().await;
    fails(&images, &format!("{}/r:large", server.host), None, Kind::ResourceExhausted, "No space left").await;
    assert_eq!((images.list().len(), node.names("layers").len()), (0, 0));
    let image = pulled(&images, &format!("{}/r:small", server.host)).await;
    check_files(&node, &image, &small, &[("top", b"small")]);
}

/// What the killed process does: pulls one image, pulls another one over its tag, removes both.
async fn doomed(directory: &Path, host: &str) -> Result<(), ImageError> {
    let mut config = config(directory);
    config.fault = Some(die_at);
    let images = Images::open(config)?;
    images.collect().await;
    let first = images.pull(&format!("{host}/r:t"), None).await?;
    images.pull(&format!("{host}/r:t"), None).await?;
    images.remove(&first.id).await?;
    images.remove(&format!("{host}/r:t")).await
}

/// Ends the process as a power failure would end a node: at once.
fn die_at(step: Step) {
    static SEEN: AtomicUsize = AtomicUsize::new(0);
    let at = std::env::var("COPEPOD_TEST_DIE_AT").unwrap_or_default();
    let (name, count) = at.split_once(' ').unwrap_or(("", "1"));
    if format!("{step:?}") == name && SEEN.fetch_add(1, Ordering::Relaxed) + 1 == count.parse().unwrap_or(1) {
        std::process::abort();
    }
}

/// Only ever does something in the process that `a_killed_store_is_repaired` starts.
#[tokio::test(flavor = "multi_thread")]
async fn the_doomed_process() {
    let (Ok(directory), Ok(host)) = (std::env::var("COPEPOD_TEST_DOOMED"), std::env::var("COPEPOD_TEST_HOST")) else { return };
    doomed(Path::new(&directory), &host).await.unwrap_or_else(|e| panic!("{}", Chain(&e)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_store_is_repaired() {
    if !root("a_killed_store_is_repaired") {
        return;
    }
    let (one, two) = (Sample::simple("one"), Sample::simple("two"));
    let (first, second) = (Content::default().add("t", &one), Content::default().add("t", &two));
    let n = Arc::new(AtomicUsize::new(0));
    let turn = Arc::clone(&n);
    let server = Server::start(move |request| {
        let tag = request.path.ends_with("/manifests/t");
        let mut answer = if tag && turn.fetch_add(1, Ordering::Relaxed) == 0 { first.answer(request) } else { second.answer(request) };
        if answer.status == 404 {
            answer = first.answer(request);
        }
        answer
    })
    .await;
    let mut died = 0;
    for step in Step::ALL {
        for count in 1..=4 {
            n.store(0, Ordering::Relaxed);
            let node = Node::new(&[&server.host]);
            let mut child = command(std::env::current_exe().unwrap());
            child
                .args(["--exact", "store::the_doomed_process"])
                .env("COPEPOD_TEST_DOOMED", node.directory.path())
                .env("COPEPOD_TEST_HOST", &server.host);
            child.env("COPEPOD_TEST_DIE_AT", format!("{step:?} {count}")).env_remove("RUST_BACKTRACE");
            let output = tokio::task::spawn_blocking(move || child.output().unwrap()).await.unwrap();
            let lived = output.status.success();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(lived || std::os::unix::process::ExitStatusExt::signal(&output.status) == Some(6), "{step:?} {count}: {text}");
            died += usize::from(!lived);
            assert!(!lived || count > 1, "{step:?} never happens");

            // What is listed is whole; what is pulled again is whole; nothing else is left.
            let images = node.open();
            for image in images.list() {
                let sample = if image.id == one.id() { &one } else { &two };
                check_files(&node, &image, sample, &[("base", b"base"), ("top", if image.id == one.id() { b"one" } else { b"two" })]);
            }
            let tagged: Vec<_> = images.list().iter().flat_map(|image| image.tags.clone()).collect();
            assert!(tagged.len() <= 1, "{step:?} {count}: {tagged:?}");
            images.collect().await;
            n.store(1, Ordering::Relaxed);
            let image = pulled(&images, &format!("{}/r:t", server.host)).await;
            check_files(&node, &image, &two, &[("base", b"base"), ("top", b"two")]);
            images.remove(&one.id()).await.unwrap();
            assert_eq!((node.names("images").len(), node.names("layers").len()), (1, 4), "{step:?} {count}");
            images.remove(&two.id()).await.unwrap();
            assert_eq!((node.names("images").len(), node.names("layers").len()), (0, 0), "{step:?} {count}");
            if lived {
                break;
            }
        }
    }
    assert!(died >= Step::ALL.len());
}
