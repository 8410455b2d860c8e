//! Echo requests (RFC 792, RFC 4443) from inside a namespace.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use mesh_hostnet::netns::Netns;
use socket2::{Domain, Protocol, Socket, Type};

use crate::capture::Marker;

const EACH: Duration = Duration::from_secs(1);

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Echo {
    /// Requests sent.
    pub sent: u32,
    /// Round trips of those that were answered.
    pub times: Vec<Duration>,
}

impl Echo {
    /// Median round trip.
    #[must_use]
    pub fn median(&self) -> Option<Duration> {
        let mut times = self.times.clone();
        times.sort_unstable();
        times.get(times.len() / 2).copied()
    }
}

/// Sends `count` echo requests from `netns` to `to`, each carrying the marker, and waits a second for each answer.
///
/// # Errors
/// If the socket is refused. A request that the kernel refuses to send counts as unanswered.
pub fn ping(netns: &Netns, to: IpAddr, count: u32, marker: Marker) -> Result<Echo> {
    netns.run(|| {
        let (domain, protocol) = match to {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        // The kernel fills in identifier and checksum of this kind of socket, and hands over only its own answers.
        let socket = Socket::new(domain, Type::DGRAM, Some(protocol)).context("open a ping socket")?;
        let mut echo = Echo { sent: count, times: Vec::new() };
        for number in 1..=count {
            if let Some(time) = one(&socket, to, number, marker)? {
                echo.times.push(time);
            }
        }
        Ok(echo)
    })?
}

fn one(socket: &Socket, to: IpAddr, number: u32, marker: Marker) -> Result<Option<Duration>> {
    let number = (number as u16).to_be_bytes();
    let mut request = vec![if to.is_ipv4() { 8 } else { 128 }, 0, 0, 0, 0, 0, number[0], number[1]];
    request.extend(marker);
    let start = Instant::now();
    if socket.send_to(&request, &SocketAddr::new(to, 0).into()).is_err() {
        return Ok(None);
    }
    let mut reply = [0; 1500];
    while let Some(left) = EACH.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) {
        socket.set_read_timeout(Some(left))?;
        let Ok(length) = (&*socket).read(&mut reply) else { continue };
        let reply = &reply[..length];
        let echoed = matches!(reply.first(), Some(0 | 129)) && reply.get(6..8) == Some(&number);
        if echoed && reply.ends_with(&marker) {
            return Ok(Some(start.elapsed()));
        }
    }
    Ok(None)
}
