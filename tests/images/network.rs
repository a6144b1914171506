//! The way to a registry: client certificates and proxies.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use copepod::errchain::{Chain, Kind, Kinded};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use super::registry::{self, Registry};
use super::root::root;
use super::sample::{Content, Layer, Sample, noise};
use super::server::{Answer, Request, Server};
use super::{Node, check_files, child_of, config, elsewhere, fails};

#[tokio::test(flavor = "multi_thread")]
async fn client_certificates_are_shown_and_rotated() {
    if !root("client_certificates_are_shown_and_rotated") {
        return;
    }
    let (directory, strangers) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (certificate, key, ca) = registry::certificate(directory.path());
    let (other_certificate, other_key, _) = registry::certificate(strangers.path());
    let registry = Registry::start_for(directory.path(), false, Some((&certificate, &key)), Some(&ca));
    let node = Node::new(&[]);
    let images = node.open();
    let name = format!("{}/a", registry.host);
    let certs = node.config.certs_dirs[0].join(&registry.host);
    std::fs::create_dir_all(&certs).unwrap();
    let put = |from: &Path, name: &str| {
        std::fs::copy(from, certs.join(name)).unwrap();
    };
    put(&ca, "ca.crt");
    fails(&images, &name, None, Kind::Unavailable, "cannot reach registry").await;
    put(&certificate, "client.cert");
    fails(&images, &name, None, Kind::FailedPrecondition, "client.key").await;
    put(&key, "other.key");
    fails(&images, &name, None, Kind::FailedPrecondition, "other.key has no certificate").await;
    std::fs::rename(certs.join("other.key"), certs.join("client.key")).unwrap();
    // It is let in: the registry has no such image.
    fails(&images, &name, None, Kind::NotFound, "answers 404").await;
    // Each pull reads the files again.
    put(&other_certificate, "client.cert");
    fails(&images, &name, None, Kind::FailedPrecondition, "client.cert").await;
    put(&other_key, "client.key");
    fails(&images, &name, None, Kind::Unavailable, "cannot reach registry").await;
    put(&certificate, "client.cert");
    put(&key, "client.key");
    fails(&images, &name, None, Kind::NotFound, "answers 404").await;
    std::fs::write(certs.join("ca.crt"), "-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n").unwrap();
    fails(&images, &name, None, Kind::FailedPrecondition, "ca.crt").await;
    std::fs::remove_file(certs.join("ca.crt")).unwrap();
    fails(&images, &name, None, Kind::Unavailable, "certificate is not trusted").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_may_go_away_for_a_moment() {
    if !root("a_registry_may_go_away_for_a_moment") {
        return;
    }
    let file = noise(3_000_000, 5);
    let sample = Sample::new("x", &[Layer::new(&[("f", &file)])]);
    let digest = sample.layers[0].digest().to_string();
    let content = Content::default().add("x", &sample);
    let (copy, path, cut) = (content.clone(), digest.clone(), Arc::new(Notify::new()));
    let tell = Arc::clone(&cut);
    let server = Server::start(move |request| {
        let answer = copy.answer(request);
        if request.path.contains(&path) {
            tell.notify_one();
            return answer.stop_after(1_000_000);
        }
        answer
    })
    .await;
    let node = Node::new(&[&server.host]);
    let images = node.open();
    let (host, reference) = (server.host.clone(), format!("{}/r:x", server.host));
    let pulling = tokio::spawn(async move { images.pull(&reference, None).await.map_err(|error| Chain(&error).to_string()) });
    cut.notified().await;
    drop(server);
    while TcpStream::connect(&host).await.is_ok() {
        tokio::task::yield_now().await;
    }
    // So long it is away; the pull waits longer than that.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let server = Server::start_at(&host, move |request| content.answer(request)).await;
    check_files(&node, &pulling.await.unwrap().unwrap(), &sample, &[("f", &file)]);
    assert_eq!((server.count(&digest), server.count("/manifests/")), (1, 0));
}

/// A proxy that connects `secure.test:443` with a registry and nobody else with anything. Gives its address.
async fn tunnel(registry: String) -> (String, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let task = tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let registry = registry.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(client.read_u8().await?);
                }
                if !head.starts_with(b"CONNECT secure.test:443 ") {
                    return client.write_all(b"HTTP/1.1 502 No\r\n\r\n").await;
                }
                let mut server = TcpStream::connect(registry).await?;
                client.write_all(b"HTTP/1.1 200 Yes\r\n\r\n").await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await.map(drop)
            });
        }
    });
    (host, task)
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_of_the_environment_are_used() {
    if !root("proxies_of_the_environment_are_used") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key, ca) = registry::certificate(directory.path());
    let secure = Registry::start(directory.path(), false, Some((&certificate, &key)));
    let certs = directory.path().join("certs.d/secure.test");
    std::fs::create_dir_all(&certs).unwrap();
    std::fs::copy(&ca, certs.join("ca.crt")).unwrap();
    let (https, _task) = tunnel(secure.host.clone()).await;

    let sample = Sample::simple("x");
    let content = Content::default().add("x", &sample);
    let copy = content.clone();
    let direct = Server::start(move |request| copy.answer(request)).await;
    // A proxy is asked for whole URLs.
    let http = Server::start(
        move |request: &Request| {
            if request.path.starts_with("http://proxied.test:5000/v2/") { content.answer(request) } else { Answer::new(502, "") }
        },
    )
    .await;
    let conf =
        format!("[[registry]]\nlocation = \"proxied.test:5000\"\ninsecure = true\n[[registry]]\nlocation = \"{}\"\ninsecure = true\n", direct.host);
    std::fs::write(directory.path().join("registries.conf"), conf).unwrap();
    let variables = [
        ("HTTP_PROXY", format!("http://{}", http.host)),
        ("HTTPS_PROXY", format!("http://{https}")),
        ("NO_PROXY", "localhost,127.0.0.1".to_string()),
        ("COPEPOD_TEST_HOST", direct.host.clone()),
    ];
    elsewhere("network::the_process_behind_a_proxy", directory.path(), &variables).await;
    assert!(http.count("http://proxied.test:5000/v2/r/blobs/") >= 3);
    assert_eq!(http.count(&direct.host), 0);
    assert_eq!(direct.count("/v2/r/manifests/x"), 1);
}

/// Only ever does something in the process that `proxies_of_the_environment_are_used` starts.
#[tokio::test(flavor = "multi_thread")]
async fn the_process_behind_a_proxy() {
    let Some(directory) = child_of("network::the_process_behind_a_proxy") else { return };
    let images = copepod::image::Images::open(config(&directory)).unwrap();
    let pull = async |name: &str| images.pull(name, None).await.map(|image| image.id.clone()).map_err(|e| (e.kind(), Chain(&e).to_string()));
    // Neither name can be resolved here: only a proxy gets there.
    let id = pull("proxied.test:5000/r:x").await.unwrap();
    images.remove(&id).await.unwrap();
    let (kind, text) = pull("secure.test/r:x").await.unwrap_err();
    assert_eq!((kind, text.contains("answers 404")), (Kind::NotFound, true), "{text}");
    assert_eq!(pull("elsewhere.test/r:x").await.unwrap_err().0, Kind::Unavailable);
    // Who needs no proxy is spoken to directly.
    assert_eq!(pull(&format!("{}/r:x", std::env::var("COPEPOD_TEST_HOST").unwrap())).await.unwrap(), id);
}
