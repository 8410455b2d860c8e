//! A stream of numbered UDP datagrams: which arrived, which twice, which late.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use mesh_hostnet::netns::Netns;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;

use crate::capture::Marker;

const NUMBER_AT: usize = 16;
const LEAST_PAYLOAD: usize = 24;
const RECEIVE_BUFFER_BYTES: usize = 64 << 20;
/// The sender sleeps for no less, and for no more between two looks at whether it has to stop.
const SHORTEST_SLEEP: Duration = Duration::from_micros(200);
/// See [`SHORTEST_SLEEP`].
const LONGEST_SLEEP: Duration = Duration::from_millis(20);
/// How long after the last datagram was sent one may still arrive.
const STRAGGLER: Duration = Duration::from_secs(2);

/// What became of a stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Datagrams sent.
    pub sent: u64,
    /// Different ones that arrived.
    pub received: u64,
    /// Arrivals of one that had arrived already.
    pub duplicated: u64,
    /// Arrivals after a later one.
    pub reordered: u64,
    /// Longest time between two arrivals, in microseconds.
    pub longest_gap_micros: u64,
}

impl Counts {
    /// Datagrams that never arrived.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.sent - self.received
    }
}

/// A running stream.
#[derive(Debug)]
pub struct Stream {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    arrived: Arc<AtomicU64>,
    sender: JoinHandle<Result<u64>>,
    receiver: JoinHandle<Result<Counts>>,
    done: Arc<AtomicBool>,
}

/// How a stream is sent.
#[derive(Debug, Clone, Copy)]
struct Plan {
    per_second: u32,
    at_most: u64,
    payload_bytes: usize,
    marker: Marker,
}

impl Stream {
    /// Starts `per_second` datagrams a second of `payload_bytes` from one namespace to `to` in another, until stopped,
    /// or until `at_most` are sent.
    ///
    /// # Errors
    /// If a namespace or a socket is refused.
    pub fn start(
        from: &Netns,
        target: &Netns,
        to: IpAddr,
        per_second: u32,
        at_most: u64,
        payload_bytes: usize,
        marker: Marker,
    ) -> Result<Self> {
        let receiver = target.run(|| UdpSocket::bind((to, 0)))?.with_context(|| format!("listen on {to}"))?;
        // Forced: the system's limit holds a few milliseconds of the fastest stream, and what does not fit looks lost.
        setsockopt(&receiver, RcvBufForce, &RECEIVE_BUFFER_BYTES)?;
        let address = receiver.local_addr()?;
        let any: IpAddr = if to.is_ipv4() { "0.0.0.0".parse()? } else { "::".parse()? };
        let sender = from.run(|| UdpSocket::bind((any, 0)))??;
        let plan = Plan { per_second, at_most, payload_bytes: payload_bytes.max(LEAST_PAYLOAD), marker };
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let arrived = Arc::new(AtomicU64::new(0));
        Ok(Self {
            sender: spawn("sender", {
                let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
                move || send(&sender, address, plan, &stop, &sent)
            })?,
            receiver: spawn("receiver", {
                let (done, arrived) = (Arc::clone(&done), Arc::clone(&arrived));
                move || receive(&receiver, plan, &done, &arrived)
            })?,
            stop,
            sent,
            arrived,
            done,
        })
    }

    /// Datagrams sent so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Datagrams that arrived so far, copies included.
    #[must_use]
    pub fn arrived(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }

    /// Stops sending, waits for stragglers, and counts.
    ///
    /// # Errors
    /// If a socket failed.
    pub fn stop(self) -> Result<Counts> {
        self.stop.store(true, Ordering::Relaxed);
        self.finish()
    }

    /// Waits until all `at_most` are sent, then as [`Self::stop`].
    ///
    /// # Errors
    /// If a socket failed.
    pub fn finish(self) -> Result<Counts> {
        let sent = self.sender.join().map_err(|_| anyhow!("the sender panicked"))??;
        let start = Instant::now();
        while self.arrived.load(Ordering::Relaxed) < sent && start.elapsed() < STRAGGLER {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.done.store(true, Ordering::Relaxed);
        let counts = self.receiver.join().map_err(|_| anyhow!("the receiver panicked"))??;
        Ok(Counts { sent, ..counts })
    }
}

fn spawn<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
    Ok(std::thread::Builder::new().name(name.to_owned()).spawn(work)?)
}

fn send(socket: &UdpSocket, to: SocketAddr, plan: Plan, stop: &AtomicBool, sent: &AtomicU64) -> Result<u64> {
    let mut payload = vec![0x5a; plan.payload_bytes];
    payload[..NUMBER_AT].copy_from_slice(&plan.marker);
    let start = Instant::now();
    let mut number = 0;
    while number < plan.at_most && !stop.load(Ordering::Relaxed) {
        let due = (start.elapsed().as_secs_f64() * f64::from(plan.per_second)) as u64;
        if due <= number {
            // Many slow streams must not keep the machine busy with looking at the clock.
            let next = Duration::from_secs_f64((number + 1) as f64 / f64::from(plan.per_second));
            std::thread::sleep(next.saturating_sub(start.elapsed()).clamp(SHORTEST_SLEEP, LONGEST_SLEEP));
            continue;
        }
        // What could not be sent in time is sent late, not all at once: a burst would test the receiver's buffer.
        for _ in 0..(due - number).min(64).min(plan.at_most - number) {
            payload[NUMBER_AT..LEAST_PAYLOAD].copy_from_slice(&number.to_be_bytes());
            // While there is no route the kernel refuses: that datagram counts as sent, and lost.
            let _ = socket.send_to(&payload, to);
            number += 1;
        }
        sent.store(number, Ordering::Relaxed);
    }
    Ok(number)
}

fn receive(socket: &UdpSocket, plan: Plan, done: &AtomicBool, arrived: &AtomicU64) -> Result<Counts> {
    socket.set_read_timeout(Some(Duration::from_millis(20)))?;
    let mut buffer = vec![0; 65_536];
    let mut seen: Vec<u64> = Vec::new();
    let mut counts = Counts::default();
    let mut next = 0;
    let mut last: Option<Instant> = None;
    loop {
        let stopping = done.load(Ordering::Relaxed);
        let length = match socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) if is_timeout(&error) && stopping => return Ok(counts),
            Err(error) if is_timeout(&error) => continue,
            Err(error) => return Err(error).context("receive the stream"),
        };
        let now = Instant::now();
        let datagram = &buffer[..length];
        let Some(number) = datagram.get(NUMBER_AT..LEAST_PAYLOAD).filter(|_| datagram.starts_with(&plan.marker)) else {
            continue;
        };
        let number = u64::from_be_bytes(number.try_into().expect("eight bytes"));
        let gap = last.replace(now).map_or(0, |last| now.duration_since(last).as_micros() as u64);
        counts.longest_gap_micros = counts.longest_gap_micros.max(gap);
        arrived.fetch_add(1, Ordering::Relaxed);
        if !insert(&mut seen, number) {
            counts.duplicated += 1;
            continue;
        }
        counts.received += 1;
        if number < next {
            counts.reordered += 1;
        }
        next = next.max(number + 1);
    }
}

fn insert(bits: &mut Vec<u64>, number: u64) -> bool {
    let at = number as usize / 64;
    if bits.len() <= at {
        bits.resize(at + 1, 0);
    }
    let fresh = bits[at] & (1 << (number % 64)) == 0;
    bits[at] |= 1 << (number % 64);
    fresh
}

fn is_timeout(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | Interrupted)
}
