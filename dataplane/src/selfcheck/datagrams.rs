//! Trains of datagrams from and to sockets.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
};

use ipnet::IpNet;
use nix::poll::{PollFd, PollFlags, poll};

use super::{
    Class, DESTINATION, Fault, Findings, LOOKS, OWN, PATIENCE, SelfCheck,
    forwarded::{TRAINS, checksums_hold, families, payload},
};
use crate::{
    packet::{
        header::{Header, UDP},
        offload::Offloads,
    },
    udp::{
        Arrivals, Datagrams, Socket, Trains,
        system::{SystemConfig, SystemSocket},
    },
};

/// A port nobody listens on.
const DISCARD: u16 = 9;

/// Sends trains out of the far device, which cuts nothing, and to sockets of this namespace.
pub(super) fn try_trains(check: &mut SelfCheck, has_v6: bool, findings: &mut Findings) {
    if !check.switch_far(Offloads::NONE) {
        findings.note(Class::UdpSegment, Err(Fault::Untried));
    }
    for v6 in families(has_v6) {
        for train in TRAINS {
            if findings.fault(Class::UdpSegment).is_none() {
                findings.try_train(Class::UdpSegment, || send_out(check, train, v6));
            }
            if findings.fault(Class::UdpSegment).is_none() {
                findings.try_train(Class::UdpSegment, || pass(train, v6, Trains { send: true, receive: false }));
            }
            if findings.fault(Class::UdpGro).is_none() {
                let send = findings.fault(Class::UdpSegment).is_none();
                findings.try_train(Class::UdpGro, || pass(train, v6, Trains { send, receive: true }));
            }
        }
    }
}

/// A train that leaves by the far device.
fn send_out(check: &mut SelfCheck, (name, len, size): (&'static str, usize, usize), v6: bool) -> Result<(), Fault> {
    let payload = payload(len);
    let mut socket = socket(v6, Trains { send: true, receive: false })?;
    let to = SocketAddr::new(address(DESTINATION[usize::from(v6)])?, DISCARD);
    check.empty_far();
    send(&mut socket, to, &payload, size)?;
    let expected = payload.chunks(size).count();
    let (mut got, mut right) = (Vec::new(), true);
    check.read_far(|buffer, len, offload| {
        let packet = &buffer[..len];
        let Some(header) = Header::parse(packet).filter(|header| header.protocol == UDP) else { return false };
        if header.ports(packet).is_none_or(|(_, port)| port != DISCARD) {
            return false;
        }
        let datagram = &packet[header.payload..header.len];
        let stated = usize::from(u16::from_be_bytes([datagram[4], datagram[5]]));
        right &= offload == Default::default() && checksums_hold(packet) && stated == datagram.len();
        got.push(datagram.get(8..).unwrap_or_default().to_vec());
        got.len() >= expected
    });
    judge(name, &got, &payload, size, right)
}

/// A train from one socket to another of this namespace.
fn pass((name, len, size): (&'static str, usize, usize), v6: bool, trains: Trains) -> Result<(), Fault> {
    let payload = payload(len);
    let (mut from, mut to) = (socket(v6, trains)?, socket(v6, trains)?);
    if to.state().trains.receive != trains.receive {
        return Err(Fault::Refused);
    }
    let address = to.local_addr().map_err(|_| Fault::Refused)?;
    send(&mut from, address, &payload, size)?;
    let expected = payload.chunks(size).count();
    let mut arrivals = Arrivals::new(16);
    let (mut got, mut right) = (Vec::new(), true);
    for _ in 0..LOOKS {
        let mut fds = [PollFd::new(to.as_fd(), PollFlags::POLLIN)];
        if got.len() >= expected || !matches!(poll(&mut fds, PATIENCE), Ok(1..)) {
            break;
        }
        to.receive(&mut arrivals, 16).map_err(|_| Fault::Refused)?;
        for n in 0..arrivals.len() {
            match arrivals.get(n) {
                Some(Ok((_, datagrams))) => got.extend(datagrams.map(<[u8]>::to_vec)),
                _ => right = false,
            }
        }
    }
    judge(name, &got, &payload, size, right)
}

fn judge(train: &'static str, got: &[Vec<u8>], payload: &[u8], size: usize, right: bool) -> Result<(), Fault> {
    let same = right && got.iter().map(Vec::as_slice).eq(payload.chunks(size));
    match same {
        true => Ok(()),
        false if right && got.len() < payload.chunks(size).count() => Err(Fault::Lost { train }),
        false => Err(Fault::Wrong { train }),
    }
}

fn socket(v6: bool, trains: Trains) -> Result<SystemSocket, Fault> {
    let address = Some(address(OWN[usize::from(v6)])?);
    SystemSocket::bind(&SystemConfig { address, trains, ..SystemConfig::default() }).map_err(|_| Fault::Untried)
}

fn address(text: &str) -> Result<IpAddr, Fault> {
    text.parse::<IpNet>().map(|net| net.addr()).map_err(|_| Fault::Untried)
}

/// Sends `payload` in datagrams of `size` bytes.
fn send(socket: &mut SystemSocket, to: SocketAddr, payload: &[u8], size: usize) -> Result<(), Fault> {
    let mut datagrams = Datagrams::new(payload.len(), payload.chunks(size).count());
    for piece in payload.chunks(size) {
        let Some(room) = datagrams.room() else { break };
        room[..piece.len()].copy_from_slice(piece);
        datagrams.push_tight(piece.len(), to.into());
    }
    let sent = socket.send(&datagrams);
    let all = sent == datagrams.len() && socket.state().refused_trains == 0;
    if all { Ok(()) } else { Err(Fault::Refused) }
}
