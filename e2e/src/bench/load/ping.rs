//! Echo requests, one after the other.

use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

use super::percentile_us;

/// An answer that takes longer is lost.
const LOST: Duration = Duration::from_secs(1);
/// Bytes after the ICMP header, as `ping` sends.
const PAYLOAD: usize = 56;

/// Sends `count`, `interval` apart or each upon the answer to the one before.
pub(super) fn ping(address: Ipv4Addr, count: usize, interval: Duration) -> Result<Value> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4)).context("open a ping socket")?;
    socket.connect(&SocketAddr::from((address, 0)).into())?;
    socket.set_read_timeout(Some(LOST))?;
    let mut nanos = Vec::with_capacity(count);
    let start = Instant::now();
    for number in 0..count {
        let due = interval * u32::try_from(number)?;
        if let Some(wait) = due.checked_sub(start.elapsed()).filter(|wait| !wait.is_zero()) {
            std::thread::sleep(wait);
        }
        if let Some(time) = echo(&socket, number)? {
            nanos.push(u64::try_from(time.as_nanos())?);
        }
    }
    let answered = nanos.len();
    nanos.sort_unstable();
    Ok(json!({
        "p50_us": percentile_us(&nanos, 0.5),
        "p99_us": percentile_us(&nanos, 0.99),
        "sent": count,
        "answered": answered,
    }))
}

/// The round trip of one request, unless it is lost.
fn echo(socket: &Socket, number: usize) -> Result<Option<Duration>> {
    // The kernel fills in identifier and checksum, and hands over the answers to this socket only.
    let mut request = [0; 8 + PAYLOAD];
    request[0] = 8;
    request[6..8].copy_from_slice(&(number as u16).to_be_bytes());
    let start = Instant::now();
    if socket.send(&request).is_err() {
        return Ok(None);
    }
    let mut reply = [0; 256];
    while start.elapsed() < LOST {
        let mut reader = socket;
        let Ok(length) = reader.read(&mut reply) else { continue };
        if length >= 8 && reply[0] == 0 && reply[6..8] == request[6..8] {
            return Ok(Some(start.elapsed()));
        }
    }
    Ok(None)
}
