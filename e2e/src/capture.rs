//! What is on the underlay: every frame that passes the router, classified, and searched for a marker.

mod handshakes;
mod pcap;

use std::collections::BTreeSet;
use std::io::IoSliceMut;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow};
use nix::sys::socket::sockopt::{RcvBufForce, ReceiveTimeout, RxqOvfl};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

pub use self::handshakes::Handshakes;
use self::pcap::Pcap;
use crate::lab::Lab;

static CAPTURES: AtomicU32 = AtomicU32::new(0);

/// Ports of lanes: base port 7100, at most 8 lanes.
const LANE_PORTS: std::ops::Range<u16> = 7100..7108;
/// Port of the keyserver.
const CONTROL_PORT: u16 = 7443;
/// First bytes and length of a key offer: kind and format.
const OFFER: ([u8; 2], usize) = ([0xa5, 1], 1188);
const ETHERNET_BYTES: usize = 14;
/// Strange frames kept for the report.
const KEPT: usize = 8;
/// Room for frames while the reader is not scheduled.
const SOCKET_BUFFER_BYTES: usize = 256 << 20;

/// 16 random bytes that tests put into every payload.
pub type Marker = [u8; 16];

/// A new marker.
///
/// # Panics
/// Never in practice: the kernel's random source answers.
#[must_use]
pub fn new_marker() -> Marker {
    let mut marker = [0; 16];
    getrandom::fill(&mut marker).expect("the kernel gives random bytes");
    marker
}

/// What a capture saw, counted by frame. A frame that crosses the bridge is seen on both ports.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// WireGuard messages by type: 1 initiation, 2 response, 3 cookie reply, 4 data.
    pub wireguard: [u64; 5],
    /// Sessions that data messages were for: where to, and the receiver's index.
    pub sessions: BTreeSet<(IpAddr, u32)>,
    /// Key offers between lanes.
    pub offers: u64,
    /// QUIC or TLS to or from the keyserver.
    pub control: u64,
    /// ARP, neighbour discovery, multicast listener reports.
    pub neighbour: u64,
    /// ICMP errors of the underlay about the above.
    pub errors: u64,
    /// Everything else.
    pub other: u64,
    /// Frames that hold the marker.
    pub marked: u64,
    /// Frames that passed while the capture's buffer was full: nobody looked at them.
    pub missed: u64,
    /// The first frames of `other` and `marked`, in hexadecimal.
    pub samples: Vec<String>,
}

impl Seen {
    /// All frames.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.wireguard.iter().sum::<u64>() + self.control + self.neighbour + self.errors + self.other
    }

    /// An error unless every frame was seen, none but WireGuard, control and neighbour discovery, and no marker.
    ///
    /// # Errors
    /// With the first strange frames.
    pub fn assert_nothing_clear(&self) -> Result<()> {
        if self.missed > 0 {
            return Err(anyhow!("{} frames were missed: this capture proves nothing", self.missed));
        }
        if self.other == 0 && self.marked == 0 {
            return Ok(());
        }
        Err(anyhow!(
            "{} frames hold the marker, {} are neither WireGuard nor control:\n{}",
            self.marked,
            self.other,
            self.samples.join("\n")
        ))
    }
}

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    stop_now: Arc<AtomicBool>,
    thread: JoinHandle<Result<Seen>>,
}

impl Capture {
    /// Starts to look at every link of the router. What is sent after this returns is seen; with `MESH_LAB_PCAP` set to
    /// a directory it is written there too.
    ///
    /// # Errors
    /// If the socket is refused.
    pub fn start(lab: &Lab, marker: Marker) -> Result<Self> {
        let socket = lab.router()?.run(open)??;
        let number = CAPTURES.fetch_add(1, Ordering::Relaxed);
        let pcap = Pcap::from_environment(&format!("{}-{number}", lab.name()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stop_now = Arc::new(AtomicBool::new(false));
        let flags = [Arc::clone(&stop), Arc::clone(&stop_now)];
        let thread = std::thread::Builder::new()
            .name("capture".to_owned())
            .spawn(move || watch(&socket, marker, pcap, [&flags[0], &flags[1]]))?;
        Ok(Self { stop, stop_now, thread })
    }

    /// Ends it, after everything that has passed is read: never, while there is always one more frame.
    ///
    /// # Errors
    /// If reading failed.
    pub fn stop(self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the capture thread panicked"))?
    }

    /// Ends it amid traffic, whatever has passed and is not read yet.
    ///
    /// # Errors
    /// If reading failed.
    pub fn stop_now(self) -> Result<Seen> {
        self.stop_now.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the capture thread panicked"))?
    }
}

fn open() -> Result<OwnedFd> {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        .context("open a packet socket")?;
    setsockopt(&socket, RcvBufForce, &SOCKET_BUFFER_BYTES)?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(50))?;
    setsockopt(&socket, RxqOvfl, &1)?;
    Ok(socket)
}

fn watch(socket: &OwnedFd, marker: Marker, mut pcap: Option<Pcap>, [stop, now]: [&AtomicBool; 2]) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut buffer = vec![0; 128 << 10];
    let finder = Finder::new(marker);
    loop {
        // Read before the receive: what passed until then is still in the buffer, and is drained first.
        let stopping = stop.load(Ordering::Relaxed);
        if now.load(Ordering::Relaxed) {
            pcap.map_or(Ok(()), Pcap::finish)?;
            return Ok(seen);
        }
        match receive(socket, &mut buffer) {
            Ok((length, missed)) => {
                let frame = &buffer[..length];
                seen.count(frame, &finder);
                seen.missed = seen.missed.max(missed.into());
                pcap.as_mut().map_or(Ok(()), |pcap| pcap.add(frame))?;
            }
            Err(nix::errno::Errno::EAGAIN) if stopping => {
                pcap.map_or(Ok(()), Pcap::finish)?;
                return Ok(seen);
            }
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("read the packet socket"),
        }
    }
}

/// Reads one frame: its length, and how many the kernel has dropped at this socket so far.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> nix::Result<(usize, u32)> {
    let mut control = nix::cmsg_space!(u32);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
    let missed = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::RxqOvfl(count) => Some(count),
        _ => None,
    });
    Ok((message.bytes, missed.unwrap_or(0)))
}

impl Seen {
    fn count(&mut self, frame: &[u8], finder: &Finder) {
        let marked = finder.is_in(frame);
        let kind = classify(frame);
        match kind {
            Class::WireGuard(number) => {
                self.wireguard[number] += 1;
                self.sessions.extend(session_of(frame));
            }
            Class::Offer { initiations } => {
                self.offers += 1;
                self.wireguard[1] += initiations;
            }
            Class::Control => self.control += 1,
            Class::Neighbour => self.neighbour += 1,
            Class::Error => self.errors += 1,
            Class::Other => self.other += 1,
        }
        self.marked += u64::from(marked);
        if (marked || kind == Class::Other) && self.samples.len() < KEPT {
            let shown = &frame[..frame.len().min(96)];
            let hex: String = shown.iter().map(|byte| format!("{byte:02x}")).collect();
            self.samples.push(format!("{} bytes, {kind:?}: {hex}", frame.len()));
        }
    }
}

/// The session of a data message.
fn session_of(frame: &[u8]) -> Option<(IpAddr, u32)> {
    let (_, to, datagram) = handshakes::lane_datagram(frame)?;
    let receiver = datagram.strip_prefix(&[4, 0, 0, 0])?.first_chunk()?;
    Some((to, u32::from_le_bytes(*receiver)))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    WireGuard(usize),
    Offer { initiations: u64 },
    Control,
    Neighbour,
    Error,
    Other,
}

fn classify(frame: &[u8]) -> Class {
    let (Some(kind), Some(packet)) = (frame.get(12..14), frame.get(ETHERNET_BYTES..)) else { return Class::Other };
    match kind {
        [0x08, 0x06] => Class::Neighbour,
        [0x08, 0x00] => classify_ipv4(packet),
        [0x86, 0xdd] => classify_ipv6(packet),
        _ => Class::Other,
    }
}

fn classify_ipv4(packet: &[u8]) -> Class {
    let Some(header) = packet.first().map(|first| usize::from(first & 0xf) * 4) else { return Class::Other };
    let (Some(protocol), Some(rest)) = (packet.get(9), packet.get(header..)) else { return Class::Other };
    match protocol {
        1 if matches!(rest.first(), Some(3 | 11)) => Class::Error,
        2 => Class::Neighbour,
        6 | 17 => classify_ports(*protocol, rest),
        _ => Class::Other,
    }
}

fn classify_ipv6(packet: &[u8]) -> Class {
    let (Some(next), Some(rest)) = (packet.get(6), packet.get(40..)) else { return Class::Other };
    match next {
        // Multicast listener reports carry a hop-by-hop router alert.
        0 if rest.first() == Some(&58) => Class::Neighbour,
        58 if matches!(rest.first(), Some(130..=137 | 143)) => Class::Neighbour,
        58 if matches!(rest.first(), Some(1..=4)) => Class::Error,
        6 | 17 => classify_ports(*next, rest),
        _ => Class::Other,
    }
}

fn classify_ports(protocol: u8, segment: &[u8]) -> Class {
    let port = |at: usize| segment.get(at..at + 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
    let (Some(source), Some(destination)) = (port(0), port(2)) else { return Class::Other };
    if source == CONTROL_PORT || destination == CONTROL_PORT {
        return Class::Control;
    }
    let lanes = LANE_PORTS.contains(&source) && LANE_PORTS.contains(&destination);
    match segment.get(8..12) {
        Some([number @ 1..=4, 0, 0, 0]) if protocol == 17 && lanes => Class::WireGuard(usize::from(*number)),
        Some([kind, format, ..]) if protocol == 17 && lanes && [*kind, *format] == OFFER.0 => {
            match segment[8..].split_at_checked(OFFER.1) {
                Some((_, [])) => Class::Offer { initiations: 0 },
                // In one train with the initiation that it is for.
                Some((_, [1, 0, 0, 0, ..])) => Class::Offer { initiations: 1 },
                _ => Class::Other,
            }
        }
        _ => Class::Other,
    }
}

/// Finds 16 bytes in a frame by their rarest-byte position: fast enough for every packet of a bulk transfer.
#[derive(Debug)]
struct Finder {
    marker: Marker,
}

impl Finder {
    fn new(marker: Marker) -> Self {
        Self { marker }
    }

    fn is_in(&self, frame: &[u8]) -> bool {
        let mut rest = frame;
        while let Some(at) = rest.iter().position(|byte| *byte == self.marker[0]) {
            rest = &rest[at..];
            if rest.starts_with(&self.marker) {
                return true;
            }
            rest = &rest[1..];
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marker_is_found_wherever_it_stands() {
        let finder = Finder::new(*b"0123456789abcdef");
        assert!(finder.is_in(b"00012012345678901230123456789abcdef"));
        assert!(finder.is_in(b"0123456789abcdef"));
        assert!(!finder.is_in(b"0123456789abcde"));
    }

    #[test]
    fn frames_are_told_apart() {
        let mut frame = vec![0; 14 + 20 + 8 + 32];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[23] = 17;
        frame[34..38].copy_from_slice(&[0x1b, 0xbc, 0x1b, 0xbc]);
        frame[42] = 4;
        assert_eq!(classify(&frame), Class::WireGuard(4));
        frame[46..50].copy_from_slice(&[1, 2, 0, 0]);
        assert_eq!(session_of(&frame), Some(([0, 0, 0, 0].into(), 0x201)));
        frame[42] = 5;
        assert_eq!(classify(&frame), Class::Other);
        frame[42..44].copy_from_slice(&OFFER.0);
        assert_eq!(classify(&frame), Class::Other, "an offer has one length");
        frame.resize(14 + 20 + 8 + OFFER.1, 0);
        assert_eq!(classify(&frame), Class::Offer { initiations: 0 });
        frame.extend([1, 0, 0, 0]);
        assert_eq!(classify(&frame), Class::Offer { initiations: 1 });
        frame[34..36].copy_from_slice(&CONTROL_PORT.to_be_bytes());
        assert_eq!(classify(&frame), Class::Control);
        assert_eq!(classify(&frame[..13]), Class::Other);
    }
}
