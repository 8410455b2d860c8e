//! The first packet through a tunnel: echo requests until one is answered.

use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use mesh_hostnet::netns::Netns;
use socket2::{Domain, Protocol, Socket, Type};

use super::child;

/// Time between two requests: what is lost at first costs at most this much.
const EVERY: Duration = Duration::from_millis(20);
const REQUEST: [u8; 16] = [8, 0, 0, 0, 0, 0, 0, 1, b'm', b'e', b's', b'h', b'm', b'e', b's', b'h'];

/// Sends echo requests from `netns` to `to` until one comes back; gives the time from the first request.
///
/// # Errors
/// If none comes back within `limit`.
pub fn first_answer(netns: &Netns, to: Ipv4Addr, limit: Duration) -> Result<Duration> {
    netns.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4)).context("open a ping socket")?;
        socket.connect(&SocketAddr::from((to, 0)).into())?;
        socket.set_read_timeout(Some(EVERY))?;
        let start = Instant::now();
        while start.elapsed() < limit {
            child::ensure_running()?;
            // Refused, or without a route yet: the same as lost.
            let sent = socket.send(&REQUEST);
            let mut reader = &socket;
            match reader.read(&mut [0; 64]) {
                Ok(_) if sent.is_ok() => return Ok(start.elapsed()),
                _ if sent.is_err() => std::thread::sleep(EVERY),
                _ => {}
            }
        }
        bail!("no packet crossed within {limit:?}")
    })?
}
