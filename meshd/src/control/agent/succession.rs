//! The identity key is replaced: on disk first, then asked for, then granted; then a session with the new key publishes the
//! record that it signed, and the key before is wiped.

use mesh_protocol::control::{NodeMessage, Refusal, RefusalCode};
use mesh_protocol::id::KeyId;
use mesh_protocol::local::{IdentityPhase, IdentityStatus};

use super::{Agent, Now};
use crate::control::RotateError;
use crate::directory::alarm;
use crate::identity::Granted;

/// What the keyserver said to the key that this node asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) enum Answer {
    /// Nothing yet.
    #[default]
    None,
    /// Its issuer has to sign first.
    Waiting,
    /// No.
    Refused(String),
}

impl Agent {
    /// Replaces the identity key, or goes on with that where it is under way. Gives the key in use and the one that follows.
    ///
    /// # Errors
    /// [`RotateError`]; nothing has changed then.
    pub(in crate::control) fn succeed(&mut self) -> Result<(KeyId, KeyId), RotateError> {
        let from = self.identity.key_id();
        let to = self.identity.begin_succession()?;
        tracing::info!(from = %from.short(), to = %to.short(), "next identity key on disk");
        self.ask_succession();
        Ok((from, to))
    }

    /// Asks for a grant with the next identity key, if there is one that does not wait for its issuer.
    pub(super) fn ask_succession(&mut self) {
        if !self.open || self.answer == Answer::Waiting {
            return;
        }
        if let Some((identity, handover)) = self.identity.succession() {
            self.out.push_back(NodeMessage::Succeed { identity, handover });
        }
    }

    /// The keyserver's answer. What it grants comes with the changes of the directory.
    pub(super) fn handle_succession(&mut self, asked: KeyId, granted: bool, refusal: Option<&Refusal>) {
        if self.identity.next_key_id() != Some(asked) {
            return;
        }
        self.answer = match (granted, refusal) {
            (true, _) => Answer::None,
            (false, None) => Answer::Waiting,
            (false, Some(refusal)) => {
                tracing::warn!(code = ?refusal.code, error = %refusal, "next identity key refused");
                Answer::Refused(refusal.message.clone())
            }
        };
    }

    /// A refusal that names no request: a keyserver of an earlier version does not know this one.
    pub(super) fn note_refusal(&mut self, refusal: &Refusal) {
        if refusal.code == RefusalCode::BadMessage && self.identity.next_key_id().is_some() {
            self.answer = Answer::Refused(format!("{refusal}: is the keyserver of an earlier version?"));
        }
    }

    pub(super) fn take_own_grant(&mut self, now: Now) {
        let (on_disk, object) = (&self.identity.membership().grant, self.identity.grant());
        let Some((envelope, grant)) = self.directory.newer_own_grant(on_disk, object) else { return };
        let key = grant.identity.id();
        match self.identity.set_grant(&envelope, grant) {
            Ok(Granted::Same) if self.open => self.publish_record(now),
            Ok(Granted::Same) => {}
            Ok(Granted::Succeeded) => {
                tracing::info!(key = %key.short(), "identity key replaced, opening a session with the new one");
                (self.answer, self.reconnect) = (Answer::None, true);
            }
            Ok(Granted::Foreign) => {
                let message = format!(
                    "the mesh knows this node by identity key {}, which is not on this disk: it was restored from a backup, \
                     or another machine has this node's keys and replaced it. Revoke this node and let one machine join anew",
                    key.short()
                );
                self.alarms().raise(alarm::IDENTITY, "key", message, now.instant);
            }
            Err(error) => self.storage_failed(&error.to_string(), now),
        }
    }

    /// Wipes the key before once a keyserver has the record that the new one signed.
    pub(super) fn settle_identity(&mut self, now: Now) {
        if !self.identity.is_unsettled() || !self.is_published() {
            return;
        }
        match self.identity.settle() {
            Ok(()) => tracing::info!("identity key before wiped"),
            Err(error) => self.storage_failed(&error.to_string(), now),
        }
    }

    /// Takes the wish for a session with another key.
    pub(in crate::control) fn take_reconnect(&mut self) -> bool {
        std::mem::take(&mut self.reconnect)
    }

    /// The identity key as the local API tells it.
    pub(in crate::control) fn identity_status(&self) -> IdentityStatus {
        let next = self.identity.next_key_id();
        let (phase, error) = match (&self.answer, next) {
            (_, None) if self.identity.is_unsettled() => (IdentityPhase::Publishing, None),
            (_, None) => (IdentityPhase::Settled, None),
            (Answer::None, _) => (IdentityPhase::Asking, None),
            (Answer::Waiting, _) => (IdentityPhase::Waiting, None),
            (Answer::Refused(error), _) => (IdentityPhase::Refused, Some(error.clone())),
        };
        IdentityStatus { key: self.identity.key_id(), next, phase, error }
    }
}
