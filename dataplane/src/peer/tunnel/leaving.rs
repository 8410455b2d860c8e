//! A tunnel that gives way to one with an agreed key, and whose sessions are its last.

use std::time::Duration;

use super::Tunnel;
use crate::clock::Instant;

impl Tunnel {
    /// The sessions that it has are its last: it makes no handshake and takes none, until [`stay`](Self::stay). It ends
    /// with them, 180 s ([`REJECT_AFTER`](super::REJECT_AFTER)) from now at the latest.
    pub(crate) fn leave(&mut self) {
        self.is_leaving = true;
        self.attempt = None;
    }

    /// Makes handshakes again.
    pub(crate) fn stay(&mut self) {
        self.is_leaving = false;
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.is_leaving
    }

    /// True while it has a session, confirmed or not.
    pub(crate) fn has_session(&self, now: Instant) -> bool {
        self.sessions.iter().flatten().any(|session| !session.is_over(now))
    }

    /// For how long it has been known that both ends send on it.
    pub(crate) fn proved_for(&self, now: Instant) -> Option<Duration> {
        self.opened.filter(|_| self.can_send(now)).map(|at| now.since(at))
    }
}
