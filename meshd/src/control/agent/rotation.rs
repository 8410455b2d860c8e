//! Rotation of the own keys: who may cause it, how often, and when it is due by itself.
//!
//! ```text
//! operator (local API) ─────────────┐
//! schedule (each tick) ─────────────┤
//! clock stepped back ───────────────┼─> promote: on disk first, then published
//! keyserver asks ─> AskedAllowance ─┘
//! ```

use std::time::{Duration, Instant};

use mesh_protocol::control::NodeMessage;

use super::{Agent, Now};
use crate::control::RotateError;

/// Rotations that a keyserver may ask for in a burst. More than an operator needs in a day; a stolen keyserver must not
/// use up the keys that a node may show in its life, nor keep peers busy with handshakes.
const ASKED_BURST: u32 = 32;
/// One more after this long.
const ASKED_REFILL: Duration = Duration::from_secs(600);

/// Rotations since start, by what caused them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Rotations {
    /// An operator, through this node's own socket.
    pub(crate) operator: u64,
    /// An operator, through the keyserver.
    pub(crate) keyserver: u64,
    /// The schedule.
    pub(crate) schedule: u64,
    /// A wall clock that stepped back.
    pub(crate) clock: u64,
    /// Asked for by the keyserver and refused.
    pub(crate) refused: u64,
}

/// What the keyserver may still ask for.
#[derive(Debug, Clone, Copy)]
pub(super) struct AskedAllowance {
    left: u32,
    refilled: Instant,
}

impl AskedAllowance {
    pub(super) fn new(now: Instant) -> Self {
        Self { left: ASKED_BURST, refilled: now }
    }

    /// Takes what time has brought; the time until there is one, if there is none.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let passed = now.saturating_duration_since(self.refilled);
        let gained = u32::try_from(passed.as_secs() / ASKED_REFILL.as_secs()).unwrap_or(u32::MAX);
        if gained > 0 {
            self.refilled += ASKED_REFILL * gained;
            self.left = self.left.saturating_add(gained).min(ASKED_BURST);
        }
        (self.left == 0).then(|| (self.refilled + ASKED_REFILL).saturating_duration_since(now))
    }
}

impl Agent {
    /// A keyserver asks. It is answered in any case.
    pub(super) fn handle_rotate(&mut self, request: u64, force: bool, after: Option<u64>, now: Now) {
        let (epoch, error) = match self.rotate_as_asked(force, after, now) {
            Ok(epoch) => (Some(epoch), None),
            Err(error) => {
                self.rotations.refused += 1;
                tracing::info!(%error, "rotation asked for by the keyserver refused");
                (None, Some(error.to_string()))
            }
        };
        self.out.push_back(NodeMessage::Rotated { request, epoch, error });
    }

    fn rotate_as_asked(&mut self, force: bool, after: Option<u64>, now: Now) -> Result<u64, RotateError> {
        // Asked again after a session broke: once is enough.
        let current = self.identity.own_keys().current.0;
        if after.is_some_and(|after| after < current) {
            return Ok(current);
        }
        if let Some(left) = self.asked.wait(now.instant) {
            return Err(RotateError::TooOften { left });
        }
        let epoch = self.promote(force, now)?;
        self.asked.left -= 1;
        self.rotations.keyserver += 1;
        Ok(epoch)
    }

    /// Promotes the spare key because an operator of this node says so.
    ///
    /// # Errors
    /// [`RotateError`]; nothing has changed then.
    pub(in crate::control) fn rotate(&mut self, force: bool, now: Now) -> Result<u64, RotateError> {
        let epoch = self.promote(force, now)?;
        self.rotations.operator += 1;
        Ok(epoch)
    }

    /// Promotes the spare key if its time has come. What keeps it from happening is tried again with the next tick.
    pub(super) fn rotate_if_due(&mut self, now: Now) {
        let ring = self.identity.ring();
        let due = self.setup.keys.due(self.identity.node(), ring.current().epoch, ring.promoted());
        if due.is_none_or(|due| now.wall < due) {
            return;
        }
        match self.promote(self.setup.keys.cuts_previous_short(), now) {
            Ok(_) => self.rotations.schedule += 1,
            Err(RotateError::Storage(error)) => self.storage_failed(&error, now),
            Err(error) => tracing::debug!(%error, "rotation is due and waits"),
        }
    }

    /// Promotes the spare key and publishes the record that says so.
    ///
    /// # Errors
    /// [`RotateError`]; nothing has changed then.
    pub(super) fn promote(&mut self, force: bool, now: Now) -> Result<u64, RotateError> {
        if self.promoted.is_some() {
            return Err(RotateError::Unpublished);
        }
        let epoch = self.identity.promote(now.wall, force)?;
        self.promoted = Some(self.identity.ring().seq());
        tracing::info!(epoch, "spare key promoted");
        if self.open {
            self.publish_record(now);
        }
        Ok(epoch)
    }
}
