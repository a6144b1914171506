//! What is malformed ends its own connection and nothing else, with as much said as the protocol allows.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::{Spdy, WebSocket};
use crate::random::Random;
use crate::world::World;

#[tokio::test]
async fn malformed_spdy_ends_with_goaway_and_takes_the_command_along() {
    let world = World::new().await;
    for wrong in [
        &[0x80, 2, 0, 1, 0, 0, 0, 0][..],
        &[0; 8],
        &[0x80, 3, 0, 6, 0, 0, 0, 1, 0],
        &[0x80, 3, 0, 1, 0, 0, 0, 12, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 1, 2],
    ] {
        let mut client = Spdy::open(&world.exec(&["deaf"]), "v4.channel.k8s.io").await;
        client.streams("stderr").await;
        client.io.write_all(wrong).await.unwrap();
        client.finish().await;
        assert_eq!(client.goaway, Some(1), "{wrong:?}");
        world.all_gone().await;
    }
}

#[tokio::test]
async fn malformed_websocket_ends_with_a_protocol_error() {
    let world = World::new().await;
    for wrong in [&[0x82, 0][..], &[0xf2, 0x80, 0, 0, 0, 0], &[0x80, 0x80, 0, 0, 0, 0], &[0x88, 0x81, 0, 0, 0, 0, 1], &[0x82, 0x81, 0, 0, 0, 0, 255]]
    {
        let mut client = WebSocket::open(&world.exec(&["deaf"]), "v5.channel.k8s.io").await;
        client.io.write_all(wrong).await.unwrap();
        assert_eq!(client.next().await, Some((0x82, vec![1])));
        assert_eq!(client.next().await, Some((0x88, 1002u16.to_be_bytes().to_vec())), "{wrong:?}");
        assert_eq!(client.next().await, None);
        world.all_gone().await;
    }
}

#[tokio::test]
async fn streams_that_no_command_has_end_the_session() {
    let world = World::new().await;
    for streams in [&["error", "stdin", "stdin"][..], &["data"], &["resize"], &["error", ""]] {
        let mut client = Spdy::open(&world.exec(&["deaf"]), "v4.channel.k8s.io").await;
        for (n, kind) in streams.iter().enumerate() {
            client.syn(2 * n as u32 + 1, &[("streamtype", kind)]).await;
        }
        client.finish().await;
        assert_eq!(client.goaway, Some(0), "{streams:?}");
    }
    world.all_gone().await;
}

#[tokio::test]
async fn noise_harms_nobody_else() {
    let world = World::new().await;
    let mut bystander = Spdy::open(&world.exec(&["cat"]), "v4.channel.k8s.io").await;
    bystander.streams("stderr").await;
    let mut random = Random(0x5eed);
    for round in 0..200 {
        let mut noise: Vec<u8> = (0..random.next(600)).map(|_| random.next(256) as u8).collect();
        if random.next(2) == 0 && noise.len() > 8 {
            // The head of a control frame, so that it gets past the first check.
            let kind = random.next(12) as u8;
            let length = (noise.len() - 8) as u16;
            noise[..8].copy_from_slice(&[0x80, 3, 0, kind, 0, 0, (length >> 8) as u8, length as u8]);
        }
        let mut io = match round % 3 {
            0 => Spdy::open(&world.exec(&["cat"]), "v4.channel.k8s.io").await.io,
            1 => Spdy::open(&world.forward(&[]), "portforward.k8s.io").await.io,
            _ => WebSocket::open(&world.forward(&[]), "SPDY/3.1+portforward.k8s.io").await.io,
        };
        let _ = io.write_all(&noise).await;
        let _ = io.shutdown().await;
        // It ends: with what, is the client's trouble.
        let _ = io.read_to_end(&mut Vec::new()).await;
    }
    bystander.send(3, b"unharmed", true).await.unwrap();
    bystander.finish().await;
    assert_eq!(bystander.text(5), "unharmed");
    world.all_gone().await;
}
