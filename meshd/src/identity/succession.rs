//! The identity key gives its place to another one. Both lie on disk from before anybody hears of it until everybody knows.
//!
//! ```text
//!                         identity   identity-next   grant names
//!                         key 1      -               key 1
//! asked by an operator    key 1      key 2           key 1         key 1 signs, a grant with key 2 is asked for
//! granted                 key 1      key 2           key 2         key 2 signs, from the moment the membership is stored
//! published               key 2      -               key 2
//! ```
//!
//! Which of the two signs is what the grant on disk says: so each line is what a crash leaves, and each goes on by itself.

use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::KeyId;
use mesh_protocol::key::{SigningKey, VerifyKey};
use mesh_protocol::record::{Handover, MAX_HANDOVERS, NodeGrant};

use super::{Identity, IdentityError, disk, random_bytes};
use crate::control::RotateError;
use crate::state_dir::{StateDir, StateError};

/// The identity keys on disk.
#[derive(Debug)]
pub(super) struct IdentityKeys {
    /// Signs.
    pub(super) key: SigningKey,
    /// Will, once a grant names it.
    pub(super) next: Option<SigningKey>,
    /// The key before still lies on disk.
    pub(super) unsettled: bool,
}

impl IdentityKeys {
    /// Those in `state`, with `granted` as the one that signs; `None` if it is neither. Cleans up behind a change that was
    /// cut off at its very end.
    pub(super) fn of(
        state: &StateDir,
        key: SigningKey,
        next: Option<SigningKey>,
        granted: &VerifyKey,
    ) -> Result<Option<Self>, StateError> {
        let own = key.verify_key();
        match next {
            Some(next) if own != *granted && next.verify_key() == *granted => {
                Ok(Some(Self { key: next, next: None, unsettled: true }))
            }
            _ if own != *granted => Ok(None),
            Some(next) if next.verify_key() == own => {
                state.remove(disk::IDENTITY_NEXT)?;
                Ok(Some(Self { key, next: None, unsettled: false }))
            }
            next => Ok(Some(Self { key, next, unsettled: false })),
        }
    }
}

/// What a newer own grant is to this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Granted {
    /// It names the identity key in use.
    Same,
    /// It names the next one, which is in use from now on.
    Succeeded,
    /// It names one that this node does not have. Nothing was stored.
    Foreign,
}

impl Identity {
    /// Id of the identity key in use.
    pub(crate) fn key_id(&self) -> KeyId {
        self.grant.identity.id()
    }

    /// Id of the identity key that waits for a grant.
    pub(crate) fn next_key_id(&self) -> Option<KeyId> {
        self.keys.next.as_ref().map(|next| next.verify_key().id())
    }

    /// The key before the one in use still lies on disk, because the record with the new one may not be known yet.
    pub(crate) fn is_unsettled(&self) -> bool {
        self.keys.unsettled
    }

    /// Makes the next identity key, unless there is one; on disk when this returns. Gives its id.
    ///
    /// # Errors
    /// [`RotateError`]; nothing has changed then.
    pub(crate) fn begin_succession(&mut self) -> Result<KeyId, RotateError> {
        if let Some(next) = self.next_key_id() {
            return Ok(next);
        }
        if self.keys.unsettled {
            return Err(RotateError::IdentityUnsettled);
        }
        if self.grant.succession.len() >= MAX_HANDOVERS {
            return Err(RotateError::IdentityUsedUp);
        }
        let storage = |error: IdentityError| RotateError::Storage(error.to_string());
        let next = SigningKey::from_seed(*random_bytes().map_err(storage)?);
        disk::write_identity_next(&self.state, &next).map_err(|error| storage(error.into()))?;
        let id = next.verify_key().id();
        self.keys.next = Some(next);
        Ok(id)
    }

    /// The next identity key and its right to the place, to be shown to the keyserver.
    pub(crate) fn succession(&self) -> Option<(VerifyKey, Handover)> {
        let next = self.keys.next.as_ref()?;
        Some((next.verify_key(), Handover::sign(self.mesh(), self.node(), &self.keys.key, next)))
    }

    /// Takes a newer own grant, already verified by the directory.
    ///
    /// # Errors
    /// [`StateError`]; nothing has changed then.
    pub(crate) fn set_grant(&mut self, envelope: &Envelope, grant: NodeGrant) -> Result<Granted, StateError> {
        let granted = if grant.identity == self.grant.identity {
            Granted::Same
        } else if self.keys.next.as_ref().is_some_and(|next| next.verify_key() == grant.identity) {
            Granted::Succeeded
        } else {
            return Ok(Granted::Foreign);
        };
        let membership = super::Membership { grant: envelope.clone(), ..self.membership.clone() };
        disk::write_membership(&self.state, &membership)?;
        (self.membership, self.grant) = (membership, grant);
        if granted == Granted::Succeeded
            && let Some(next) = self.keys.next.take()
        {
            (self.keys.key, self.keys.unsettled) = (next, true);
        }
        Ok(granted)
    }

    /// Everybody can know the key in use by now: wipes the one before.
    ///
    /// # Errors
    /// [`StateError`]; it is still there then.
    pub(crate) fn settle(&mut self) -> Result<(), StateError> {
        if self.keys.unsettled {
            disk::write_identity(&self.state, &self.keys.key)?;
            self.state.remove(disk::IDENTITY_NEXT)?;
            self.keys.unsettled = false;
        }
        Ok(())
    }
}
