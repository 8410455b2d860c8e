//! The socket of the exchange: UDP on the node's own IPv4 address in the mesh.
//!
//! What arrives has come through a tunnel, whose source is known, and the host's filter keeps pods and the underlay away.
//! A program of the peer's machine is kept away by the port: meshd holds it there.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Instant;

use mesh_protocol::peer::{MAX_DATAGRAM_BYTES, PORT};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tracing::{debug, warn};

/// Datagrams that wait to be judged: 64 of at most 1.2 KB. Full: what comes is dropped, peers ask again.
const WAITING: usize = 64;
/// Datagrams of one peer in a burst: a whole object of the largest size, and more.
const BURST: f64 = 96.0;
/// Datagrams of one peer in a second.
const PER_SECOND: f64 = 48.0;
/// Peers whose rate is known; the table starts anew when it is full: 8,192 of 32 bytes.
const MOST_SOURCES: usize = 8_192;

/// A datagram of a peer, by its address in the mesh.
#[derive(Debug)]
pub(crate) struct Datagram {
    /// Whose.
    pub(crate) from: Ipv4Addr,
    /// What it says.
    pub(crate) bytes: Vec<u8>,
    /// Datagrams that were dropped since the last one handed over.
    pub(crate) dropped: u64,
}

/// The open socket and the task that reads it. Dropping it closes both.
#[derive(Debug)]
pub(crate) struct Datagrams {
    address: Ipv4Addr,
    socket: Arc<UdpSocket>,
    received: mpsc::Receiver<Datagram>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Datagrams {
    /// Binds the address, which need not be there yet. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The system refused: another program has the port.
    pub(crate) fn bind(address: Ipv4Addr) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        // The device comes after control, and may be made again.
        socket.set_freebind_v4(true)?;
        socket.bind(&SocketAddr::from((address, PORT)).into())?;
        let socket = Arc::new(UdpSocket::from_std(socket.into())?);
        let (sender, received) = mpsc::channel(WAITING);
        let task = tokio::spawn(read(Arc::clone(&socket), sender));
        Ok(Self { address, socket, received, task })
    }

    /// Where it is bound.
    pub(crate) fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The next datagram; never if the socket broke.
    ///
    /// # Cancel safety
    /// Safe.
    pub(crate) async fn next(&mut self) -> Datagram {
        match self.received.recv().await {
            Some(datagram) => datagram,
            None => std::future::pending().await,
        }
    }

    /// Sends one, or drops it: the peer asks again.
    pub(crate) fn send(&self, to: Ipv4Addr, bytes: &[u8]) {
        if let Err(error) = self.socket.try_send_to(bytes, SocketAddrV4::new(to, PORT).into()) {
            debug!(%to, %error, "datagram to a peer not sent");
        }
    }
}

async fn read(socket: Arc<UdpSocket>, sender: mpsc::Sender<Datagram>) {
    let mut buffer = [0; MAX_DATAGRAM_BYTES + 1];
    let mut rates = Rates::default();
    let mut dropped = 0_u64;
    loop {
        let (len, from) = match socket.recv_from(&mut buffer).await {
            Ok(read) => read,
            Err(error) => {
                // A message of the network about a datagram sent before; reading goes on.
                debug!(%error, "socket of the exchange");
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                continue;
            }
        };
        let IpAddr::V4(address) = from.ip() else { continue };
        if from.port() != PORT || len > MAX_DATAGRAM_BYTES || !rates.take(address, Instant::now()) {
            dropped = dropped.saturating_add(1);
            continue;
        }
        let datagram = Datagram { from: address, bytes: buffer[..len].to_vec(), dropped };
        match sender.try_send(datagram) {
            Ok(()) => dropped = 0,
            Err(mpsc::error::TrySendError::Full(_)) => dropped = dropped.saturating_add(1),
            Err(mpsc::error::TrySendError::Closed(_)) => return,
        }
    }
}

/// A token bucket for each source.
#[derive(Debug, Default)]
struct Rates(HashMap<Ipv4Addr, (f64, Instant)>);

impl Rates {
    fn take(&mut self, source: Ipv4Addr, now: Instant) -> bool {
        if self.0.len() >= MOST_SOURCES && !self.0.contains_key(&source) {
            warn!(sources = self.0.len(), "rates of peers are counted anew");
            self.0.clear();
        }
        let (left, at) = self.0.entry(source).or_insert((BURST, now));
        let gained = now.saturating_duration_since(*at).as_secs_f64() * PER_SECOND;
        (*left, *at) = ((*left + gained).min(BURST), now);
        let may = *left >= 1.0;
        if may {
            *left -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_peer_that_floods_is_cut_and_others_are_not() {
        let (mut rates, now) = (Rates::default(), Instant::now());
        let (loud, quiet) = (Ipv4Addr::new(100, 96, 0, 1), Ipv4Addr::new(100, 96, 0, 2));
        let through = (0..10_000).filter(|_| rates.take(loud, now)).count();
        assert_eq!(through, BURST as usize);
        assert!(rates.take(quiet, now));
        assert!(rates.take(loud, now + Duration::from_secs(1)));
        for n in 0..20_000_u32 {
            rates.take(Ipv4Addr::from(n), now);
        }
        assert!(rates.0.len() <= MOST_SOURCES);
    }
}
