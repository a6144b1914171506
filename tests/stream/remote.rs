//! Exec and attach over every carrier.

use std::sync::atomic::Ordering;

use crate::client::{Spdy, WebSocket};
use crate::world::World;

const SUCCESS: &str = r#"{"metadata":{},"status":"Success"}"#;

#[tokio::test]
async fn spdy_carries_a_commands_streams_and_its_end() {
    let world = World::new().await;
    let check = async |version: &str, command: &[&str], expected: &dyn Fn(&str)| {
        let mut client = Spdy::open(&world.exec(command), version).await;
        client.streams("stderr").await;
        client.finish().await;
        let (out, err) = if command[0] == "both" { ("to stdout", "to stderr") } else { ("", "") };
        assert_eq!((client.text(5), client.text(7)), (out.into(), err.into()), "{version}");
        for stream in [1, 3, 5, 7] {
            assert!(client.ended[&stream], "{version}: stream {stream} has no FIN");
        }
        expected(&client.text(1));
        world.all_gone().await;
    };
    check("v4.channel.k8s.io", &["both", "0"], &|error| assert_eq!(error, SUCCESS)).await;
    check("v4.channel.k8s.io", &["both", "3"], &|error| assert!(error.contains(r#"{"reason":"ExitCode","message":"3"}"#), "{error}")).await;
    check("v4.channel.k8s.io", &["refused"], &|error| assert!(error.contains("cannot run the command: no such program"), "{error}")).await;
    for version in ["channel.k8s.io", "v2.channel.k8s.io", "v3.channel.k8s.io"] {
        check(version, &["both", "0"], &|error| assert_eq!(error, "")).await;
        check(version, &["both", "3"], &|error| assert!(error.ends_with("exit status 3"), "{error}")).await;
    }
}

#[tokio::test]
async fn a_finished_stdin_ends_the_command() {
    let world = World::new().await;
    let mut client = Spdy::open(&world.exec(&["cat"]), "v4.channel.k8s.io").await;
    client.streams("stderr").await;
    client.send(3, b"what goes in", false).await.unwrap();
    client.send(3, b" comes out", true).await.unwrap();
    client.finish().await;
    assert_eq!((client.text(5), client.text(1)), ("what goes in comes out".into(), SUCCESS.into()));

    let mut client = WebSocket::open(&world.exec(&["cat"]), "v5.channel.k8s.io").await;
    client.send(b"\x00what goes in").await;
    client.frame(0x02, b"\x00 comes").await;
    client.frame(0x89, b"ping").await;
    client.frame(0x80, b" out").await;
    client.send(&[255, 0]).await;
    let mut received = Vec::new();
    let mut ponged = false;
    while let Some((first, payload)) = client.next().await {
        match first {
            0x8a => ponged = payload == b"ping",
            0x82 if payload[0] == 1 => received.extend_from_slice(&payload[1..]),
            0x82 => assert_eq!((payload[0], &payload[1..]), (3, SUCCESS.as_bytes())),
            _ => break,
        }
    }
    assert!(ponged);
    assert_eq!(received, b"what goes in comes out");
    world.all_gone().await;
}

#[tokio::test]
async fn websocket_carries_a_commands_streams_and_its_end() {
    let world = World::new().await;
    let check = async |url: &str, protocol: &str, expected: &dyn Fn(&str)| {
        let base64 = protocol.contains("base64");
        let received = WebSocket::open(url, protocol).await.finish().await;
        let text = |channel: u8| {
            let bytes = received.get(&if base64 { b'0' + channel } else { channel }).cloned().unwrap_or_default();
            let bytes = if base64 { decode(&bytes) } else { bytes };
            String::from_utf8(bytes).unwrap()
        };
        assert_eq!((text(1), text(2)), ("to stdout".into(), "to stderr".into()), "{protocol}");
        expected(&text(3));
        world.all_gone().await;
    };
    for protocol in ["v4.channel.k8s.io", "v5.channel.k8s.io", "v4.base64.channel.k8s.io"] {
        check(&world.exec(&["both", "0"]), protocol, &|error| assert_eq!(error, SUCCESS)).await;
        check(&world.exec(&["both", "9"]), protocol, &|error| assert!(error.contains(r#""message":"9""#), "{error}")).await;
        // Of an attached container the exit says nothing.
        check(&world.attach("both 9"), protocol, &|error| assert_eq!(error, SUCCESS)).await;
    }
    for protocol in ["", "channel.k8s.io", "base64.channel.k8s.io"] {
        check(&world.exec(&["both", "0"]), protocol, &|error| assert_eq!(error, "")).await;
        check(&world.exec(&["both", "9"]), protocol, &|error| assert!(error.ends_with("exit status 9"), "{error}")).await;
    }
}

/// Of texts of which each stands for itself.
fn decode(text: &[u8]) -> Vec<u8> {
    use base64::Engine;
    let texts = text.split_inclusive(|byte| *byte == b'=').flat_map(|part| if part == b"=" { None } else { Some(part) });
    let mut bytes = Vec::new();
    for text in texts {
        let mut text = text.to_vec();
        while !text.len().is_multiple_of(4) {
            text.push(b'=');
        }
        bytes.extend(base64::engine::general_purpose::STANDARD.decode(&text).unwrap());
    }
    bytes
}

#[tokio::test]
async fn a_terminal_hears_its_size() {
    let world = World::new().await;
    let mut client = Spdy::open(&world.terminal("size"), "v4.channel.k8s.io").await;
    client.streams("resize").await;
    client.send(7, b"{\"Width\":80,\"Hei", false).await.unwrap();
    client.send(7, b"ght\":24}\n", false).await.unwrap();
    while client.text(5) != "80x24\n" {
        assert!(client.step().await);
    }
    client.send(7, b"{\"Width\":132,\"Height\":50}\n", true).await.unwrap();
    while client.text(5) != "80x24\n132x50\n" {
        assert!(client.step().await);
    }
    drop(client);
    world.all_gone().await;
    let mut client = WebSocket::open(&world.terminal("size"), "v4.channel.k8s.io").await;
    client.send(b"\x04{\"Width\":80,\"Height\":24}\n").await;
    assert_eq!(client.next().await, Some((0x82, vec![1])));
    assert_eq!(client.next().await, Some((0x82, b"\x0180x24\n".to_vec())));
}

#[tokio::test]
async fn a_client_that_vanishes_takes_its_command_along() {
    let world = World::new().await;
    for command in ["deaf", "cat", "flood"] {
        let mut client = Spdy::open(&world.exec(&[command]), "v4.channel.k8s.io").await;
        client.streams("stderr").await;
        while world.seen.live.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        drop(client);
        world.all_gone().await;
        let client = WebSocket::open(&world.exec(&[command]), "v5.channel.k8s.io").await;
        while world.seen.live.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        drop(client);
        world.all_gone().await;
    }
    // Also one that has sent more than is taken of it, so that nothing more is read from it.
    let mut client = Spdy::open(&world.exec(&["deaf"]), "v4.channel.k8s.io").await;
    client.streams("stderr").await;
    let sending = async { while client.send(3, &[0; 65536], false).await.is_ok() {} };
    let full = async {
        while world.seen.live.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = sending => {}
        () = async { full.await; tokio::time::sleep(std::time::Duration::from_millis(300)).await } => {}
    }
    drop(client);
    world.all_gone().await;
}

#[tokio::test]
async fn a_slow_client_holds_its_command_up() {
    let world = World::new().await;
    let mut client = Spdy::open(&world.exec(&["flood"]), "v4.channel.k8s.io").await;
    client.streams("stderr").await;
    let mut received = 0;
    while received < 48 << 20 {
        assert!(client.step().await);
        received += client.received.remove(&5).map_or(0, |bytes| bytes.len() as u64);
        // The sockets' own buffers are the largest part of it.
        let ahead = world.seen.flooded.load(Ordering::Relaxed).saturating_sub(received);
        assert!(ahead < 16 << 20, "{ahead} bytes ahead");
    }
}
