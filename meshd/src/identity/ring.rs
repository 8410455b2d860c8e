//! The tunnel keys and how they follow each other. A plain value: each step gives the next one, storing it is the
//! caller's.
//!
//! ```text
//!            PROMOTE                                     RETIRE, a day later
//! previous ─────────── current ─┐
//! current  ──────────> previous │  ───────────────────────> wiped
//! spare    ──────────> current <┘
//! (new)    ──────────> spare
//! ML-KEM pair: (new) ──> current ──> previous ────────────> wiped
//! ```

use std::time::Duration;

use mesh_protocol::UnixSeconds;
use mesh_protocol::envelope::Envelope;
use mesh_protocol::key::{TunnelKey, TunnelSecret};
use mesh_protocol::record::{EpochKey, KemKey, NodeRecord};

use super::kem::KemPair;
use crate::control::RotateError;
use crate::facts::OwnKeys;

/// How long the previous key answers handshakes, for peers that were away.
pub(crate) const RETIRE_PREVIOUS: Duration = Duration::from_secs(24 * 60 * 60);

/// A tunnel key and its place in the succession.
#[derive(Debug, Clone)]
pub(crate) struct EpochSecret {
    /// Rises with each rotation.
    pub(crate) epoch: u64,
    /// The key.
    pub(crate) secret: TunnelSecret,
}

impl EpochSecret {
    fn public(&self) -> EpochKey {
        EpochKey { epoch: self.epoch, key: self.secret.public() }
    }
}

/// All tunnel keys of this node, and the newest record that names them.
#[derive(Debug, Clone)]
pub(crate) struct KeyRing {
    pub(super) seq: u64,
    pub(super) current: EpochSecret,
    pub(super) previous: Option<EpochSecret>,
    pub(super) spare: EpochSecret,
    pub(super) promoted: UnixSeconds,
    pub(super) kem_epoch: u64,
    pub(super) kem: KemPair,
    /// The pair before and its epoch: offers made before the news was heard are opened with it.
    pub(super) previous_kem: Option<(u64, KemPair)>,
    pub(super) record: Option<Envelope>,
}

impl KeyRing {
    /// The first keys of a node.
    pub(super) fn new([current, spare]: [TunnelSecret; 2], kem: KemPair, now: UnixSeconds) -> Self {
        Self {
            seq: 0,
            current: EpochSecret { epoch: 1, secret: current },
            previous: None,
            spare: EpochSecret { epoch: 2, secret: spare },
            promoted: now,
            kem_epoch: 1,
            kem,
            previous_kem: None,
            record: None,
        }
    }

    /// `seq` of the newest record.
    pub(crate) fn seq(&self) -> u64 {
        self.seq
    }

    /// The newest record.
    pub(crate) fn record(&self) -> Option<&Envelope> {
        self.record.as_ref()
    }

    /// What this node initiates with.
    pub(crate) fn current(&self) -> &EpochSecret {
        &self.current
    }

    /// As the data plane needs them.
    pub(crate) fn own_keys(&self) -> OwnKeys {
        OwnKeys {
            seq: self.seq,
            current: (self.current.epoch, self.current.secret.clone()),
            previous: self.previous.as_ref().map(|previous| (previous.epoch, previous.secret.clone())),
            spare_epoch: self.spare.epoch,
            promoted: self.promoted,
            kem: std::iter::once((self.kem_epoch, self.kem.clone())).chain(self.previous_kem.clone()).collect(),
        }
    }

    /// When the current key was promoted, in seconds since 1970.
    pub(crate) fn promoted(&self) -> UnixSeconds {
        self.promoted
    }

    /// Public halves for the record: current, previous, spare.
    pub(super) fn public(&self) -> (EpochKey, Option<EpochKey>, EpochKey, KemKey) {
        let kem = KemKey { epoch: self.kem_epoch, key: self.kem.public.clone() };
        (self.current.public(), self.previous.as_ref().map(EpochSecret::public), self.spare.public(), kem)
    }

    /// Whether a rotation would cut off peers that still need the previous key.
    pub(super) fn may_promote(&self, now: UnixSeconds, force: bool) -> Result<(), RotateError> {
        match &self.previous {
            Some(previous) if !force && now < self.retires() => {
                let left = Duration::from_secs(self.retires() - now).min(RETIRE_PREVIOUS);
                Err(RotateError::PreviousInUse { epoch: previous.epoch, left })
            }
            _ => Ok(()),
        }
    }

    /// PROMOTE.
    pub(super) fn after_promotion(&self, fresh: TunnelSecret, kem: KemPair, now: UnixSeconds) -> Self {
        let mut next = self.clone();
        next.previous = Some(std::mem::replace(&mut next.current, self.spare.clone()));
        next.spare = EpochSecret { epoch: self.spare.epoch + 1, secret: fresh };
        next.previous_kem = Some((self.kem_epoch, std::mem::replace(&mut next.kem, kem)));
        next.kem_epoch = self.kem_epoch.saturating_add(1);
        next.promoted = now;
        next
    }

    /// RETIRE, when it is time.
    pub(super) fn retired(&self, now: UnixSeconds) -> Option<Self> {
        (self.previous.is_some() && now >= self.retires()).then(|| Self {
            previous: None,
            previous_kem: None,
            ..self.clone()
        })
    }

    /// When the previous key is wiped.
    pub(crate) fn retires(&self) -> UnixSeconds {
        self.promoted.saturating_add(RETIRE_PREVIOUS.as_secs())
    }

    /// Whether the current and spare keys in `record` are among ours, so that nothing newer than this ring exists.
    pub(super) fn knows_keys_of(&self, record: &NodeRecord) -> bool {
        let mine: Vec<TunnelKey> = [Some(&self.current), self.previous.as_ref(), Some(&self.spare)]
            .into_iter()
            .flatten()
            .map(|key| key.secret.public())
            .collect();
        mine.contains(&record.current.key) && record.current.epoch <= self.current.epoch && {
            record.kem.epoch < self.kem_epoch || record.kem.key == self.kem.public
        }
    }

    /// New keys with epochs above those of a record whose secrets this node does not have.
    pub(super) fn past(
        &self,
        record: &NodeRecord,
        [current, spare]: [TunnelSecret; 2],
        kem: KemPair,
        now: UnixSeconds,
    ) -> Self {
        let epoch = record.spare.epoch.max(self.spare.epoch).saturating_add(1);
        Self {
            current: EpochSecret { epoch, secret: current },
            previous: None,
            spare: EpochSecret { epoch: epoch.saturating_add(1), secret: spare },
            promoted: now,
            kem_epoch: record.kem.epoch.max(self.kem_epoch).saturating_add(1),
            kem,
            previous_kem: None,
            ..self.clone()
        }
    }

    /// Takes a record met elsewhere as the one to follow.
    pub(super) fn stand_at(&mut self, seq: u64, record: Envelope) {
        (self.seq, self.record) = (seq, Some(record));
    }
}
