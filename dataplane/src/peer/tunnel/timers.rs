//! When boringtun's timers run, and when they had better rest.

use std::time::Duration;

use boringtun::noise::{TunnResult, errors::WireGuardError};

use super::{ATTEMPT_TIME, Due, INITIATION, KEEPALIVE, RING, STALE, Sealed, Session, Tunnel};
use crate::clock::Instant;

/// boringtun wipes all sessions when a handshake is 90 s old; with a margin for late timers.
const WIPE_AFTER: Duration = Duration::from_secs(80);
/// boringtun begins a handshake if data stayed unanswered for so long.
const UNANSWERED: Duration = Duration::from_secs(15);

impl Tunnel {
    /// To be called before a handshake message is handed over, again until it says `Nothing`: runs timers that are late,
    /// and keeps an answer from taking the place of a session that is in use: handshakes that crossed make two.
    pub(crate) fn before_handshake(&mut self, now: Instant, answering: bool, out: &mut [u8]) -> Due {
        if self.is_leaving {
            return Due::Nothing;
        }
        if now.since(self.ticked) >= STALE && !self.must_rest(now) {
            let due = self.tick(now, out);
            if due != Due::Nothing {
                return due;
            }
        }
        let next = self.last_number.wrapping_add(1);
        let taken = |session: Session| session.confirmed && !session.is_over(now) && session.number != next;
        if answering && self.sessions[usize::from(next) % RING].is_some_and(taken) {
            return self.initiate(now, out);
        }
        Due::Nothing
    }

    /// Goes on with a handshake that is under way; runs boringtun's timers if this is the tunnel that packets are `sent`
    /// on or a handshake is under way. Others only receive until they are over, and need none.
    pub(crate) fn handle_timeout(&mut self, now: Instant, sending: bool, out: &mut [u8]) -> Due {
        if self.owes.is_some_and(|since| now.since(since) >= KEEPALIVE) && self.can_send(now) {
            self.owes = None;
            if let Sealed::Data(len) = self.seal(&[], now, out) {
                return Due::Keepalive(len);
            }
        }
        if let Some(attempt) = self.attempt {
            if now.since(attempt.started) >= ATTEMPT_TIME {
                self.attempt = None;
                return Due::GaveUp;
            }
            if now >= attempt.retry_at {
                return self.initiate(now, out);
            }
        } else if !sending || self.is_leaving {
            return Due::Nothing;
        }
        if self.must_rest(now) {
            return Due::Nothing;
        }
        self.tick(now, out)
    }

    /// True while boringtun's timers would do harm: wipe a good session, or begin a handshake for a packet whose answer
    /// may well be under way.
    pub(super) fn must_rest(&self, now: Instant) -> bool {
        let would_wipe = self.initiated.is_some_and(|(since, _)| now.since(since) >= WIPE_AFTER);
        if would_wipe && self.can_send(now) {
            return true;
        }
        let quiet = self.heard.is_some_and(|heard| now.since(heard) + STALE >= UNANSWERED);
        quiet && self.unanswered.is_some_and(|since| now.since(since) < UNANSWERED)
    }

    /// Runs boringtun's timers.
    pub(super) fn tick(&mut self, now: Instant, out: &mut [u8]) -> Due {
        self.ticked = now;
        let (kind, len) = match self.tunn.update_timers(out) {
            TunnResult::WriteToNetwork(datagram) => (datagram[0], datagram.len()),
            TunnResult::Err(WireGuardError::ConnectionExpired) => {
                self.sessions = [None; RING];
                self.current = None;
                self.initiated = None;
                self.kept_packets = false;
                return Due::Nothing;
            }
            _ => return Due::Nothing,
        };
        if kind == INITIATION.0 {
            self.note_initiation(out, now);
            return Due::Initiation(len);
        }
        self.sent += 1;
        self.owes = None;
        Due::Keepalive(len)
    }
}
