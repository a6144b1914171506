//! Port-forward over every carrier.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::client::{Spdy, WebSocket};
use crate::world::{World, rest};

async fn target() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Bytes that tell where they belong.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n / 251 + n % 251) as u8).collect()
}

#[tokio::test]
async fn half_closes_pass_both_ways() {
    let world = World::new().await;
    let (listener, port) = target().await;
    // The client finishes first: the target reads the end, and is still heard.
    let mut client = Spdy::open(&world.forward(&[]), "portforward.k8s.io").await;
    client.pair(1, port).await;
    client.send(3, b"question", true).await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    assert_eq!(rest(&mut server).await, b"question");
    server.write_all(b"answer").await.unwrap();
    drop(server);
    while client.ended.len() < 2 {
        assert!(client.step().await);
    }
    assert_eq!((client.text(3), client.text(1), client.ended[&3], client.ended[&1]), ("answer".into(), String::new(), true, true));
    // The target finishes first: the client reads the end, and is still heard.
    client.pair(5, port).await;
    let (mut server, _) = listener.accept().await.unwrap();
    server.write_all(b"greeting").await.unwrap();
    server.shutdown().await.unwrap();
    while !client.ended.contains_key(&7) {
        assert!(client.step().await);
    }
    client.send(7, b"still there", true).await.unwrap();
    assert_eq!(rest(&mut server).await, b"still there");
    while !client.ended.contains_key(&5) {
        assert!(client.step().await);
    }
    assert_eq!((client.text(7), client.text(5)), ("greeting".into(), String::new()));
}

#[tokio::test]
async fn a_port_that_nobody_listens_on_is_an_error_of_its_connection_alone() {
    let world = World::new().await;
    let (listener, port) = target().await;
    let closed = { target().await.1 };
    let mut client = Spdy::open(&world.forward(&[]), "portforward.k8s.io").await;
    client.pair(1, closed).await;
    client.pair(5, port).await;
    let (mut server, _) = listener.accept().await.unwrap();
    while !(client.ended.contains_key(&1) && client.ended.contains_key(&3)) {
        assert!(client.step().await);
    }
    assert!(client.text(1).contains(&format!("error forwarding port {closed}")), "{}", client.text(1));
    client.send(7, b"on it goes", true).await.unwrap();
    assert_eq!(rest(&mut server).await, b"on it goes");
    // Streams that say nothing usable of themselves are refused.
    for (stream, headers) in
        [(9, vec![("streamtype", "data")]), (11, vec![("streamtype", "other"), ("port", "80")]), (13, vec![("port", "0"), ("streamtype", "error")])]
    {
        client.syn(stream, &headers).await;
        while client.ended.get(&stream) != Some(&false) {
            assert!(client.step().await);
        }
    }
}

#[tokio::test]
async fn a_reset_reaches_the_other_side_as_one() {
    let world = World::new().await;
    let (listener, port) = target().await;
    let mut client = Spdy::open(&world.forward(&[]), "portforward.k8s.io").await;
    // A client that resets its stream closes the connection to the target.
    client.pair(1, port).await;
    let (mut server, _) = listener.accept().await.unwrap();
    client.control(3, &[3u32.to_be_bytes(), 5u32.to_be_bytes()].concat()).await;
    assert_eq!(server.read(&mut [0; 8]).await.unwrap_or(0), 0);
    // A target that resets its connection resets the stream, without an error that would end the client's session.
    client.pair(5, port).await;
    let (server, _) = listener.accept().await.unwrap();
    client.send(7, b"never read", false).await.unwrap();
    server.peek(&mut [0; 1]).await.unwrap();
    drop(server);
    while !client.ended.contains_key(&7) {
        assert!(client.step().await);
    }
    assert_eq!((client.ended[&7], client.text(5)), (false, String::new()));
}

#[tokio::test]
async fn megabytes_pass_whole_both_ways_on_many_connections() {
    const CONNECTIONS: u32 = 50;
    let world = World::new().await;
    let (listener, port) = target().await;
    tokio::spawn(async move {
        loop {
            let (mut server, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut from, mut to) = server.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
                let _ = to.shutdown().await;
            });
        }
    });
    let sent = pattern(1 << 20);
    let mut client = Spdy::open(&world.forward(&[]), "portforward.k8s.io").await;
    for n in 0..CONNECTIONS {
        client.pair(4 * n + 1, port).await;
    }
    let Spdy { io, .. } = client;
    let (read, write) = io.into_split();
    let sending = async {
        let mut writer = Spdy::over(tokio::io::join(tokio::io::empty(), write));
        for part in sent.chunks(32 << 10) {
            for n in 0..CONNECTIONS {
                writer.send(4 * n + 3, part, false).await.unwrap();
            }
        }
        for n in 0..CONNECTIONS {
            writer.send(4 * n + 3, b"", true).await.unwrap();
        }
        writer
    };
    let receiving = async {
        let mut reader = Spdy::over(tokio::io::join(read, tokio::io::sink()));
        while reader.ended.len() < 2 * CONNECTIONS as usize {
            assert!(reader.step().await);
        }
        reader
    };
    let (_writer, reader) = tokio::join!(sending, receiving);
    for n in 0..CONNECTIONS {
        assert!(reader.received[&(4 * n + 3)] == sent, "connection {n}: {} bytes", reader.received[&(4 * n + 3)].len());
        assert_eq!(reader.text(4 * n + 1), "");
    }
}

#[tokio::test]
async fn websocket_has_two_channels_for_each_port() {
    let world = World::new().await;
    let (listener, port) = target().await;
    let closed = { target().await.1 };
    for protocol in ["v4.channel.k8s.io", ""] {
        let mut client = WebSocket::open(&world.forward(&[port, closed]), protocol).await;
        client.send(b"\x00question").await;
        let (mut server, _) = listener.accept().await.unwrap();
        let mut question = [0; 8];
        server.read_exact(&mut question).await.unwrap();
        assert_eq!(&question, b"question");
        server.write_all(b"answer").await.unwrap();
        drop(server);
        let received = client.finish().await;
        let begins = |port: u16, rest: &str| [&port.to_le_bytes()[..], rest.as_bytes()].concat();
        assert_eq!(received[&0], begins(port, "answer"));
        assert_eq!(received[&1], begins(port, ""));
        assert_eq!(received[&2], begins(closed, ""));
        assert!(String::from_utf8_lossy(&received[&3]).contains("error forwarding port"), "{received:?}");
    }
}

#[tokio::test]
async fn spdy_in_a_websocket_is_spdy() {
    let world = World::new().await;
    let (listener, port) = target().await;
    let websocket = WebSocket::open(&world.forward(&[]), "SPDY/3.1+portforward.k8s.io").await;
    // A client of SPDY whose bytes are cut into messages at other places than its frames.
    let (near, far) = tokio::io::duplex(64 << 10);
    let (mut far_read, mut far_write) = tokio::io::split(far);
    let (read, write) = websocket.io.into_split();
    tokio::spawn(async move {
        let mut websocket = WebSocket { io: tokio::io::join(tokio::io::empty(), write) };
        let mut part = [0; 777];
        while let Ok(n @ 1..) = far_read.read(&mut part).await {
            websocket.send(&part[..n]).await;
        }
    });
    tokio::spawn(async move {
        let mut websocket = WebSocket { io: tokio::io::join(read, tokio::io::sink()) };
        while let Some((0x82, payload)) = websocket.next().await {
            far_write.write_all(&payload).await.unwrap();
        }
    });
    let mut client = Spdy::over(near);
    client.pair(1, port).await;
    let sent = pattern(100_000);
    client.send(3, &sent, true).await.unwrap();
    let serving = async {
        let (mut server, _) = listener.accept().await.unwrap();
        assert!(rest(&mut server).await == sent);
        server.write_all(&sent).await.unwrap();
    };
    let receiving = async {
        while client.ended.len() < 2 {
            assert!(client.step().await);
        }
    };
    tokio::join!(serving, receiving);
    assert!(client.received[&3] == sent);
    assert_eq!(client.text(1), "");
}

#[tokio::test]
async fn a_client_that_vanishes_closes_its_connections() {
    let world = World::new().await;
    let (listener, port) = target().await;
    let mut client = Spdy::open(&world.forward(&[]), "portforward.k8s.io").await;
    let mut servers: Vec<TcpStream> = Vec::new();
    for n in 0..10 {
        client.pair(4 * n + 1, port).await;
        servers.push(listener.accept().await.unwrap().0);
    }
    drop(client);
    for mut server in servers {
        assert_eq!(server.read(&mut [0; 8]).await.unwrap_or(0), 0);
    }
}
