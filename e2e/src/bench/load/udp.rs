//! UDP at a given rate, counted where it arrives.

use std::io::{IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg, setsockopt, sockopt::RcvBufForce,
    sockopt::SndBufForce,
};
use serde_json::{Value, json};

use super::{input_ended, ready};

/// Datagrams for one system call.
const BATCH: usize = 64;
/// Bytes at the start that hold the datagram's number.
const NUMBER: usize = 8;
const MAX_SIZE: usize = 2048;
/// Pauses between bursts: at most 5,000 bursts a second, so that the daemons get the cores.
const PAUSE: Duration = Duration::from_micros(200);

/// Counts what arrives on `address`.
pub(super) fn sink(address: Ipv4Addr, port: u16, size: usize) -> Result<Value> {
    ensure!((NUMBER..=MAX_SIZE).contains(&size), "datagrams of {size} bytes: give {NUMBER} to {MAX_SIZE}");
    let socket = UdpSocket::bind((address, port)).with_context(|| format!("bind {address}"))?;
    setsockopt(&socket, RcvBufForce, &(16 << 20)).context("a receive buffer of 16 MiB")?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    ready()?;
    let ended = input_ended();
    let mut count = Count::default();
    let mut buffers = vec![[0_u8; MAX_SIZE]; BATCH];
    let mut headers = MultiHeaders::<()>::preallocate(BATCH, None);
    while !ended.load(Ordering::Relaxed) {
        let mut slices: Vec<_> = buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
        match recvmmsg(socket.as_raw_fd(), &mut headers, slices.iter_mut(), MsgFlags::MSG_WAITFORONE, None) {
            Ok(messages) => {
                for message in messages {
                    let Some(start) = message.iovs().next() else { continue };
                    count.take(start, message.bytes, size);
                }
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => bail!("receive: {error}"),
        }
    }
    Ok(json!({"received": count.received, "late": count.late, "damaged": count.damaged}))
}

#[derive(Debug, Default)]
struct Count {
    received: u64,
    /// Arrived after one that was sent later.
    late: u64,
    /// Of another length, or with another byte at the end.
    damaged: u64,
    next: u64,
}

impl Count {
    fn take(&mut self, start: &[u8], length: usize, size: usize) {
        let number = start.first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
        let Some(number) =
            number.filter(|number| length == size && start.get(size - 1) == last_byte(*number, size).as_ref())
        else {
            self.damaged += 1;
            return;
        };
        self.received += 1;
        self.late += u64::from(number < self.next);
        self.next = self.next.max(number + 1);
    }
}

/// What the last byte of a datagram is, if it is none of the number.
fn last_byte(number: u64, size: usize) -> Option<u8> {
    let [.., low] = number.to_be_bytes();
    Some(if size > NUMBER { low ^ 0x5a } else { low })
}

/// Sends `rate` datagrams a second, or as many as go.
pub(super) fn blast(to: (Ipv4Addr, u16), size: usize, rate: f64, seconds: f64) -> Result<Value> {
    ensure!((NUMBER..=MAX_SIZE).contains(&size), "datagrams of {size} bytes: give {NUMBER} to {MAX_SIZE}");
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    setsockopt(&socket, SndBufForce, &(4 << 20)).context("a send buffer of 4 MiB")?;
    socket.connect(SocketAddr::from(to))?;
    let time = Duration::from_secs_f64(seconds);
    let mut sender = Sender { socket, size, sent: 0, buffers: vec![vec![0; size]; BATCH] };
    let start = Instant::now();
    loop {
        let passed = start.elapsed();
        if passed >= time {
            break;
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count that fits")]
        let due = (passed.as_secs_f64() * rate) as u64;
        let count = if rate == 0.0 { BATCH as u64 } else { due.saturating_sub(sender.sent) };
        if count == 0 {
            std::thread::sleep(PAUSE);
        } else {
            sender.burst(usize::try_from(count)?.min(BATCH))?;
        }
    }
    Ok(json!({"sent": sender.sent, "seconds": start.elapsed().as_secs_f64()}))
}

struct Sender {
    socket: UdpSocket,
    size: usize,
    sent: u64,
    buffers: Vec<Vec<u8>>,
}

impl Sender {
    fn burst(&mut self, count: usize) -> Result<()> {
        for (number, buffer) in (self.sent..).zip(&mut self.buffers[..count]) {
            buffer[..NUMBER].copy_from_slice(&number.to_be_bytes());
            if let Some(byte) = last_byte(number, self.size) {
                buffer[self.size - 1] = byte;
            }
        }
        let slices: Vec<_> = self.buffers[..count].iter().map(|buffer| [IoSlice::new(buffer)]).collect();
        let mut headers = MultiHeaders::<SockaddrIn>::preallocate(count, None);
        let none: [ControlMessage<'_>; 0] = [];
        let to = vec![None::<SockaddrIn>; count];
        match sendmmsg(self.socket.as_raw_fd(), &mut headers, slices.iter(), to, none, MsgFlags::empty()) {
            Ok(sent) => self.sent += sent.count() as u64,
            Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::ECONNREFUSED | Errno::EINTR) => {}
            Err(error) => bail!("send: {error}"),
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn datagram(number: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        bytes[..NUMBER].copy_from_slice(&number.to_be_bytes());
        bytes[size - 1] = last_byte(number, size).unwrap();
        bytes
    }

    #[test]
    fn late_and_damaged_datagrams_are_counted_apart() {
        let mut count = Count::default();
        for number in [0, 1, 3, 2, 4] {
            count.take(&datagram(number, 64), 64, 64);
        }
        count.take(&datagram(5, 64), 63, 64);
        count.take(&[0; 64], 64, 64);
        assert_eq!((count.received, count.late, count.damaged), (5, 1, 2));
    }
}
