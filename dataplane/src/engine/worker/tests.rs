//! Rounds of a lane by themselves: what each may take, and what it survives.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd},
    sync::mpsc::{self, Receiver},
};

use nix::sys::eventfd::EventFd;

use super::*;
use crate::{
    key::SecretKey,
    lane::LaneConfig,
    packet::dscp::Dscp,
    table::{Lanes, LocalKey, PeerId, PeerSpec, Preshared, RemoteKey, Table, TableSpec},
    tun::memory::MemoryQueue,
    udp::{
        Datagrams,
        memory::{MemoryNetwork, MemorySocket},
    },
};

fn outer(host: u8) -> SocketAddr {
    ([192, 0, 2, host], 7100).into()
}

/// A table of so many peers; with `keepalive` each of them wants a session.
fn table(peers: u32, keepalive: Option<Duration>) -> Arc<Table> {
    let peers = (0..peers).map(|n| {
        let mut secret = [7; 32];
        secret[4..8].copy_from_slice(&n.to_le_bytes());
        PeerSpec {
            id: PeerId(n),
            keys: vec![RemoteKey { epoch: 1, public: SecretKey::new(secret).to_public() }],
            preshared: Preshared::None,
            allowed_ips: vec![format!("10.{}.{}.0/24", n >> 8, n & 255).parse().unwrap()],
            endpoints: vec![outer(9)],
            keepalive,
            lanes: Lanes::Plain,
        }
    });
    let local_keys = vec![LocalKey { epoch: 1, secret: SecretKey::new([1; 32]) }];
    Arc::new(Table::new(TableSpec { local_keys, peers: peers.collect(), ..TableSpec::default() }).unwrap())
}

struct Bench {
    worker: Worker,
    mailbox: Arc<Mailbox>,
    events: Receiver<Event>,
    /// The other end of the lane's socket.
    remote: MemorySocket,
}

fn bench(table: Arc<Table>, queue: Box<dyn Queue>) -> Bench {
    let network = MemoryNetwork::default();
    let config = LaneConfig {
        lane: 0,
        lanes: 1,
        flow_key: [0; 16],
        handshakes_per_second: 500,
        dscp: Dscp::Clear,
        seed: [3; 32],
    };
    let lane = Lane::new(config, table, Instant::now());
    let mailbox = Arc::new(Mailbox::new().unwrap());
    let (sender, events) = mpsc::sync_channel(8);
    let parts = LaneParts { queue, socket: Box::new(network.bind(outer(1)).unwrap()) };
    let worker = Worker::new(lane, parts, Mailboxes { own: Arc::clone(&mailbox), first: None }, sender).unwrap();
    Bench { worker, mailbox, events, remote: network.bind(outer(9)).unwrap() }
}

fn arrived(remote: &MemorySocket) -> usize {
    std::iter::from_fn(|| remote.try_receive()).count()
}

#[test]
fn many_timers_due_at_once_leave_room_for_commands_and_packets() {
    let (_kernel, queue) = MemoryQueue::pair().unwrap();
    // All peers want a session as soon as the lane starts.
    let mut bench = bench(table(300, Some(Duration::from_secs(25))), Box::new(queue));
    let mut rounds = Vec::new();
    while rounds.iter().sum::<usize>() < 300 {
        assert!(!bench.worker.turn());
        rounds.push(arrived(&bench.remote));
        assert!(rounds.len() < 100, "{rounds:?}");
    }
    assert!(rounds.iter().all(|handshakes| *handshakes <= 64), "a share a round: {rounds:?}");
}

#[test]
fn a_full_mailbox_is_answered_in_shares() {
    let (_kernel, queue) = MemoryQueue::pair().unwrap();
    let mut bench = bench(table(300, None), Box::new(queue));
    let posted = (0..300).take_while(|n| bench.mailbox.post(Letter::Initiate(PeerId(*n))).is_ok()).count();
    assert_eq!(posted, 256, "then control is told to come back");
    let mut rounds = Vec::new();
    while rounds.iter().sum::<usize>() < posted {
        assert!(!bench.worker.turn());
        rounds.push(arrived(&bench.remote));
    }
    assert!(rounds.iter().all(|handshakes| *handshakes <= LETTERS), "{rounds:?}");
    bench.mailbox.stop();
    assert!(bench.worker.turn());
}

/// A queue that always has something to say and never anything but an error.
struct Failing {
    error: i32,
    always_readable: MemoryQueue,
    _other_end: MemoryQueue,
}

impl Failing {
    fn new(error: i32) -> Self {
        let (always_readable, other_end) = MemoryQueue::pair().unwrap();
        other_end.push(&[0]).unwrap();
        Self { error, always_readable, _other_end: other_end }
    }
}

impl AsFd for Failing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.always_readable.as_fd()
    }
}

impl Queue for Failing {
    fn read(&mut self, _supers: &mut Supers, _most: usize) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(self.error))
    }

    fn write(&mut self, _packets: &mut tun::Packets) -> io::Result<usize> {
        Ok(0)
    }
}

#[test]
fn a_failing_queue_is_given_up_and_the_lane_then_sleeps() {
    for (error, patience) in [(libc::EBADFD, 1), (libc::EIO, FAILURES), (libc::EFAULT, FAILURES)] {
        let mut bench = bench(table(1, None), Box::new(Failing::new(error)));
        for _ in 0..patience {
            assert!(bench.events.try_recv().is_err());
            assert!(!bench.worker.turn());
        }
        assert!(matches!(bench.events.try_recv(), Ok(Event::QueueLost { .. })), "{error}");
        // Nothing is ready and no timer is due: only a letter ends the wait.
        assert_eq!(bench.worker.lane.poll_timeout(), None);
        bench.mailbox.stop();
        assert!(bench.worker.turn());
    }
}

/// A socket at which something waits always; from the first look on it has a direct way, where something waits once.
struct Forked {
    all: EventFd,
    direct: Option<EventFd>,
    asked: mpsc::Sender<Via>,
}

impl AsFd for Forked {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.all.as_fd()
    }
}

impl Socket for Forked {
    fn receive(&mut self, arrivals: &mut Arrivals, _most: usize) -> io::Result<usize> {
        arrivals.clear();
        self.asked.send(Via::All).unwrap();
        Ok(0)
    }

    fn send(&mut self, datagrams: &Datagrams) -> usize {
        datagrams.len()
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(outer(1))
    }

    fn direct(&self) -> Option<BorrowedFd<'_>> {
        self.direct.as_ref().map(AsFd::as_fd)
    }

    fn receive_direct(&mut self, arrivals: &mut Arrivals, _most: usize) -> io::Result<usize> {
        arrivals.clear();
        self.asked.send(Via::Direct).unwrap();
        self.direct.as_ref().unwrap().read()?;
        Ok(0)
    }

    fn settle(&mut self, _now: Instant) -> bool {
        if self.direct.is_some() {
            return false;
        }
        self.direct = Some(EventFd::from_value(1).unwrap());
        true
    }
}

#[test]
fn what_waits_at_a_direct_way_is_received_after_what_waits_for_all() {
    let (_kernel, queue) = MemoryQueue::pair().unwrap();
    // A peer that wants a session makes a timer due.
    let mut bench = bench(table(1, Some(Duration::from_secs(25))), Box::new(queue));
    let (asked, log) = mpsc::channel();
    let forked = Forked { all: EventFd::from_value(1).unwrap(), direct: None, asked };
    assert!(bench.mailbox.post(Letter::Socket(Box::new(forked))).is_ok());
    let began = Instant::now();
    let mut round = Vec::new();
    while !round.contains(&Via::Direct) {
        assert!(!bench.worker.turn());
        round = log.try_iter().collect();
        assert!(Instant::now().since(began) < Duration::from_secs(10), "the direct way is not looked at");
    }
    assert_eq!(round, [Via::All, Via::Direct]);
    assert!(!bench.worker.turn());
    assert_eq!(log.try_iter().collect::<Vec<_>>(), [Via::All], "nothing waits there any more");
}
