//! What is served at all, to whom, and for how long.

use std::sync::Arc;
use std::time::Duration;

use copepod::stream::{Config, TlsConfig, TlsVersion};
use copepod::sys::process::command;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use crate::client::{Spdy, WebSocket, connect, parts, request};
use crate::world::{World, config};

const SPDY: &str = "Connection: Upgrade\nUpgrade: SPDY/3.1\nX-Stream-Protocol-Version: v4.channel.k8s.io";

#[tokio::test]
async fn nothing_but_a_tokens_own_path_is_served() {
    let world = World::new().await;
    let check = async |method: &str, path: &str, headers: &str, status: &str| {
        let mut io = connect(&world.exec(&["cat"])).await;
        let head = request(&mut io, method, path, headers).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{method} {path}: {head}");
    };
    let url = world.exec(&["cat"]);
    let path = parts(&url).1;
    for wrong in [
        "/",
        "/exec",
        "/exec/",
        "/healthz",
        "/exec/AAAAAAAAAAAAAAAAAAAAAA",
        &format!("{path}/"),
        &path.replace("exec", "attach"),
        &format!("{path}x"),
    ] {
        check("POST", wrong, SPDY, "404").await;
    }
    check("PUT", path, SPDY, "405").await;
    check("HEAD", path, SPDY, "405").await;
    check("GET", path, "", "400").await;
    check("POST", path, "Connection: Upgrade\nUpgrade: SPDY/3.1", "400").await;
    check("POST", path, "Connection: Upgrade\nUpgrade: SPDY/3.1\nX-Stream-Protocol-Version: v9", "403").await;
    check("POST", path, &format!("{SPDY}\nX-Long: {}", "x".repeat(20 << 10)), "431").await;
    check("POST", path, &format!("{SPDY}{}", "\nX: x".repeat(70)), "431").await;
    // None of these has used the token up; the first that fits does.
    check("POST", path, SPDY, "101").await;
    check("POST", path, SPDY, "404").await;
}

#[tokio::test]
async fn connections_beyond_the_limit_are_turned_away() {
    let world = World::with(Config { max_connections: 2, ..config() }).await;
    let url = world.exec(&["deaf"]);
    let mut held = [connect(&url).await, connect(&url).await];
    let mut third = connect(&url).await;
    let mut answer = String::new();
    third.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    // One that is over makes room; the other is still served.
    held[0].write_all(b"nonsense\r\n\r\n").await.unwrap();
    held[0].read_to_end(&mut Vec::new()).await.unwrap();
    loop {
        let mut io = connect(&url).await;
        let head = request(&mut io, "GET", "/", "").await;
        if head.starts_with("HTTP/1.1 404 ") {
            break;
        }
        assert!(head.is_empty() || head.starts_with("HTTP/1.1 503 "), "{head}");
    }
    assert!(request(&mut held[1], "GET", "/", "").await.starts_with("HTTP/1.1 404 "));
}

#[tokio::test]
async fn a_session_in_which_nothing_moves_ends() {
    let world = World::with(Config { idle_timeout: Duration::from_millis(300), ..config() }).await;
    let mut client = Spdy::open(&world.exec(&["deaf"]), "v4.channel.k8s.io").await;
    client.streams("stderr").await;
    client.finish().await;
    assert_eq!(client.goaway, Some(0));
    world.all_gone().await;
    let mut client = WebSocket::open(&world.exec(&["deaf"]), "v5.channel.k8s.io").await;
    client.finish().await;
    world.all_gone().await;
}

#[tokio::test]
async fn the_servers_end_is_told_and_takes_sessions_along() {
    let world = World::new().await;
    let mut spdy = Spdy::open(&world.exec(&["deaf"]), "v4.channel.k8s.io").await;
    spdy.streams("stderr").await;
    let mut websocket = WebSocket::open(&world.attach("deaf"), "v4.channel.k8s.io").await;
    assert_eq!(websocket.next().await, Some((0x82, vec![1])));
    while world.seen.live.load(std::sync::atomic::Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    let clients = async {
        spdy.finish().await;
        drop(spdy.io);
        let received = websocket.finish().await;
        drop(websocket.io);
        (spdy.received, received)
    };
    let ((), (by_spdy, by_websocket)) = tokio::join!(world.server.stop(), clients);
    for told in [&by_spdy[&1], &by_websocket[&3]] {
        assert!(String::from_utf8_lossy(told).contains("shutting down"), "{told:?}");
    }
    world.all_gone().await;
}

/// A certificate for 127.0.0.1 that signs itself, in DIR/NAME.crt and DIR/NAME.key.
fn certificate(dir: &std::path::Path, name: &str) {
    let made = command("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", &format!("/CN={name}"), "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(dir.join(format!("{name}.key")))
        .arg("-out")
        .arg(dir.join(format!("{name}.crt")))
        .output()
        .expect("openssl runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

#[tokio::test]
async fn tls_follows_its_files_and_keeps_its_minimum() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["first", "second", "client"] {
        certificate(dir.path(), name);
    }
    let path = |name: &str| dir.path().join(name);
    let put = |name: &str| {
        for kind in ["crt", "key"] {
            std::fs::copy(path(&format!("{name}.{kind}")), path(&format!("new.{kind}"))).unwrap();
            std::fs::rename(path(&format!("new.{kind}")), path(&format!("served.{kind}"))).unwrap();
        }
    };
    put("first");
    let tls = TlsConfig {
        certificate: path("served.crt"),
        key: path("served.key"),
        client_authorities: Some(path("client.crt")),
        min_version: TlsVersion::V1_3,
    };
    let world = World::with(Config { tls: Some(tls), ..config() }).await;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let connector = |trusted: &str, client: bool, versions: &[&'static rustls::SupportedProtocolVersion]| {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(path(&format!("{trusted}.crt"))).unwrap()).unwrap();
        let builder =
            rustls::ClientConfig::builder_with_provider(provider.clone()).with_protocol_versions(versions).unwrap().with_root_certificates(roots);
        let config = if client {
            let key = rustls::pki_types::PrivateKeyDer::from_pem_file(path("client.key")).unwrap();
            builder.with_client_auth_cert(vec![CertificateDer::from_pem_file(path("client.crt")).unwrap()], key).unwrap()
        } else {
            builder.with_no_client_auth()
        };
        TlsConnector::from(Arc::new(config))
    };
    let (tls13, both) = (&[&rustls::version::TLS13][..], &[&rustls::version::TLS12][..]);
    let served = async |connector: TlsConnector| {
        let url = world.exec(&["both", "0"]);
        assert!(url.starts_with("https://"), "{url}");
        let mut io = connector.connect(ServerName::try_from("127.0.0.1").unwrap(), connect(&url).await).await.ok()?;
        let head = request(&mut io, "POST", parts(&url).1, SPDY).await;
        if !head.starts_with("HTTP/1.1 101 ") {
            return None;
        }
        let mut client = Spdy::over(io);
        client.streams("stderr").await;
        client.finish().await;
        Some(client.text(5))
    };
    let whole = Some("to stdout".to_owned());
    assert_eq!(served(connector("first", true, tls13)).await, whole);
    assert_eq!(served(connector("first", false, tls13)).await, None, "without a certificate");
    assert_eq!(served(connector("first", true, both)).await, None, "with TLS 1.2");
    assert_eq!(served(connector("second", true, tls13)).await, None, "another certificate");
    put("second");
    assert_eq!(served(connector("second", true, tls13)).await, whole);
    // What can't be used is not: the last pair that could stays.
    std::fs::write(path("served.crt"), "nothing").unwrap();
    assert_eq!(served(connector("second", true, tls13)).await, whole);
}
