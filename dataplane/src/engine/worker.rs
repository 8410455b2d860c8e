//! One lane's thread: waits for its queue, its sockets, its bell and its timers, and passes bytes to the [`Lane`].
//!
//! Each round has a budget of one batch in each direction, so that timers and commands get their turn under flood.

use std::{
    io, mem,
    sync::{
        Arc,
        mpsc::{SyncSender, TrySendError},
    },
    time::Duration,
};

use tracing::{debug, warn};

use super::{
    LaneParts,
    crossing::Crossed,
    mailbox::{Letter, Mailbox},
    spin::Spin,
    waiter::{Ready, Source, Waiter},
};
use crate::{
    clock::Instant,
    command::Event,
    drop_reason::DropReason,
    lane::{Lane, Output},
    packet::{offload::Offload, segment::Segments, turns::Turns},
    tun::{self, Queue, Supers},
    udp::{Arrivals, Socket},
};

/// Packets and super-packets a round takes from the queue.
const BUDGET: usize = 64;
/// Datagrams and trains a round takes from the socket.
const SLOTS: usize = 16;
/// Letters a round answers: each may begin a handshake, which costs a third of a millisecond.
const LETTERS: usize = 16;
/// How long a lane sleeps at most while the system refuses to tell it of something.
const RETRY_WATCH: Duration = Duration::from_millis(100);
/// Failures of a queue in a row after which it counts as lost although the error does not say so.
const FAILURES: u32 = 1_000;

pub(super) struct Worker {
    lane: Lane,
    queue: Option<Box<dyn Queue>>,
    socket: Box<dyn Socket>,
    mailboxes: Mailboxes,
    events: SyncSender<Event>,
    arrivals: Arrivals,
    supers: Supers,
    output: Output,
    crossed: Crossed,
    failures: u32,
    waiter: Waiter,
    /// The waiter does not know of all that there is.
    is_deaf: bool,
    from_socket: Pace,
    from_direct: Pace,
    from_queue: Pace,
    spin: Spin,
    turns: Turns,
}

/// How much a source is asked for in a round. What comes alone is passed on before anybody looks whether more has come,
/// which would cost it a system call; what comes in crowds is taken in batches.
#[derive(Debug, Clone, Copy, Default)]
struct Pace {
    crowded: bool,
}

impl Pace {
    /// Things to ask for, of a source that is ready.
    fn most(self, batch: usize) -> usize {
        if self.crowded { batch } else { 1 }
    }

    /// So many came of `asked`: if it is ready in the next round too, more wait there.
    fn took(&mut self, count: usize, asked: usize) {
        self.crowded = count >= asked.min(2);
    }
}

/// Where a lane finds what is for it, and where it leaves what is for lane 0.
#[derive(Debug)]
pub(super) struct Mailboxes {
    pub(super) own: Arc<Mailbox>,
    /// Lane 0's; `None` for lane 0.
    pub(super) first: Option<Arc<Mailbox>>,
}

/// Which way datagrams came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Via {
    All,
    Direct,
}

impl Worker {
    /// # Errors
    ///
    /// If the process has no descriptor left.
    pub(super) fn new(
        lane: Lane,
        parts: LaneParts,
        mailboxes: Mailboxes,
        events: SyncSender<Event>,
    ) -> io::Result<Self> {
        let mut worker = Self {
            lane,
            queue: Some(parts.queue),
            socket: parts.socket,
            mailboxes,
            events,
            arrivals: Arrivals::new(SLOTS),
            supers: Supers::new(192 << 10, BUDGET),
            output: Output::new(),
            crossed: Crossed::default(),
            failures: 0,
            waiter: Waiter::new()?,
            is_deaf: false,
            from_socket: Pace::default(),
            from_direct: Pace::default(),
            from_queue: Pace::default(),
            spin: Spin::default(),
            turns: Turns::default(),
        };
        worker.watch();
        Ok(worker)
    }

    /// Looks for more for up to so long before it sleeps.
    pub(super) fn with_busy_poll(mut self, most: Duration) -> Self {
        self.spin = Spin::new(most);
        self
    }

    pub(super) fn run(mut self) {
        while !self.turn() {}
    }

    /// One round: waits, then gives commands, socket, queue and timers a bounded share each. True if the lane is to
    /// stop.
    fn turn(&mut self) -> bool {
        let ready = self.wait();
        let now = Instant::now();
        if ready.bell {
            if self.take_post(now) {
                return true;
            }
            self.take_crossed(now);
        }
        match ready.socket {
            true => self.receive(Via::All, now),
            false => self.from_socket = Pace::default(),
        }
        // After the other one: what an end sent before it had a way of its own waits there.
        match ready.direct {
            true => self.receive(Via::Direct, now),
            false => self.from_direct = Pace::default(),
        }
        match ready.queue {
            true => self.read(now),
            false => self.from_queue = Pace::default(),
        }
        // What is due beyond one call's share finds its turn in the next round, which does not wait.
        if self.lane.poll_timeout().is_some_and(|due| due <= now) {
            self.lane.handle_timeout(now, &mut self.output);
            if self.socket.settle(now) {
                self.watch();
            }
        }
        self.drain();
        false
    }

    /// Waits until something is ready or a timer is due: awake for a while if that paid lately, then asleep.
    fn wait(&mut self) -> Ready {
        if self.spin.is_off() {
            return self.sleep();
        }
        let began = Instant::now();
        let window = self.spin.window();
        while !window.is_zero() && Instant::now().since(began) < window {
            let ready = self.waiter.look();
            if ready.is_any() {
                self.spin.came(Instant::now().since(began));
                return ready;
            }
            if self.lane.poll_timeout().is_some_and(|due| due <= Instant::now()) {
                return ready;
            }
        }
        if !window.is_zero() {
            self.spin.missed();
        }
        let ready = self.sleep();
        if ready.is_any() {
            self.spin.came(Instant::now().since(began));
        }
        ready
    }

    /// Waits until something is ready or a timer is due.
    fn sleep(&mut self) -> Ready {
        let mut due = self.lane.poll_timeout();
        if self.is_deaf {
            let retry = Instant::now() + RETRY_WATCH;
            due = Some(due.map_or(retry, |due| due.min(retry)));
            self.watch();
        }
        self.waiter.wait(due)
    }

    /// Waits for all that there is from now on.
    fn watch(&mut self) {
        let watch = |source, fd| self.waiter.watch(source, fd);
        let watched = watch(Source::Bell, self.mailboxes.own.bell())
            .and_then(|()| watch(Source::Socket, self.socket.as_fd()))
            .and_then(|()| self.socket.direct().map_or(Ok(()), |fd| watch(Source::Direct, fd)))
            .and_then(|()| self.queue.as_ref().map_or(Ok(()), |queue| watch(Source::Queue, queue.as_fd())));
        if let Err(error) = &watched
            && !self.is_deaf
        {
            warn!(lane = self.lane.number(), %error, "the system refuses to tell of packets, asking again");
        }
        self.is_deaf = watched.is_err();
    }

    /// Does what control left; true if the lane is to stop.
    fn take_post(&mut self, now: Instant) -> bool {
        let post = self.mailboxes.own.take(LETTERS);
        if post.stop {
            return true;
        }
        if let Some(table) = post.table {
            self.lane.set_table(table, now);
        }
        for letter in post.letters {
            match letter {
                Letter::Initiate(peer) => self.lane.initiate(peer, now, &mut self.output),
                Letter::Send(to, bytes) => self.lane.send_datagram(to, &bytes, &mut self.output),
                Letter::Redirect(peers) => self.lane.redirect(&peers),
                Letter::Expect(marks) => self.lane.expect(marks),
                Letter::Agree(agreement) => self.lane.agree(&agreement, now, &mut self.output),
                Letter::Socket(socket) => {
                    self.waiter.forget(self.socket.as_fd());
                    self.socket.direct().into_iter().for_each(|fd| self.waiter.forget(fd));
                    self.socket = socket;
                    self.watch();
                }
                Letter::Queue(queue) => {
                    self.give_up_queue();
                    self.queue = Some(queue);
                    self.failures = 0;
                    self.watch();
                }
                Letter::Snapshot(answer) => {
                    let (mut lane, peers) = self.lane.snapshot(now);
                    lane.queue_attached = self.queue.is_some();
                    if let Some(queue) = &self.queue {
                        (lane.offloads, lane.refused_runs) = (queue.offloads(), queue.refused_runs());
                    }
                    lane.socket = self.socket.state();
                    // The asker may have lost patience.
                    let _ = answer.try_send((lane, peers));
                }
            }
            self.drain();
        }
        false
    }

    /// Sends what other lanes handed over.
    fn take_crossed(&mut self, now: Instant) {
        let mut crossed = mem::take(&mut self.crossed);
        self.mailboxes.own.take_crossed(&mut crossed);
        for (buffer, len) in crossed.drain() {
            self.lane.handle_crossed(buffer, len, now, &mut self.output);
            if self.output.is_nearly_full() {
                self.drain();
            }
        }
        self.crossed = crossed;
    }

    fn receive(&mut self, via: Via, now: Instant) {
        let pace = if via == Via::All { &mut self.from_socket } else { &mut self.from_direct };
        let most = pace.most(SLOTS);
        let received = match via {
            Via::All => self.socket.receive(&mut self.arrivals, most),
            Via::Direct => self.socket.receive_direct(&mut self.arrivals, most),
        };
        match received {
            Ok(count) => pace.took(count, most),
            Err(error) => {
                // Errors of earlier datagrams are reported here too; reading on clears them.
                debug!(%error, "receive failed");
                return;
            }
        }
        // Taken out, so that what is made of it can be sent in between.
        let arrivals = mem::replace(&mut self.arrivals, Arrivals::none());
        for n in 0..arrivals.len() {
            match arrivals.get(n) {
                Some(Ok((outer, datagrams))) => {
                    for datagram in datagrams {
                        self.lane.handle_datagram(outer, datagram, now, &mut self.output);
                        if self.output.is_nearly_full() {
                            self.drain();
                        }
                    }
                }
                Some(Err(_)) => self.lane.count_drop(DropReason::Truncated, 1),
                None => break,
            }
        }
        self.arrivals = arrivals;
    }

    fn read(&mut self, now: Instant) {
        let Some(queue) = &mut self.queue else { return };
        self.supers.clear();
        let most = self.from_queue.most(BUDGET);
        match queue.read(&mut self.supers, most) {
            Ok(count) => {
                self.failures = 0;
                self.from_queue.took(count, most);
            }
            Err(error) => {
                self.failures += 1;
                if tun::is_lost(&error) || self.failures >= FAILURES {
                    self.lose_queue(error);
                }
                return;
            }
        }
        let mut supers = mem::replace(&mut self.supers, Supers::none());
        let mut turns = mem::take(&mut self.turns);
        for &n in turns.of(&supers) {
            let Some((offload, buffer, len)) = supers.get_padded_mut(n) else { break };
            match offload {
                Offload::None => self.lane.handle_packet(buffer, len, now, &mut self.output),
                Offload::Cut(cut) => match Segments::new(buffer, len, cut) {
                    Some(mut segments) => self.handle_segments(&mut segments, now),
                    None => self.lane.count_drop(DropReason::UnexpectedOffload, 1),
                },
                Offload::Unknown => self.lane.count_drop(DropReason::UnexpectedOffload, 1),
            }
            if self.output.is_nearly_full() {
                self.drain();
            }
        }
        self.supers = supers;
        self.turns = turns;
    }

    /// Passes a super-packet to the lane, in as many steps as the output needs.
    fn handle_segments(&mut self, segments: &mut Segments<'_>, now: Instant) {
        while !segments.is_done() {
            self.lane.handle_segments(segments, now, &mut self.output);
            if !segments.is_done() {
                self.drain();
            }
        }
    }

    /// Sends, writes and reports all that the lane has put out.
    fn drain(&mut self) {
        let datagrams = &mut self.output.datagrams;
        if !datagrams.is_empty() {
            let refused = datagrams.len() - self.socket.send(datagrams);
            self.lane.count_drop(DropReason::SendFailed, refused as u64);
            datagrams.clear();
        }
        if !self.output.packets.is_empty() {
            self.write();
            self.output.packets.clear();
        }
        if !self.output.crossing.is_empty() {
            let refused = self.mailboxes.first.as_ref().map_or(0, |first| first.cross(&self.output.crossing));
            self.lane.count_drop(DropReason::CrossingFull, refused as u64);
            self.output.crossing.clear();
        }
        while let Some(event) = self.lane.poll_event() {
            self.report(event);
        }
    }

    fn write(&mut self) {
        let packets = &mut self.output.packets;
        let count = packets.len();
        let written = match &mut self.queue {
            Some(queue) => queue.write(packets),
            None => Ok(0),
        };
        let (taken, lost) = match written {
            Ok(taken) => (taken, None),
            Err(error) => (0, Some(error)),
        };
        self.lane.count_drop(DropReason::QueueRefused, (count - taken) as u64);
        if let Some(error) = lost {
            self.lose_queue(error);
        }
    }

    fn lose_queue(&mut self, error: io::Error) {
        let lane = self.lane.number();
        warn!(lane, %error, "TUN queue lost, going on without");
        self.give_up_queue();
        self.report(Event::QueueLost { lane, error });
    }

    fn give_up_queue(&mut self) {
        if let Some(queue) = self.queue.take() {
            self.waiter.forget(queue.as_fd());
        }
    }

    fn report(&mut self, event: Event) {
        match self.events.try_send(event) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(event)) => self.lane.count_lost_event(&event),
        }
    }
}

#[cfg(test)]
mod tests;
