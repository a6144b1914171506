//! Images from real and from hostile registries; `images/store.rs` kills, fills up and damages the store.
#![cfg(feature = "daemon")]

#[path = "images/auth.rs"]
mod auth;
#[path = "images/names.rs"]
mod names;
#[path = "images/network.rs"]
mod network;
#[path = "images/registry.rs"]
mod registry;
#[path = "common/root.rs"]
mod root;
#[path = "images/sample.rs"]
mod sample;
#[path = "images/server.rs"]
mod server;
#[path = "images/store.rs"]
mod store;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use copepod::errchain::{Chain, Kind, Kinded};
use copepod::image::{Config, Credentials, Image, Images, Platform};
use registry::Registry;
use root::root;
use sample::{Content, Layer, Sample, noise};
use server::{Answer, Request, Server};

/// A store in a directory of its own.
struct Node {
    directory: tempfile::TempDir,
    config: Config,
}

impl Node {
    /// That may speak plain HTTP to `insecure`.
    fn new(insecure: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let text: String = insecure.iter().map(|host| format!("[[registry]]\nlocation = \"{host}\"\ninsecure = true\n")).collect();
        std::fs::write(&config.registries_conf, text).unwrap();
        Self { directory, config }
    }

    fn open(&self) -> Arc<Images> {
        Images::open(self.config.clone()).unwrap_or_else(|e| panic!("{}", Chain(&e)))
    }

    fn conf(&self, text: &str) {
        std::fs::write(&self.config.registries_conf, text).unwrap();
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join("store").join(path)
    }

    fn names(&self, path: &str) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.path(path)).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn config(directory: &Path) -> Config {
    let mut config = Config::new(directory.join("store"));
    config.registries_conf = directory.join("registries.conf");
    config.registries_conf_dir = directory.join("registries.conf.d");
    config.certs_dirs = vec![directory.join("certs.d")];
    config.platform = Platform::new("linux", "amd64", "v2");
    config.progress_timeout = Duration::from_secs(20);
    config.orphan_grace = Duration::ZERO;
    config
}

fn credentials(password: &str) -> Option<Credentials> {
    Some(Credentials { username: registry::USER.into(), password: password.into(), ..Credentials::default() })
}

async fn pulled(images: &Arc<Images>, reference: &str) -> Arc<Image> {
    images.pull(reference, None).await.unwrap_or_else(|e| panic!("{reference}: {}", Chain(&e)))
}

/// The pull fails with a kind, and with a text that holds `part`.
async fn fails(images: &Arc<Images>, reference: &str, auth: Option<Credentials>, kind: Kind, part: &str) {
    let error = images.pull(reference, auth).await.expect_err(part);
    let text = Chain(&error).to_string();
    assert_eq!((error.kind(), text.contains(part)), (kind, true), "{text}");
}

/// Runs a test of this program in a process of its own, which has other variables in its environment.
async fn elsewhere(test: &str, directory: &Path, variables: &[(&str, String)]) {
    let mut child = copepod::sys::process::command(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture"]).env("COPEPOD_TEST_CHILD", test).env("COPEPOD_TEST_DIRECTORY", directory);
    child.envs(variables.iter().map(|(name, value)| (name, value)));
    let output = tokio::task::spawn_blocking(move || child.output().unwrap()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// The directory given to [`elsewhere`], in the process that it started for this test and in no other.
fn child_of(test: &str) -> Option<PathBuf> {
    let mine = std::env::var("COPEPOD_TEST_CHILD").is_ok_and(|name| name == test);
    mine.then(|| std::env::var_os("COPEPOD_TEST_DIRECTORY").unwrap().into())
}

/// Every file of the image's layers is there, with its content.
fn check_files(node: &Node, image: &Image, sample: &Sample, expected: &[(&str, &[u8])]) {
    assert_eq!(image.id, sample.id());
    for (path, content) in expected {
        let found = image.layers.iter().map(|layer| node.path("layers").join(layer).join(path)).find(|p| p.exists());
        assert_eq!(std::fs::read(found.unwrap_or_else(|| panic!("{path} is missing"))).unwrap(), *content, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_registry_serves_images() {
    if !root("a_real_registry_serves_images") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path(), true, None);
    let (one, other) = (Sample::simple("one"), Sample::simple("other"));
    registry.push("team/app", "v1", &one);
    registry.push("team/app", "latest", &one);
    registry.push("team/app", "v2", &other);
    let node = Node::new(&[&registry.host]);
    let images = node.open();
    let name = |rest: &str| format!("{}/team/app{rest}", registry.host);

    fails(&images, &name(""), None, Kind::Unauthenticated, "none were given").await;
    fails(&images, &name(""), credentials("wrong"), Kind::Unauthenticated, "not accepted").await;
    fails(&images, &name(":missing"), credentials("secret"), Kind::NotFound, "manifest unknown").await;
    let elsewhere = Credentials { server_address: "other.example.com".into(), ..credentials("secret").unwrap() };
    fails(&images, &name(""), Some(elsewhere), Kind::Unauthenticated, "none were given").await;
    assert!(images.list().is_empty());

    let image = images.pull(&name(""), credentials("secret")).await.unwrap();
    check_files(&node, &image, &one, &[("base", b"base"), ("top", b"one")]);
    assert_eq!(image.tags, [name(":latest")]);
    assert_eq!(image.digests, [name(&format!("@{}", one.digest()))]);
    assert_eq!((image.config.user.as_str(), image.config.env.as_slice()), ("5", &["A=b".to_string()][..]));
    assert!(image.size > 0);

    let twice = images.pull(&name(":v1"), credentials("secret")).await.unwrap();
    assert_eq!((twice.id.clone(), twice.tags.clone()), (one.id(), vec![name(":latest"), name(":v1")]));
    let second = images.pull(&name(&format!("@{}", other.digest())), credentials("secret")).await.unwrap();
    assert_eq!((second.tags.len(), second.digests.len()), (0, 1));
    // The lowest layer is the same one.
    assert_eq!(second.layers[1], twice.layers[1]);
    assert_eq!(images.list().len(), 2);

    let found = |reference: &str| images.find(reference).unwrap().map(|image| image.id.clone());
    let hex = one.id()["sha256:".len()..].to_string();
    for reference in
        [&name(""), &name(":v1"), &name(&format!("@{}", one.digest())), &one.id(), &hex, &hex[..12].to_string(), &format!("sha256:{}", &hex[..20])]
    {
        assert_eq!(found(reference), Some(one.id()), "{reference}");
    }
    assert_eq!(found(&name(":v2")), None);
    assert_eq!(found("busybox"), None);
    assert_eq!(images.find("a b").unwrap_err().kind(), Kind::InvalidArgument);

    let before = images.fs_info().await.unwrap();
    assert!(before.used_bytes > 0 && before.used_inodes > 6 && before.mountpoint == node.path(""));
    // Removed by one tag, it is gone with all of them; what the other image shares stays.
    images.collect().await;
    images.remove(&name(":v1")).await.unwrap();
    images.remove(&name(":v1")).await.unwrap();
    assert_eq!((found(&name("")), found(&one.id())), (None, None));
    check_files(&node, &images.list()[0], &other, &[("base", b"base"), ("top", b"other")]);
    assert!(images.fs_info().await.unwrap().used_bytes < before.used_bytes);
    images.remove(&other.id()).await.unwrap();
    assert_eq!((images.list().len(), images.fs_info().await.unwrap().used_bytes), (0, 0));
    assert_eq!((node.names("images"), node.names("layers")), (vec![], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_checked_as_configured() {
    if !root("tls_is_checked_as_configured") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key, ca) = registry::certificate(directory.path());
    let registry = Registry::start(directory.path(), false, Some((&certificate, &key)));
    let node = Node::new(&[]);
    let images = node.open();
    let name = format!("{}/a", registry.host);
    fails(&images, &name, None, Kind::Unavailable, "its certificate is not trusted").await;
    // Without a restart.
    node.conf(&format!("[[registry]]\nlocation = \"{}\"\ninsecure = true\n", registry.host));
    fails(&images, &name, None, Kind::NotFound, "answers 404").await;
    node.conf("");
    let certs = node.config.certs_dirs[0].join(&registry.host);
    std::fs::create_dir_all(&certs).unwrap();
    std::fs::copy(&ca, certs.join("ca.crt")).unwrap();
    fails(&images, &name, None, Kind::NotFound, "answers 404").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_of_one_image_are_one() {
    if !root("pulls_of_one_image_are_one") {
        return;
    }
    let shared = Layer::new(&[("shared", &noise(3_000_000, 1))]);
    let (a, b) = (Sample::new("a", &[shared.clone(), Layer::new(&[("a", b"a")])]), Sample::new("b", std::slice::from_ref(&shared)));
    let content = Content::default().add("a", &a).add("b", &b);
    let server = Server::start(move |request| content.answer(request)).await;
    let node = Node::new(&[&server.host]);
    let images = node.open();
    let mut pulls = tokio::task::JoinSet::new();
    for n in 0..20 {
        let (images, reference) = (Arc::clone(&images), format!("{}/r:{}", server.host, if n % 2 == 0 { "a" } else { "b" }));
        pulls.spawn(async move { images.pull(&reference, None).await.map(|image| image.id.clone()).map_err(|e| Chain(&e).to_string()) });
    }
    let ids: std::collections::BTreeSet<_> = pulls.join_all().await.into_iter().map(Result::unwrap).collect();
    assert_eq!(ids, [a.id(), b.id()].into());
    assert_eq!(server.count(&shared.digest().to_string()), 1);
    assert_eq!((server.count("/manifests/a"), server.count("/manifests/b")), (1, 1));
    assert_eq!((images.list().len(), node.names("layers").len()), (2, 4));
    // Again: the registry is asked, nothing is fetched.
    server.forget();
    pulled(&images, &format!("{}/r:a", server.host)).await;
    assert_eq!((server.requests().len(), server.count("/manifests/a")), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_lives_as_long_as_somebody_waits() {
    if !root("a_pull_lives_as_long_as_somebody_waits") {
        return;
    }
    let sample = Sample::simple("x");
    let digest = sample.layers[1].digest().to_string();
    let content = Content::default().add("x", &sample);
    let first = AtomicUsize::new(0);
    let server = Server::start(move |request| {
        let answer = content.answer(request);
        if request.path.contains(&digest) && first.fetch_add(1, Ordering::Relaxed) == 0 { answer.hang_after(5) } else { answer }
    })
    .await;
    let node = Node::new(&[&server.host]);
    let images = node.open();
    let reference = format!("{}/r:x", server.host);
    let mut one = Box::pin(images.pull(&reference, None));
    let mut two = Box::pin(images.pull(&reference, None));
    // Both wait, one goes: the pull stays. The other goes: the connection that hangs is closed.
    let stuck = async {
        while server.count("/blobs/") < 3 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! { biased; _ = &mut one => panic!("ended"), _ = &mut two => panic!("ended"), () = stuck => {} }
    drop(one);
    assert_eq!(server.given_up.available_permits(), 0);
    drop(two);
    let _ = server.given_up.acquire().await.unwrap();
    assert_eq!(server.count("/manifests/"), 1);
    check_files(&node, &*pulled(&images, &reference).await, &sample, &[("top", b"x")]);
}

/// Basic credentials of the tests' user.
const BASIC: &str = "Basic cG9kOnNlY3JldA==";

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_shown_to_nobody_else() {
    if !root("credentials_are_shown_to_nobody_else") {
        return;
    }
    let sample = Sample::simple("x");
    let content = Content::default().add("x", &sample);
    let blobs = content.clone();
    let cdn = Server::start(move |request| blobs.answer(request)).await;
    let tokens = Server::start(|request: &Request| {
        let known = request.header("authorization") == BASIC || request.body.contains("refresh_token=identity");
        if known { Answer::new(200, r#"{"token":"good"}"#) } else { Answer::new(401, "") }
    })
    .await;
    let (realm, elsewhere) = (tokens.host.clone(), cdn.host.clone());
    let registry = Server::start(move |request: &Request| {
        if request.header("authorization") != "Bearer good" {
            let challenge = format!("Bearer realm=\"http://{realm}/token\",service=\"registry\",scope=\"repository:r:pull\"");
            return Answer::new(401, "").with("www-authenticate", challenge);
        }
        if request.path.contains("/blobs/") {
            return Answer::new(307, "").with("location", format!("http://{elsewhere}{}", request.path));
        }
        content.answer(request)
    })
    .await;
    let node = Node::new(&[&registry.host]);
    let images = node.open();
    let reference = format!("{}/r:x", registry.host);
    fails(&images, &reference, None, Kind::Unauthenticated, "none were given").await;
    fails(&images, &reference, credentials("wrong"), Kind::Unauthenticated, "not accepted").await;
    tokens.forget();
    images.pull(&reference, credentials("secret")).await.unwrap();
    let asked = tokens.requests();
    assert_eq!(asked.len(), 1, "one token serves the whole pull");
    assert!(asked[0].path.contains("scope=repository%3Ar%3Apull") && asked[0].path.contains("service=registry"), "{}", asked[0].path);
    let first = registry.requests()[0].clone();
    assert_eq!(first.header("authorization"), "", "nothing is shown before it is asked for");
    assert!(registry.requests().iter().all(|r| r.header("authorization") != BASIC));
    assert!(cdn.count("/blobs/") >= 3);
    assert!(cdn.requests().iter().all(|r| r.header("authorization").is_empty()));

    let token = |field: fn(&mut Credentials)| {
        let mut credentials = Credentials::default();
        field(&mut credentials);
        Some(credentials)
    };
    images.pull(&reference, token(|c| c.identity_token = "identity".into())).await.unwrap();
    assert!(tokens.requests().last().unwrap().body.contains("grant_type=refresh_token"));
    tokens.forget();
    images.pull(&reference, token(|c| c.registry_token = "good".into())).await.unwrap();
    assert!(tokens.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_registries_are_asked_again() {
    if !root("busy_registries_are_asked_again") {
        return;
    }
    let sample = Sample::simple("x");
    let content = Content::default().add("x", &sample);
    let n = AtomicUsize::new(0);
    let server = Server::start(move |request| match n.fetch_add(1, Ordering::Relaxed) {
        0 => Answer::new(429, "").with("retry-after", "0"),
        1 => Answer::new(503, ""),
        2 => Answer::new(200, "").stop_after(0),
        _ => content.answer(request),
    })
    .await;
    let node = Node::new(&[&server.host]);
    let images = node.open();
    // The third answer is no manifest: an error of its own; then all is well.
    fails(&images, &format!("{}/r:x", server.host), None, Kind::FailedPrecondition, "manifest cannot be read").await;
    pulled(&images, &format!("{}/r:x", server.host)).await;

    let down = Server::start(|_: &Request| Answer::new(503, "").with("retry-after", "0")).await;
    node.conf(&format!("[[registry]]\nlocation = \"{}\"\ninsecure = true\n", down.host));
    fails(&images, &format!("{}/r:x", down.host), None, Kind::Unavailable, "RegistryUnavailable: cannot pull").await;
    assert_eq!(down.requests().len(), 5);
    let nobody = down.host.clone();
    drop(down);
    fails(&images, &format!("{nobody}/r:x"), None, Kind::Unavailable, "RegistryUnavailable").await;
    node.conf("");
    fails(&images, &format!("{}/r:x", server.host), None, Kind::Unavailable, "set insecure = true for it in registries.conf").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_transfers_go_on_where_they_stopped() {
    if !root("cut_transfers_go_on_where_they_stopped") {
        return;
    }
    let file = noise(5_000_000, 7);
    let sample = Sample::new("x", &[Layer::new(&[("f", &file)])]);
    let digest = sample.layers[0].digest().to_string();
    // What a registry does on the n-th request for the layer.
    let check = async |name: &str, fault: fn(usize, Answer, &Request) -> Answer, expected: Result<usize, (Kind, &str)>| {
        let (content, path) = (Content::default().add("x", &sample), digest.clone());
        let n = AtomicUsize::new(0);
        let server = Server::start(move |request| {
            let answer = content.answer(request);
            if request.path.contains(&path) { fault(n.fetch_add(1, Ordering::Relaxed), answer, request) } else { answer }
        })
        .await;
        let mut node = Node::new(&[&server.host]);
        node.config.progress_timeout = Duration::from_secs(2);
        let images = node.open();
        match expected {
            Ok(requests) => {
                let image = pulled(&images, &format!("{}/r:x", server.host)).await;
                check_files(&node, &image, &sample, &[("f", &file)]);
                assert_eq!(server.count(&digest), requests, "{name}");
            }
            Err((kind, part)) => {
                fails(&images, &format!("{}/r:x", server.host), None, kind, part).await;
                images.collect().await;
                assert_eq!((node.names("images").len(), node.names("layers").len()), (0, 0), "{name}");
            }
        }
    };
    check("cut twice", |n, answer, _| if n < 2 { answer.stop_after(1_500_000) } else { answer }, Ok(3)).await;
    check("cut at once", |n, answer, _| if n == 0 { answer.stop_after(0) } else { answer }, Ok(2)).await;
    let no_part = |n: usize, answer: Answer, request: &Request| match n {
        0 => answer.stop_after(1_500_000),
        _ if request.from().is_some() => Answer::new(416, ""),
        _ => answer,
    };
    check("parts are refused", no_part, Ok(3)).await;
    check("cut for ever", |_, answer, _| answer.stop_after(10), Err((Kind::Unavailable, "again and again"))).await;
    check("nothing more comes", |_, answer, _| answer.hang_after(2_000_000), Err((Kind::DeadlineExceeded, "no progress for 2 s in layer sha256:")))
        .await;
    check(
        "another part",
        |n, answer, _| {
            if n == 0 { answer.stop_after(1_000_000) } else { Answer { headers: vec![("content-range".into(), "bytes 0-9/10".into())], ..answer } }
        },
        Err((Kind::FailedPrecondition, "not one from byte 1000000")),
    )
    .await;
    check("shorter", |_, mut answer, _| (answer.body.pop(), answer).1, Err((Kind::FailedPrecondition, "bytes, not"))).await;
    check("other bytes", |_, mut answer, _| (answer.body[2_000_000] ^= 1, answer).1, Err((Kind::FailedPrecondition, "layer has digest"))).await;
    check("other bytes at the start", |_, mut answer, _| (answer.body[0] ^= 1, answer).1, Err((Kind::FailedPrecondition, "layer has digest"))).await;
    check("gone", |_, _, _| Answer::new(404, ""), Err((Kind::NotFound, "answers 404 for layer"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_without_ranges_starts_again() {
    if !root("a_registry_without_ranges_starts_again") {
        return;
    }
    let file = noise(2_000_000, 3);
    let sample = Sample::new("x", &[Layer::new(&[("f", &file)])]);
    let (content, blob) = (Content::default().add("x", &sample), sample.layers[0].blob.clone());
    let path = sample.layers[0].digest().to_string();
    let n = AtomicUsize::new(0);
    let server = Server::start(move |request| match n.load(Ordering::Relaxed) {
        _ if !request.path.contains(&path) => content.answer(request),
        _ if n.fetch_add(1, Ordering::Relaxed) == 0 => Answer::new(200, blob.clone()).stop_after(1_000_000),
        _ => Answer::new(200, blob.clone()),
    })
    .await;
    let node = Node::new(&[&server.host]);
    let image = pulled(&node.open(), &format!("{}/r:x", server.host)).await;
    check_files(&node, &image, &sample, &[("f", &file)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_that_lie_are_refused() {
    if !root("documents_that_lie_are_refused") {
        return;
    }
    let check = async |manifest: &dyn Fn(&Sample) -> String, name: &str, kind: Kind, part: &str| {
        let sample = Sample::simple("x");
        let mut content = Content::default().add("good", &sample);
        content.document("bad", sample::MANIFEST, &manifest(&sample));
        let server = Server::start(move |request| content.answer(request)).await;
        let node = Node::new(&[&server.host]);
        let images = node.open();
        fails(&images, &format!("{}/r{name}", server.host), None, kind, part).await;
        assert!(images.list().is_empty());
        images.collect().await;
        assert_eq!(node.names("layers").len(), 0, "{part}");
    };
    let wrong = format!("@sha256:{}", "1".repeat(64));
    check(&|s| s.manifest.clone(), &wrong, Kind::NotFound, "404").await;
    check(&|s| s.manifest.replace("\"layers\"", "\"manifests\":[],\"layers\""), ":bad", Kind::FailedPrecondition, "both manifests and layers").await;
    check(&|_| r#"{"schemaVersion":1,"fsLayers":[]}"#.into(), ":bad", Kind::Unimplemented, "schema 1").await;
    check(&|s| s.manifest.replacen("\"size\":", "\"size\":1", 1), ":bad", Kind::FailedPrecondition, "").await;
    check(
        &|s| {
            let shorter = Sample::new("x", &s.layers[..1]);
            let config = |s: &Sample| sample::descriptor("application/vnd.oci.image.config.v1+json", s.config.as_bytes(), "");
            shorter.manifest.replace(&config(&shorter), &config(s))
        },
        ":bad",
        Kind::FailedPrecondition,
        "its manifest has 1 layers, its configuration 2",
    )
    .await;
    // Layers in the wrong order: each has the other's diff id.
    check(
        &|s| {
            let swapped = Sample::new("x", &[s.layers[1].clone(), s.layers[0].clone()]);
            swapped.manifest.replace(&swapped.id(), &s.id())
        },
        ":bad",
        Kind::FailedPrecondition,
        "layer has diff id",
    )
    .await;
    check(&|s| format!("{}{}", s.manifest, " ".repeat(5 << 20)), ":bad", Kind::ResourceExhausted, "sends more than").await;
    check(&|s| s.list().replace("\"amd64\"", "\"riscv64\""), ":bad", Kind::FailedPrecondition, "contradicts").await;

    // By digest the bytes must be those.
    let sample = Sample::simple("x");
    let server = Server::start(|_: &Request| Answer::new(200, "{}")).await;
    let node = Node::new(&[&server.host]);
    fails(&node.open(), &format!("{}/r@{}", server.host, sample.digest()), None, Kind::FailedPrecondition, "with digest").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_mirrors_and_odd_images() {
    if !root("lists_mirrors_and_odd_images") {
        return;
    }
    let (listed, empty) = (Sample::simple("listed"), Sample::new("empty", &[]));
    let layer = Layer::new(&[("f", b"f")]);
    let doubled = Sample::new("doubled", &[layer.clone(), Layer::new(&[("g", b"g")]), layer.clone()]);
    let content = Content::default().add_list("list", &listed).add("empty", &empty).add("doubled", &doubled);
    let mirrored = content.clone();
    let own = Server::start(move |request| content.answer(request)).await;
    let mirror =
        Server::start(move |request| if request.path.contains("/manifests/empty") { Answer::new(404, "") } else { mirrored.answer(request) }).await;
    let mut node = Node::new(&[&own.host]);
    node.config.pinned = vec![format!("{}/r:emp*", own.host), format!("{}/r:doubled", own.host)];
    let images = node.open();
    let name = |tag: &str| format!("{}/r:{tag}", own.host);

    let image = pulled(&images, &name("list")).await;
    check_files(&node, &image, &listed, &[("top", b"listed")]);
    assert_eq!(image.digests.len(), 2);
    assert_eq!((image.os.as_str(), image.architecture.as_str(), image.pinned), ("linux", "amd64", false));
    for digest in &image.digests {
        assert_eq!(images.find(digest).unwrap().unwrap().id, listed.id());
    }
    let none = pulled(&images, &name("empty")).await;
    assert_eq!((none.layers.len(), none.pinned), (1, true));
    assert_eq!(std::fs::read_dir(node.path("layers").join(&none.layers[0])).unwrap().count(), 0);
    let twice = pulled(&images, &name("doubled")).await;
    assert_eq!((twice.layers.len(), twice.pinned), (2, true));
    assert!(node.path("layers").join(&twice.layers[0]).join("f").exists());

    // The mirror first; what it lacks comes from the registry itself; credentials stay away from it.
    for tag in ["list", "empty", "doubled"] {
        images.remove(&name(tag)).await.unwrap();
    }
    images.collect().await;
    node.conf(&format!(
        "[[registry]]\nlocation = \"{}\"\ninsecure = true\n[[registry.mirror]]\nlocation = \"{}/proxy\"\ninsecure = true\n",
        own.host, mirror.host
    ));
    own.forget();
    images.pull(&name("list"), credentials("secret")).await.unwrap();
    assert_eq!((own.requests().len(), mirror.count("/v2/proxy/r/")), (0, 5));
    pulled(&images, &name("empty")).await;
    assert_eq!(own.count("/manifests/empty"), 1);
    assert!(mirror.requests().iter().all(|r| r.header("authorization").is_empty()));
    node.conf(&format!("[[registry]]\nlocation = \"{}\"\nblocked = true\n", own.host));
    fails(&images, &name("list"), None, Kind::PermissionDenied, "is blocked").await;
    // A file that can't be used changes nothing, and is not silent.
    node.conf("nonsense");
    fails(&images, &name("list"), None, Kind::PermissionDenied, "is blocked").await;
    assert!(images.problem().unwrap().contains("registries.conf"));
    drop(images);
    fails(&node.open(), &name("list"), None, Kind::FailedPrecondition, "cannot tell where images come from").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_move_and_images_have_many_names() {
    if !root("tags_move_and_images_have_many_names") {
        return;
    }
    let (one, two) = (Sample::simple("one"), Sample::simple("two"));
    let (first, second) = (Content::default().add("t", &one), Content::default().add("t", &two));
    let n = Arc::new(AtomicUsize::new(0));
    let (m, again) = (Arc::clone(&n), first.clone());
    let server = Server::start(move |request| if m.load(Ordering::Relaxed) == 0 { first.answer(request) } else { second.answer(request) }).await;
    let other = Server::start(move |request| again.answer(request)).await;
    let node = Node::new(&[&server.host, &other.host]);
    let images = node.open();
    let (here, there) = (format!("{}/r:t", server.host), format!("{}/other:t", other.host));
    pulled(&images, &here).await;
    let image = pulled(&images, &there).await;
    assert_eq!((image.id.clone(), image.tags.len(), image.digests.len()), (one.id(), 2, 2));
    n.store(1, Ordering::Relaxed);
    pulled(&images, &here).await;
    let check = |images: &Images| {
        let tags = |id: &str| images.find(id).unwrap().unwrap().tags.clone();
        assert_eq!((tags(&one.id()), tags(&two.id())), (vec![there.clone()], vec![here.clone()]));
    };
    check(&images);
    assert_eq!(Images::open(node.config.clone()).err().map(|e| e.kind()), Some(Kind::FailedPrecondition), "one store has one owner");
    drop(images);
    check(&node.open());
}
