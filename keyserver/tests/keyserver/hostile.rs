//! Clients that mean no good must not be noticed by the others.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use mesh_protocol::control::{ALPN_JOIN, ALPN_NODE, NodeMessage, ServerMessage};
use mesh_protocol::id::MeshId;
use mesh_protocol::key::SigningKey;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};

use crate::client::{Node, Transport, connect, random};
use crate::server::{DEADLINE, Server};

const ATTACKER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 66));

async fn tcp_from(source: IpAddr, server: &Server) -> Option<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((source, 0).into()).unwrap();
    socket.connect(server.address).await.ok()
}

/// Whether the other end closes within the deadline.
async fn closes(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> bool {
    let mut rest = Vec::new();
    tokio::time::timeout(DEADLINE, stream.read_to_end(&mut rest)).await.is_ok()
}

async fn quick_join(server: &Server, name: &str) -> Duration {
    let token = server.token(1);
    let begun = Instant::now();
    Node::new(name).join(server.address, &token).await.unwrap();
    begun.elapsed()
}

#[tokio::test]
async fn slow_and_garbage_clients_do_not_block_others() {
    let server = Server::start();
    let mut held = Vec::new();
    for number in 0..300 {
        let Some(mut stream) = tcp_from(ATTACKER, &server).await else { continue };
        // A handshake that never goes on, or never was one. Those over the limit are closed already.
        let _ = stream.write_all(if number % 2 == 0 { &[22, 3, 1] } else { b"GET / HTTP/1.1\r\n\r\n" }).await;
        held.push(stream);
    }
    let udp = UdpSocket::bind((ATTACKER, 0)).await.unwrap();
    for size in 0..1_000_usize {
        let _ = udp.send_to(&vec![(size % 251) as u8 | 0xc0; size], server.address).await;
    }
    assert!(quick_join(&server, "n1").await < Duration::from_secs(2));
    let begun = Instant::now();
    for stream in &mut held {
        assert!(closes(stream).await, "a slow handshake is closed");
    }
    assert!(begun.elapsed() < Duration::from_secs(8), "after {:?}", begun.elapsed());
    assert!(quick_join(&server, "n2").await < Duration::from_secs(2));
}

#[tokio::test]
async fn frames_that_are_none_end_the_connection() {
    let server = Server::start();
    let token = server.token(1);
    let mut node = Node::new("n1");
    node.join(server.address, &token).await.unwrap();
    let deep = [vec![0, 0, 39, 16], vec![0x81; 10_000]].concat();
    let cases: [&[u8]; 6] = [
        &[0, 0, 0, 0],
        &[0, 1, 0, 1, 0],
        &[255, 255, 255, 255],
        &deep,
        &[0, 0, 0, 9, 0x9b, 255, 255, 255, 255, 255, 255, 255, 255],
        &[0, 0, 0, 3, 0x82, 0x00, 0xbf],
    ];
    for (number, case) in cases.into_iter().enumerate() {
        for alpn in [ALPN_JOIN, ALPN_NODE] {
            for transport in [Transport::Quic, Transport::Tls] {
                let mut stream = connect(&node.key, alpn, server.address, transport).await.unwrap();
                let _ = stream.writer.write_all(case).await;
                let _ = stream.writer.flush().await;
                assert!(closes(&mut stream.reader).await, "case {number} over {transport:?}");
            }
        }
    }
    assert!(node.open(server.address, None, Transport::Quic).await.is_some());
}

#[tokio::test]
async fn a_header_without_a_body_is_closed_at_the_deadline() {
    let server = Server::start();
    let token = server.token(1);
    let mut node = Node::new("n1");
    node.join(server.address, &token).await.unwrap();
    let mut session = node.open(server.address, None, Transport::Tls).await.unwrap();
    session.stream.writer.write_all(&[0, 0]).await.unwrap();
    session.stream.writer.flush().await.unwrap();
    let begun = Instant::now();
    session.until_end().await;
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn unknown_messages_are_answered_and_the_session_lives() {
    let server = Server::start();
    let token = server.token(1);
    let mut node = Node::new("n1");
    node.join(server.address, &token).await.unwrap();
    let mut session = node.open(server.address, None, Transport::Quic).await.unwrap();
    session.stream.writer.write_all(&[0, 0, 0, 4, 0x82, 0x18, 0x63, 0xa0]).await.unwrap();
    session.until("an error", |session| matches!(session.other.last(), Some(ServerMessage::Error { .. }))).await;
    let record = node.record();
    session.publish(&node.seal(&record)).await.unwrap();
}

#[tokio::test]
async fn another_mesh_or_no_hello_is_no_session() {
    let server = Server::start();
    let token = server.token(1);
    let mut node = Node::new("n1");
    node.join(server.address, &token).await.unwrap();
    let first = [
        NodeMessage::Hello {
            mesh: MeshId([9; 32]),
            position: None,
            policy_version: 1,
            version: String::new(),
            grant: None,
        },
        NodeMessage::Pong { nonce: 1 },
    ];
    for message in first {
        let mut stream = connect(&node.key, ALPN_NODE, server.address, Transport::Quic).await.unwrap();
        stream.send(&message).await;
        while let Some(answer) = stream.next::<ServerMessage>().await {
            assert!(matches!(answer, ServerMessage::Error { .. }), "{answer:?}");
        }
    }
}

#[tokio::test]
async fn other_protocols_are_refused() {
    let server = Server::start();
    let key = SigningKey::from_seed(random());
    for transport in [Transport::Quic, Transport::Tls] {
        assert!(connect(&key, b"h2", server.address, transport).await.is_none(), "{transport:?}");
    }
    // TLS over TCP lets a client name none: it hears nothing.
    let mut nameless = connect(&key, b"", server.address, Transport::Tls).await.unwrap();
    assert!(closes(&mut nameless.reader).await, "closed without a word");
}

#[tokio::test]
async fn many_connections_of_one_source_are_bounded() {
    let server = Server::start();
    let mut held = Vec::new();
    for _ in 0..200 {
        held.extend(tcp_from(ATTACKER, &server).await);
    }
    let mut closed = 0;
    for stream in &mut held {
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_millis(5), stream.read(&mut byte)).await;
        closed += usize::from(read.is_ok());
    }
    assert!(closed >= 200 - 64, "{closed} of 200 were turned away");
}
