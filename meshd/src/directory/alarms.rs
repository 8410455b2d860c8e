//! Alarms: what somebody has to look at. Raised by what happened, kept until it is over or meshd restarts.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::control::RaisedAlarm;

/// Names of alarms, as in metrics and `meshctl status`.
pub(crate) mod alarm {
    /// Somebody signed two truths. Evidence lies in the state directory.
    pub(crate) const EQUIVOCATION: &str = "equivocation";
    /// The keyserver shows an older state than this node has seen.
    pub(crate) const STALE: &str = "stale";
    /// A directory object was refused.
    pub(crate) const REFUSED: &str = "directory-refused";
    /// Two grants collided; the later one is out.
    pub(crate) const COLLISION: &str = "grant-collision";
    /// A new policy put members out.
    pub(crate) const DROPPED: &str = "members-dropped";
    /// The state directory cannot be written.
    pub(crate) const STORAGE: &str = "state-not-stored";
    /// No fresh checkpoint for an hour.
    pub(crate) const UNCONFIRMED: &str = "no-fresh-checkpoint";
    /// This node is revoked.
    pub(crate) const REVOKED: &str = "revoked";
    /// An own record that this disk does not know: it was restored from a backup, or copied.
    pub(crate) const OWN_RECORD: &str = "own-record-unknown";
    /// Another machine shows this node's identity key.
    pub(crate) const IDENTITY: &str = "identity-elsewhere";
    /// The keyserver refused the own record.
    pub(crate) const PUBLISH: &str = "record-refused";
    /// The wall clock stepped back.
    pub(crate) const CLOCK: &str = "clock-stepped-back";
    /// The own grant expires soon.
    pub(crate) const EXPIRY: &str = "grant-expires";
}

/// Most alarms held; what comes on top is logged only. 64 messages of a few hundred bytes.
const MOST: usize = 64;

/// The alarms that stand, one for each name and subject.
#[derive(Debug, Default)]
pub(crate) struct Alarms {
    raised: BTreeMap<(&'static str, String), RaisedAlarm>,
}

impl Alarms {
    /// Raises one, or renews its message; `since` stays that of the first time.
    pub(crate) fn raise(&mut self, name: &'static str, subject: &str, message: String, now: Instant) {
        let key = (name, subject.to_owned());
        if let Some(alarm) = self.raised.get_mut(&key) {
            alarm.message = message;
        } else {
            tracing::warn!(alarm = name, %message, "alarm raised");
            if self.raised.len() < MOST {
                self.raised.insert(key, RaisedAlarm { name, message, since: now });
            }
        }
    }

    /// Takes back all of one name.
    pub(crate) fn clear(&mut self, name: &'static str) {
        self.raised.retain(|(raised, _), _| *raised != name);
    }

    /// All that stand.
    pub(crate) fn standing(&self) -> Vec<RaisedAlarm> {
        self.raised.values().cloned().collect()
    }
}
