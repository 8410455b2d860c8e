//! How long WireGuard handshakes take, seen from the underlay: from the first datagram of the initiator to the response.

use std::collections::HashMap;
use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nix::sys::socket::{MsgFlags, recvmsg};

use super::{ETHERNET_BYTES, LANE_PORTS, OFFER, open};
use crate::lab::Lab;

/// What an initiator sends ahead of its initiation belongs to it within this time.
const AHEAD: Duration = Duration::from_millis(500);

/// Handshakes while this exists.
#[derive(Debug)]
pub struct Handshakes {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Duration>>,
}

impl Handshakes {
    /// Starts to look at every link of the router.
    ///
    /// # Errors
    /// If the socket is refused.
    pub fn start(lab: &Lab) -> Result<Self> {
        let socket = lab.router()?.run(open)??;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread =
            std::thread::Builder::new().name("handshakes".to_owned()).spawn(move || watch(&socket, &stopping))?;
        Ok(Self { stop, thread })
    }

    /// Ends it: how long each handshake took, shortest first.
    ///
    /// # Errors
    /// If the thread panicked.
    pub fn stop(self) -> Result<Vec<Duration>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut taken = self.thread.join().map_err(|_| anyhow!("the handshake thread panicked"))?;
        taken.sort_unstable();
        Ok(taken)
    }
}

fn watch(socket: &OwnedFd, stop: &AtomicBool) -> Vec<Duration> {
    let mut buffer = [0; 2048];
    let mut seen = Exchanges::default();
    // Under load there is always one more frame: it ends when told, not when nothing is left to read.
    while !stop.load(Ordering::Relaxed) {
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let length = recvmsg::<()>(socket.as_raw_fd(), &mut parts, None, MsgFlags::empty()).map(|got| got.bytes);
        // An error is the receive timeout.
        let Ok(length) = length else { continue };
        if let Some((from, to, datagram)) = lane_datagram(&buffer[..length.min(2048)]) {
            seen.take(from, to, datagram, Instant::now());
        }
    }
    seen.taken
}

/// Handshakes that began, and how long those took that ended. A frame is seen on several links: its first time counts.
#[derive(Debug, Default)]
struct Exchanges {
    ahead: HashMap<(IpAddr, IpAddr), Instant>,
    begun: HashMap<(IpAddr, u32), Instant>,
    taken: Vec<Duration>,
}

impl Exchanges {
    fn take(&mut self, from: IpAddr, to: IpAddr, datagram: &[u8], now: Instant) {
        let index = |at: usize| Some(u32::from_le_bytes(datagram.get(at..at + 4)?.try_into().ok()?));
        match datagram.first() {
            // Initiation: its sender's index. Response: its own, then the initiator's.
            Some(1) => {
                let Some(sender) = index(4) else { return };
                let ahead = self.ahead.remove(&(from, to));
                let ahead = ahead.filter(|ahead| now.duration_since(*ahead) < AHEAD);
                self.begun.entry((from, sender)).or_insert(ahead.unwrap_or(now));
            }
            Some(2) => {
                let begun = index(8).and_then(|receiver| self.begun.get_mut(&(to, receiver)));
                let Some(begun) = begun else { return };
                let took = now.duration_since(*begun);
                // Seen on the next link, it is another index's no more.
                if let Some(receiver) = index(8) {
                    self.begun.remove(&(to, receiver));
                }
                self.taken.push(took);
            }
            Some(3 | 4) | None => {}
            Some(_) => {
                self.ahead.entry((from, to)).or_insert(now);
                // In one train with the initiation that it is for.
                if let Some((_, initiation)) = datagram.split_at_checked(OFFER.1) {
                    self.take(from, to, initiation, now);
                }
            }
        }
    }
}

/// Addresses and payload of a UDP datagram to the port of a lane.
pub(super) fn lane_datagram(frame: &[u8]) -> Option<(IpAddr, IpAddr, &[u8])> {
    let packet = frame.get(ETHERNET_BYTES..)?;
    let (from, to, udp): (IpAddr, IpAddr, &[u8]) = match packet.first()? >> 4 {
        4 => {
            let from = Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?);
            let to = Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(16..20)?).ok()?);
            let header = usize::from(packet[0] & 15) * 4;
            (from.into(), to.into(), packet.get(header..).filter(|_| packet[9] == 17)?)
        }
        6 => {
            let from = Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(8..24)?).ok()?);
            let to = Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(24..40)?).ok()?);
            (from.into(), to.into(), packet.get(40..).filter(|_| packet[6] == 17)?)
        }
        _ => return None,
    };
    let port = u16::from_be_bytes(udp.get(2..4)?.try_into().ok()?);
    LANE_PORTS.contains(&port).then_some((from, to, udp.get(8..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handshake_lasts_from_what_went_ahead_to_the_response_and_is_counted_once() {
        let (a, b): (IpAddr, IpAddr) = ([192, 0, 2, 1].into(), [192, 0, 2, 2].into());
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let initiation = [1, 0, 0, 0, 7, 0, 0, 0];
        let response = [2, 0, 0, 0, 9, 0, 0, 0, 7, 0, 0, 0];
        let mut seen = Exchanges::default();
        for (from, to, datagram, millis) in [
            (a, b, &[0x4d, 1][..], 0),
            (a, b, &initiation[..], 2),
            (a, b, &initiation[..], 3),
            (b, a, &response[..], 5),
            (b, a, &response[..], 6),
        ] {
            seen.take(from, to, datagram, at(millis));
        }
        assert_eq!(seen.taken, [Duration::from_millis(5)]);
        let train = [&[0x4d; OFFER.1][..], &initiation].concat();
        let mut seen = Exchanges::default();
        seen.take(a, b, &train, at(0));
        seen.take(b, a, &response, at(4));
        assert_eq!(seen.taken, [Duration::from_millis(4)]);
        let mut plain = Exchanges::default();
        plain.take(a, b, &initiation, at(2));
        plain.take(b, a, &response, at(3));
        assert_eq!(plain.taken, [Duration::from_millis(1)]);
    }
}
