//! Echo requests to a node or a pod, through the tunnel: ordinary ICMP of this host, so that they take the way packets take.

use std::io::{self, Read as _};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_protocol::local::{LocalErrorCode, LocalReply};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;

use super::connection::{Replies, error};
use super::target;
use crate::app::Node;
use crate::facts::DirectoryFacts;

/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(1);
/// Time from one request to the next.
const PACE: Duration = Duration::from_millis(200);
/// Requests of one command.
const MAX_COUNT: u32 = 1000;
/// Bytes behind the ICMP header, as ping sends.
const PAYLOAD: usize = 56;

/// Sends `count` requests and a reply for each.
///
/// # Errors
/// The client is gone.
pub(super) async fn run(node: &Node, target: &str, count: u32, v6: bool, replies: &mut Replies) -> io::Result<()> {
    let found = resolve(&node.control.facts.borrow().clone(), target, v6);
    let address = match found {
        Ok(address) => address,
        Err(message) => return replies.send(&error(LocalErrorCode::UnknownNode, message)).await,
    };
    if !(1..=MAX_COUNT).contains(&count) {
        let message = format!("count must be 1 to {MAX_COUNT}, not {count}");
        return replies.send(&error(LocalErrorCode::BadRequest, message)).await;
    }
    // One echo is under way at a time; a client that leaves closes the channel and ends the thread.
    let (echoes, mut results) = mpsc::channel(1);
    let work = tokio::task::spawn_blocking(move || ask(address, count, &echoes));
    while let Some((number, micros)) = results.recv().await {
        replies.send(&LocalReply::Echo { number, address, micros }).await?;
    }
    let reply = match work.await {
        Ok(Ok(())) => LocalReply::Done,
        Ok(Err(failure)) => error(LocalErrorCode::Internal, format!("send echo requests to {address}: {failure}")),
        Err(panic) => error(LocalErrorCode::Internal, format!("send echo requests to {address}: {panic}")),
    };
    replies.send(&reply).await
}

/// The address meant: of a node by name, id or the start of one; or an address in the mesh.
fn resolve(directory: &DirectoryFacts, target: &str, v6: bool) -> Result<IpAddr, String> {
    if let Ok(ip) = target.parse::<IpAddr>() {
        let inside = directory.pools.iter().any(|pool| pool.prefix.contains(&ip));
        return if inside { Ok(ip) } else { Err(format!("{ip} is in no prefix of the mesh: see meshctl routes")) };
    }
    let target::Target { name, addresses, .. } = target::node(directory, target)?;
    let family = if v6 { "IPv6" } else { "IPv4" };
    let found = addresses.iter().find(|ip| ip.is_ipv6() == v6);
    found.copied().ok_or_else(|| format!("{name} has no {family} address in the mesh"))
}

fn ask(address: IpAddr, count: u32, echoes: &mpsc::Sender<(u32, Option<u64>)>) -> io::Result<()> {
    let (domain, protocol) = match address {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    let mut socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    // Only answers of that address reach a connected socket.
    socket.connect(&SocketAddr::new(address, 0).into())?;
    let mut id = [0; 2];
    getrandom::fill(&mut id).map_err(io::Error::other)?;
    for number in 1..=count {
        let sent = Instant::now();
        let micros = echo(&mut socket, address, id, number, sent)?;
        if echoes.blocking_send((number, micros)).is_err() {
            return Ok(());
        }
        if number < count {
            std::thread::sleep(PACE.saturating_sub(sent.elapsed()));
        }
    }
    Ok(())
}

/// One request and its answer's time; `None` without one.
fn echo(socket: &mut Socket, address: IpAddr, id: [u8; 2], number: u32, sent: Instant) -> io::Result<Option<u64>> {
    let sequence = (number as u16).to_be_bytes();
    let packet = request(address, id, sequence);
    match socket.send(&packet) {
        Ok(_) => {}
        // No tunnel, or refused on the way: as good as no answer.
        Err(error) if unreachable(&error) => {
            std::thread::sleep(PACE);
            return Ok(None);
        }
        Err(error) => return Err(error),
    }
    let mut buffer = [0; 2048];
    loop {
        let left = PATIENCE.saturating_sub(sent.elapsed());
        if left.is_zero() {
            return Ok(None);
        }
        socket.set_read_timeout(Some(left))?;
        match socket.read(&mut buffer) {
            Ok(length) if is_answer(&buffer[..length], address, id, sequence) => {
                return Ok(Some(u64::try_from(sent.elapsed().as_micros()).unwrap_or(u64::MAX)));
            }
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Ok(None);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted || unreachable(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

fn unreachable(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(error.kind(), Kind::HostUnreachable | Kind::NetworkUnreachable | Kind::ConnectionRefused)
}

/// An echo request (RFC 792; RFC 4443, section 4.1). The kernel does ICMPv6's checksum.
fn request(address: IpAddr, id: [u8; 2], sequence: [u8; 2]) -> Vec<u8> {
    let kind = if address.is_ipv4() { 8 } else { 128 };
    let mut packet = vec![kind, 0, 0, 0, id[0], id[1], sequence[0], sequence[1]];
    packet.resize(8 + PAYLOAD, 0x6d);
    if address.is_ipv4() {
        let sum = checksum(&packet).to_be_bytes();
        packet[2..4].copy_from_slice(&sum);
    }
    packet
}

/// Internet checksum (RFC 1071) of a message of even length.
fn checksum(message: &[u8]) -> u16 {
    let mut sum: u32 = message.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Whether these bytes, as a raw socket gives them, answer that request.
fn is_answer(bytes: &[u8], address: IpAddr, id: [u8; 2], sequence: [u8; 2]) -> bool {
    let (message, kind) = match address {
        // A raw IPv4 socket gives the IP header too.
        IpAddr::V4(_) => {
            let header = bytes.first().map_or(0, |first| usize::from(first & 0x0f) * 4);
            (bytes.get(header..).unwrap_or_default(), 0)
        }
        IpAddr::V6(_) => (bytes, 129),
    };
    let [found, _, _, _, id0, id1, sequence0, sequence1, ..] = message else { return false };
    (*found, [*id0, *id1], [*sequence0, *sequence1]) == (kind, id, sequence)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::desired::tests::facts;

    #[test]
    fn targets_are_found_by_name_id_and_address() {
        let directory = facts().directory;
        let resolve = |target: &str, v6| resolve(&directory, target, v6).map(|ip| ip.to_string());
        assert_eq!(resolve("w7", false).unwrap(), "100.100.1.7");
        assert_eq!(resolve("w7", true).unwrap(), "fd00:1::1:7");
        assert_eq!(resolve("n1", false).unwrap(), "100.100.0.1");
        let id = directory.peers[0].node.to_string();
        assert_eq!(resolve(&id, false).unwrap(), "100.100.1.7");
        assert_eq!(resolve(&id[..8], false).unwrap(), "100.100.1.7");
        assert_eq!(resolve("10.2.7.9", false).unwrap(), "10.2.7.9");
        for target in ["w8", "", "192.0.2.1", "ab"] {
            assert!(resolve(target, false).is_err(), "{target}");
        }
    }

    #[test]
    fn requests_and_answers_match_and_noise_does_not() {
        let v4: IpAddr = "10.0.0.1".parse().unwrap();
        let v6: IpAddr = "fd00::1".parse().unwrap();
        let (id, sequence) = ([1, 2], [0, 3]);
        let packet = request(v4, id, sequence);
        assert_eq!(checksum(&packet), 0, "the sum over a right message is zero");
        let mut answer = packet.clone();
        answer[0] = 0;
        let with_header = [&[0x45; 1][..], &[0; 19], &answer].concat();
        assert!(is_answer(&with_header, v4, id, sequence));
        assert!(!is_answer(&with_header, v4, id, [0, 4]));
        let mut answer = request(v6, id, sequence);
        assert!(!is_answer(&answer, v6, id, sequence), "the request itself is no answer");
        answer[0] = 129;
        assert!(is_answer(&answer, v6, id, sequence));
        for length in 0..8 {
            assert!(!is_answer(&answer[..length], v6, id, sequence));
            assert!(!is_answer(&with_header[..length], v4, id, sequence));
        }
    }
}
