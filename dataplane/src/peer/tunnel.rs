//! WireGuard state for one pair of key epochs: all of boringtun's `Tunn` that the data plane sees.
//!
//! A `Tunn` keeps up to eight sessions in a ring and does not say which; this module follows along, since the ring, the
//! timers and the buffers of boringtun 0.7.1 have traps, each with a remedy here:
//!
//! | trap | remedy |
//! | --- | --- |
//! | panics if a buffer is too small | every buffer has [`ROOM`](crate::buffer::ROOM) bytes |
//! | an unconfirmed session takes the place of one in use after eight unanswered answers | before that answer an initiation of our own uses up the place ([`Tunnel::before_handshake`]) |
//! | a timer that was not run for long expires the session at once | the timers run before a handshake |
//! | 90 s without an answer wipe a session that is still good | the timers rest while one would be wiped ([`Tunnel::must_rest`]) |
//! | the first packet after 15 idle seconds begins a handshake | the timers rest until the packet was unanswered for 15 s |
//! | times are as coarse as its timers run: a keepalive may be forgotten, and the other end then begins a handshake | keepalives are counted here |
//! | after a cookie it waits five seconds | [`Tunnel::handle_cookie`] asks for another initiation at once |
//! | sessions outlive 180 s if the timers rest | their age is checked here |
//! | no limit to messages in a session | counted here |
//! | session keys stay in memory | overwritten on drop |

mod key;
mod leaving;
mod timers;

use std::{hint, sync::Arc, time::Duration};

use boringtun::{
    noise::{Tunn, TunnResult, errors::WireGuardError},
    x25519,
};

use super::handshake::Identity;
use crate::{
    clock::Instant,
    drop_reason::DropReason,
    key::{PresharedKey, PublicKey},
};

pub(crate) use key::{Order, TunnelKey};

/// Type of a handshake initiation, and its length.
pub(crate) const INITIATION: (u8, usize) = (1, 148);
/// Type of a handshake response, and its length.
pub(crate) const RESPONSE: (u8, usize) = (2, 92);
/// Type of a cookie reply, and its length.
pub(crate) const COOKIE: (u8, usize) = (3, 64);
/// Type of a data message, and the least length: header and tag around nothing.
pub(crate) const DATA: (u8, usize) = (4, 32);

/// A session is over after this time (whitepaper, section 6.1).
const REJECT_AFTER: Duration = Duration::from_secs(180);
/// A session is over after this many messages.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// A new session is made after this many.
const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// A handshake that stays unanswered for so long is given up.
pub(crate) const ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// Unanswered initiations are repeated after this time, less a jitter.
const RETRY: Duration = Duration::from_secs(5);
/// The same while another address has not been tried.
const RETRY_UNTRIED: Duration = Duration::from_secs(1);
const RETRY_JITTER: Duration = Duration::from_millis(333);
/// With an agreed key, offer and initiation are repeated when the handshake is so old: either may be lost, or the initiation
/// be there before the key.
const REPEAT_OFFER: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(1)];
/// Cookies make us repeat an initiation at once, but not more often than this.
const COOKIE_PAUSE: Duration = Duration::from_secs(1);
/// Data is answered by an empty message after this time if by nothing else.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Timers older than this are run before a handshake.
const STALE: Duration = Duration::from_millis(250);
/// Sessions in boringtun's ring.
const RING: usize = 8;

/// What a tunnel with an agreed key knows beside it.
#[derive(Debug)]
pub(crate) struct Agreed {
    /// What goes ahead of our initiations; `None` if the peer made the offer.
    pub(crate) offer: Option<Arc<[u8]>>,
    /// Upper 24 bits of the peer's indices, once known.
    pub(crate) remote_index: Option<u32>,
    /// A handshake on it stayed unanswered: the peer may have lost the key.
    pub(crate) is_spent: bool,
}

/// What came out of a data message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opened {
    /// A packet of this length, at the beginning of the buffer.
    Packet(usize),
    /// Nothing: the other end is alive.
    Keepalive,
    /// Authentic, but not an IP packet.
    Malformed,
}

/// What became of a packet to be sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sealed {
    /// A datagram of this length.
    Data(usize),
    /// The session had just ended: boringtun kept the packet and made an initiation of this length.
    Initiation(usize),
    /// The session had just ended: boringtun kept the packet.
    Kept,
}

/// What a timer or a handshake wants sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// Nothing.
    Nothing,
    /// An initiation of this length, to whichever address is next.
    Initiation(usize),
    /// A keepalive of this length, to the peer's endpoint.
    Keepalive(usize),
    /// Nothing: the handshake was given up.
    GaveUp,
}

#[derive(Debug, Clone, Copy)]
struct Session {
    /// Low eight bits of its index.
    number: u8,
    established: Instant,
    /// The peer has it too, and may send on it.
    confirmed: bool,
}

impl Session {
    fn is_over(&self, now: Instant) -> bool {
        now.since(self.established) >= REJECT_AFTER
    }
}

/// Our own handshake that nobody has answered yet.
#[derive(Debug, Clone, Copy)]
struct Attempt {
    started: Instant,
    retry_at: Instant,
}

/// See the module.
pub(crate) struct Tunnel {
    pub(crate) key: TunnelKey,
    pub(crate) order: Order,
    /// The upper 24 bits of its receiver indices.
    pub(crate) index: u32,
    /// If its preshared key was agreed on for it.
    pub(crate) agreed: Option<Agreed>,
    /// See [`leave`](Self::leave).
    is_leaving: bool,
    tunn: Box<Tunn>,
    /// boringtun's ring as far as it shows.
    sessions: [Option<Session>; RING],
    /// The session it sends on: confirmed by the peer.
    current: Option<Session>,
    /// Number that boringtun gave last, to a session or to an initiation.
    last_number: u8,
    attempt: Option<Attempt>,
    /// Since when boringtun believes that a handshake of its own is under way, and its number.
    initiated: Option<(Instant, u8)>,
    cookie_used: Option<Instant>,
    was_confirmed: bool,
    /// Messages sent on the current session.
    sent: u64,
    created: Instant,
    ticked: Instant,
    heard: Option<Instant>,
    /// When the first message was opened: the peer sends on it.
    opened: Option<Instant>,
    unanswered: Option<Instant>,
    last_data: Option<Instant>,
    /// Since when the peer waits for a sign that its data arrived.
    owes: Option<Instant>,
    kept_packets: bool,
    /// Receiver index of the peer in the last data message.
    receiver: [u8; 4],
    limits: (u64, u64),
}

impl std::fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tunnel").field("key", &self.key).field("index", &self.index).finish_non_exhaustive()
    }
}

impl Tunnel {
    /// Makes a tunnel without a session: two curve operations.
    pub(crate) fn new(
        (key, order): (TunnelKey, Order),
        identity: &Identity,
        remote: &PublicKey,
        psk: Option<&PresharedKey>,
        index: u32,
        now: Instant,
    ) -> Self {
        let tunn = Tunn::new(
            identity.secret.clone(),
            x25519::PublicKey::from(*remote.as_bytes()),
            psk.map(|psk| *psk.expose()),
            None,
            index,
            Some(Arc::clone(&identity.unlimited)),
        );
        Self {
            key,
            order,
            index,
            agreed: None,
            is_leaving: false,
            tunn: Box::new(tunn),
            sessions: [None; RING],
            current: None,
            last_number: 0,
            attempt: None,
            initiated: None,
            cookie_used: None,
            was_confirmed: false,
            sent: 0,
            created: now,
            ticked: now,
            heard: None,
            opened: None,
            unanswered: None,
            last_data: None,
            owes: None,
            kept_packets: false,
            receiver: [0; 4],
            limits: (REKEY_AFTER_MESSAGES, REJECT_AFTER_MESSAGES),
        }
    }

    /// True if packets may be sent on it.
    pub(crate) fn can_send(&self, now: Instant) -> bool {
        self.current.is_some_and(|session| !session.is_over(now)) && self.sent < self.limits.1
    }

    /// True while it has a session, confirmed or not, or works on one.
    pub(crate) fn is_alive(&self, now: Instant) -> bool {
        self.attempt.is_some() || self.has_session(now)
    }

    pub(crate) fn is_attempting(&self) -> bool {
        self.attempt.is_some()
    }

    /// False for a tunnel whose handshakes only the peer may begin: it has its key from an offer of the peer's, and no data
    /// has proved yet that the peer has it too. False also if the peer seems to have lost the key.
    pub(crate) fn may_initiate(&self) -> bool {
        self.agreed.as_ref().is_none_or(|agreed| {
            !agreed.is_spent && (agreed.offer.is_some() || self.was_confirmed || self.current.is_some())
        })
    }

    /// True for a tunnel that the peer offered, answered not longer than `patience` ago, and that no data came on yet.
    pub(crate) fn awaits_confirmation(&self, now: Instant, patience: Duration) -> bool {
        let theirs = self.agreed.as_ref().is_some_and(|agreed| agreed.offer.is_none());
        theirs && self.current.is_none() && self.is_alive(now) && now.since(self.created) < patience
    }

    /// True for a tunnel that we offered and that had no session yet.
    pub(crate) fn awaits_answer(&self) -> bool {
        self.agreed.as_ref().is_some_and(|agreed| agreed.offer.is_some())
            && self.current.is_none()
            && !self.was_confirmed
    }

    /// True for the tunnel that initiations from this index (upper 24 bits) are for.
    pub(crate) fn is_of_sender(&self, sender: u32) -> bool {
        self.agreed.as_ref().is_some_and(|agreed| agreed.remote_index == Some(sender))
    }

    /// True if a handshake on it stayed unanswered for `patience`. At once if the peer, whose offer we cannot repeat, answers no
    /// data either: then it was most likely started anew.
    pub(crate) fn needs_another_key(&self, now: Instant, patience: Duration) -> bool {
        let (Some(agreed), Some(time)) = (&self.agreed, self.attempting_for(now)) else { return false };
        time >= patience || agreed.offer.is_none() && self.unanswered(now) >= KEEPALIVE
    }

    /// Begins no handshake any more.
    pub(crate) fn spend(&mut self) {
        self.attempt = None;
        if let Some(agreed) = &mut self.agreed {
            agreed.is_spent = true;
        }
    }

    pub(crate) fn is_spent(&self) -> bool {
        self.agreed.as_ref().is_some_and(|agreed| agreed.is_spent)
    }

    /// What has to go ahead of the initiation just made: the peer does not have the key, or may have lost it.
    pub(crate) fn offer_ahead(&self, now: Instant) -> Option<Arc<[u8]>> {
        let offer = self.agreed.as_ref()?.offer.as_ref()?;
        let is_rekey = self.can_send(now) && self.attempting_for(now).is_none_or(|time| time.is_zero());
        (!is_rekey || self.unanswered(now) >= KEEPALIVE).then(|| Arc::clone(offer))
    }

    /// For how long a handshake of ours has been unanswered.
    pub(crate) fn attempting_for(&self, now: Instant) -> Option<Duration> {
        self.attempt.map(|attempt| now.since(attempt.started))
    }

    /// True for a data message to the session that the last one was sent on: one that we made ourselves.
    pub(crate) fn is_own(&self, datagram: &[u8]) -> bool {
        datagram.starts_with(&[DATA.0, 0, 0, 0]) && datagram.get(4..8) == Some(&self.receiver) && self.sent > 0
    }

    /// True if so many messages were sent that a new session is due.
    pub(crate) fn wants_rekey(&self) -> bool {
        self.sent >= self.limits.0
    }

    /// When its current session was made.
    pub(crate) fn established(&self) -> Option<Instant> {
        self.current.map(|session| session.established)
    }

    /// When a packet last passed, keepalives not counted.
    pub(crate) fn last_data(&self) -> Option<Instant> {
        self.last_data
    }

    /// For how long no packet passed.
    pub(crate) fn idle(&self, now: Instant) -> Duration {
        now.since(self.last_data.unwrap_or(self.created))
    }

    /// For how long data has waited for any sign of the peer. A peer that hears us answers after
    /// [`KEEPALIVE`] at the latest.
    pub(crate) fn unanswered(&self, now: Instant) -> Duration {
        self.unanswered.map_or(Duration::ZERO, |since| now.since(since))
    }

    /// When [`handle_timeout`](Self::handle_timeout) has a handshake to go on with.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.attempt.map(|attempt| attempt.retry_at.min(attempt.started + ATTEMPT_TIME))
    }

    /// Seals a padded packet, or nothing as a keepalive, into `out`.
    pub(crate) fn seal(&mut self, padded: &[u8], now: Instant, out: &mut [u8]) -> Sealed {
        let sealed = match self.tunn.encapsulate(padded, out) {
            TunnResult::WriteToNetwork(datagram) => (datagram[0], datagram.len()),
            _ => (0, 0),
        };
        if !padded.is_empty() {
            self.last_data = Some(now);
            self.unanswered.get_or_insert(now);
        }
        match sealed {
            (kind, len) if kind == DATA.0 => {
                self.sent += 1;
                self.owes = None;
                self.receiver.copy_from_slice(&out[4..8]);
                Sealed::Data(len)
            }
            (kind, len) if kind == INITIATION.0 && !self.is_leaving => {
                self.kept_packets = true;
                self.note_initiation(out, now);
                Sealed::Initiation(len)
            }
            _ => {
                self.kept_packets = true;
                Sealed::Kept
            }
        }
    }

    /// Seals the next packet that boringtun kept, into `out`.
    pub(crate) fn next_kept(&mut self, out: &mut [u8]) -> Option<usize> {
        if !self.kept_packets {
            return None;
        }
        match self.tunn.decapsulate(None, &[], out) {
            TunnResult::WriteToNetwork(datagram) if datagram[0] == DATA.0 => {
                self.sent += 1;
                Some(datagram.len())
            }
            _ => {
                self.kept_packets = false;
                None
            }
        }
    }

    /// Opens a data message for this tunnel into `out`. The packet is unchecked: its source may be forged by the peer.
    pub(crate) fn open(&mut self, datagram: &[u8], now: Instant, out: &mut [u8]) -> Result<Opened, DropReason> {
        let &[_, _, _, _, number, _, _, _, c0, c1, c2, c3, c4, c5, c6, c7, ..] = datagram else {
            return Err(DropReason::MalformedDatagram);
        };
        let session = self.sessions[usize::from(number) % RING].filter(|session| session.number == number);
        let session = session.ok_or(DropReason::UnknownIndex)?;
        if session.is_over(now) {
            return Err(DropReason::ExpiredSession);
        }
        if u64::from_le_bytes([c0, c1, c2, c3, c4, c5, c6, c7]) >= REJECT_AFTER_MESSAGES {
            return Err(DropReason::ExpiredSession);
        }
        let opened = match self.tunn.decapsulate(None, datagram, out) {
            TunnResult::Done => Opened::Keepalive,
            TunnResult::WriteToTunnelV4(packet, _) => Opened::Packet(packet.len()),
            TunnResult::WriteToTunnelV6(packet, _) => Opened::Packet(packet.len()),
            // Type and length are right, so this is about what was inside.
            TunnResult::Err(WireGuardError::InvalidPacket) => Opened::Malformed,
            TunnResult::Err(WireGuardError::DuplicateCounter | WireGuardError::InvalidCounter) => {
                return Err(DropReason::Replay);
            }
            TunnResult::Err(WireGuardError::WrongIndex | WireGuardError::NoCurrentSession) => {
                return Err(DropReason::ExpiredSession);
            }
            TunnResult::Err(_) | TunnResult::WriteToNetwork(_) => return Err(DropReason::BadData),
        };
        self.heard = Some(now);
        self.opened.get_or_insert(now);
        self.unanswered = None;
        if matches!(opened, Opened::Packet(_)) {
            self.last_data = Some(now);
            self.owes.get_or_insert(now);
        }
        self.confirm(session, now);
        Ok(opened)
    }

    /// True once: the first time that the peer proved to have a session of this tunnel.
    pub(crate) fn take_confirmation(&mut self) -> bool {
        let first = self.current.is_some() && !self.was_confirmed;
        self.was_confirmed |= first;
        first
    }

    /// True if [`take_confirmation`](Self::take_confirmation) would be.
    pub(crate) fn is_newly_confirmed(&self) -> bool {
        self.current.is_some() && !self.was_confirmed
    }

    /// Answers an initiation into `out`; the length of the response. It moves nothing until the peer confirms.
    pub(crate) fn answer(&mut self, initiation: &[u8], now: Instant, out: &mut [u8]) -> Result<usize, DropReason> {
        if self.is_leaving {
            return Err(DropReason::StaleHandshake);
        }
        match self.tunn.decapsulate(None, initiation, out) {
            TunnResult::WriteToNetwork(response) if response.len() == RESPONSE.1 => {
                let number = response[4];
                self.last_number = number;
                self.initiated = None;
                self.sessions[usize::from(number) % RING] =
                    Some(Session { number, established: now, confirmed: false });
                Ok(RESPONSE.1)
            }
            TunnResult::Err(WireGuardError::WrongTai64nTimestamp) => Err(DropReason::StaleHandshake),
            TunnResult::Err(WireGuardError::InvalidMac) => Err(DropReason::WrongMac),
            _ => Err(DropReason::BadHandshake),
        }
    }

    /// Takes the response to our initiation; writes the keepalive that confirms the session into `out`.
    pub(crate) fn finish(&mut self, response: &[u8], now: Instant, out: &mut [u8]) -> Result<usize, DropReason> {
        if self.is_leaving {
            return Err(DropReason::StaleHandshake);
        }
        let len = match self.tunn.decapsulate(None, response, out) {
            TunnResult::WriteToNetwork(keepalive) => keepalive.len(),
            TunnResult::Err(WireGuardError::UnexpectedPacket) => return Err(DropReason::StaleHandshake),
            TunnResult::Err(WireGuardError::InvalidMac) => return Err(DropReason::WrongMac),
            _ => return Err(DropReason::BadHandshake),
        };
        if let Some(agreed) = &mut self.agreed
            && let Some(&[_, a, b, c]) = response.get(4..8)
        {
            agreed.remote_index = Some(u32::from_le_bytes([a, b, c, 0]));
        }
        let session = Session { number: response[8], established: now, confirmed: true };
        self.sessions[usize::from(session.number) % RING] = Some(session);
        // A late answer to an earlier initiation leaves the newest one under way.
        if self.initiated.is_some_and(|(_, number)| number == session.number) {
            self.initiated = None;
        }
        self.heard = Some(now);
        self.unanswered = None;
        self.confirm(session, now);
        self.attempt = None;
        self.sent += 1;
        Ok(len)
    }

    /// Takes a cookie reply; true if the initiation is to be repeated with it at once.
    pub(crate) fn handle_cookie(&mut self, reply: &[u8], now: Instant, out: &mut [u8]) -> Result<bool, DropReason> {
        match self.tunn.decapsulate(None, reply, out) {
            TunnResult::Done => {}
            _ => return Err(DropReason::BadCookie),
        }
        let rested = self.cookie_used.is_none_or(|at| now.since(at) >= COOKIE_PAUSE);
        if self.attempt.is_none() || !rested {
            return Ok(false);
        }
        self.cookie_used = Some(now);
        Ok(true)
    }

    /// Makes an initiation, whether or not one is under way.
    pub(crate) fn initiate(&mut self, now: Instant, out: &mut [u8]) -> Due {
        if self.is_leaving {
            return Due::Nothing;
        }
        if now.since(self.ticked) >= STALE && !self.must_rest(now) {
            let due = self.tick(now, out);
            if let Due::Initiation(_) = due {
                return due;
            }
        }
        match self.tunn.format_handshake_initiation(out, true) {
            TunnResult::WriteToNetwork(_) => {
                self.note_initiation(out, now);
                Due::Initiation(INITIATION.1)
            }
            _ => Due::Nothing,
        }
    }

    /// Says when the initiation just made is to be repeated.
    pub(crate) fn retry(&mut self, now: Instant, untried: bool, jitter: Duration) {
        if let Some(attempt) = &mut self.attempt {
            let pause = if untried { RETRY_UNTRIED } else { RETRY };
            let jitter = Duration::from_nanos(jitter.as_nanos() as u64 % RETRY_JITTER.as_nanos() as u64);
            let repeats = REPEAT_OFFER.map(|age| attempt.started + age);
            let repeat = repeats.into_iter().find(|at| self.agreed.is_some() && *at > now);
            attempt.retry_at = repeat.unwrap_or(now + (pause - jitter));
        }
    }

    /// Stops trying: its keys are out of date.
    pub(crate) fn cancel_attempt(&mut self) {
        self.attempt = None;
    }

    /// Follows boringtun when it made an initiation.
    fn note_initiation(&mut self, initiation: &[u8], now: Instant) {
        let number = initiation[4];
        self.last_number = number;
        let since = self.initiated.map_or(now, |(since, _)| since);
        self.initiated = Some((since, number));
        self.attempt.get_or_insert(Attempt { started: now, retry_at: now + RETRY });
    }

    /// Follows boringtun when data arrived on `session`: it sends on the newest that carried any.
    fn confirm(&mut self, session: Session, now: Instant) {
        let session = Session { confirmed: true, ..session };
        self.sessions[usize::from(session.number) % RING] = Some(session);
        let newer = |current: Session| session.established >= current.established || current.is_over(now);
        if !self.current.is_none_or(newer) {
            return;
        }
        if self.current.is_none_or(|current| current.number != session.number) {
            self.sent = 0;
        }
        self.current = Some(session);
        if self.attempt.is_some_and(|attempt| session.established >= attempt.started) {
            self.attempt = None;
        }
    }

    #[cfg(test)]
    pub(crate) fn set_limits(&mut self, rekey: u64, reject: u64) {
        self.limits = (rekey, reject);
    }
}

impl Drop for Tunnel {
    /// boringtun and ring leave session keys in memory; a `Tunn` without any is written over them.
    fn drop(&mut self) {
        let nobody = x25519::PublicKey::from([9; 32]);
        *self.tunn = Tunn::new(x25519::StaticSecret::from([0; 32]), nobody, None, None, 0, None);
        hint::black_box(&mut self.tunn);
    }
}

#[cfg(test)]
mod tests;
