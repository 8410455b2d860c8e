//! Who this node is: its identity key, its tunnel keys, its own record; all of it on disk before anybody hears of it.
//!
//! ```text
//! identity     32 bytes: the seed of the Ed25519 identity key. Made once, replaced on an operator's word only
//! identity-next    the one that follows, while that is under way (`succession`)
//! keys         tunnel keys by epoch, ML-KEM-768 pair, the newest own record (so also its seq)
//! membership   mesh id, own grant, where keyservers are. Written last when joining: with it, the node is in
//! ```

mod disk;
pub(crate) mod kem;
mod record;
mod ring;
mod schedule;
mod succession;

use std::path::PathBuf;

use mesh_protocol::UnixSeconds;
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Hash, MeshId, NodeId};
use mesh_protocol::key::{SigningKey, TunnelSecret, VerifyKey};
use mesh_protocol::record::{NodeGrant, NodeRecord};
use zeroize::Zeroizing;

use crate::control::RotateError;
use crate::facts::OwnKeys;
use crate::state_dir::{StateDir, StateError};

pub(crate) use disk::Membership;
pub(crate) use ring::KeyRing;
pub(crate) use schedule::{KeysConfig, LONGEST, SHORTEST};
pub(crate) use succession::Granted;
use succession::IdentityKeys;

/// This node has no usable identity. Nothing was overwritten.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum IdentityError {
    /// The state directory, or a file in it.
    #[error(transparent)]
    State(#[from] StateError),
    /// Nobody joined this node to a mesh yet.
    #[error("{} holds no membership: this node has not joined a mesh, run: meshd join", path.display())]
    NotJoined {
        /// Where it would be.
        path: PathBuf,
    },
    /// A part is missing that cannot be made anew, because peers know this node by it.
    #[error(
        "{} is missing although this node has joined: put back a backup of it, or move the whole directory away and \
         run meshd join with a new token",
        path.display()
    )]
    Lost {
        /// Which file.
        path: PathBuf,
    },
    /// The grant on disk is not of this identity key.
    #[error(
        "{} is not the key that {} was granted to: put back a backup of both",
        identity.display(), membership.display()
    )]
    Mismatch {
        /// The identity file.
        identity: PathBuf,
        /// The membership file.
        membership: PathBuf,
    },
    /// The kernel gave no random bytes, or the cryptography library no key.
    #[error("no key could be made: {0}")]
    NoKey(&'static str),
}

/// Keys of a node that has not joined yet. They are on disk, so that a join that was cut off goes on with them.
#[derive(Debug)]
pub(crate) struct Newcomer {
    state: StateDir,
    key: SigningKey,
    ring: KeyRing,
}

impl Newcomer {
    /// Takes the keys in `state`, or makes them if there are none.
    ///
    /// # Errors
    /// [`IdentityError::Lost`] if one is missing while other parts are there; else any but
    /// [`IdentityError::NotJoined`].
    pub(crate) fn open(state: &StateDir, now: UnixSeconds) -> Result<Self, IdentityError> {
        let lost = |name: &str| IdentityError::Lost { path: state.path_of(name) };
        let key = match disk::read_identity(state)? {
            Some(key) => key,
            None if state.has(disk::MEMBERSHIP) || state.has(disk::KEYS) => return Err(lost(disk::IDENTITY)),
            None => {
                let key = SigningKey::from_seed(*random_bytes()?);
                disk::write_identity(state, &key)?;
                key
            }
        };
        let ring = match disk::read_keys(state)? {
            Some(ring) => ring,
            None if state.has(disk::MEMBERSHIP) => return Err(lost(disk::KEYS)),
            None => {
                let ring = KeyRing::new([random_secret()?, random_secret()?], kem::generate()?, now);
                disk::write_keys(state, &ring)?;
                ring
            }
        };
        Ok(Self { state: state.clone(), key, ring })
    }

    /// The identity key.
    pub(crate) fn key(&self) -> &SigningKey {
        &self.key
    }

    /// Stores the membership: the last step of joining.
    ///
    /// # Errors
    /// Any [`IdentityError`] but [`IdentityError::NotJoined`].
    pub(crate) fn admit(self, membership: Membership, lanes: u8) -> Result<Identity, IdentityError> {
        // Of an earlier membership: nobody here has asked for it.
        self.state.remove(disk::IDENTITY_NEXT)?;
        disk::write_membership(&self.state, &membership)?;
        Identity::from_parts(self.state, self.key, None, self.ring, membership, lanes)
    }
}

/// The membership in `state`, if this node has joined.
///
/// # Errors
/// [`StateError`].
pub(crate) fn membership(state: &StateDir) -> Result<Option<Membership>, StateError> {
    disk::read_membership(state)
}

/// This node's keys and membership. What is in here is on disk.
#[derive(Debug)]
pub(crate) struct Identity {
    state: StateDir,
    keys: IdentityKeys,
    ring: KeyRing,
    membership: Membership,
    grant: NodeGrant,
    lanes: u8,
}

impl Identity {
    /// Reads them. `lanes` goes into the own record.
    ///
    /// # Errors
    /// Any [`IdentityError`]; nothing is ever made anew here.
    pub(crate) fn open(state: &StateDir, lanes: u8) -> Result<Self, IdentityError> {
        let lost = |name: &str| IdentityError::Lost { path: state.path_of(name) };
        let Some(membership) = disk::read_membership(state)? else {
            return Err(IdentityError::NotJoined { path: state.path_of(disk::MEMBERSHIP) });
        };
        let key = disk::read_identity(state)?.ok_or_else(|| lost(disk::IDENTITY))?;
        let next = disk::read_identity_next(state)?;
        let ring = disk::read_keys(state)?.ok_or_else(|| lost(disk::KEYS))?;
        Self::from_parts(state.clone(), key, next, ring, membership, lanes)
    }

    fn from_parts(
        state: StateDir,
        key: SigningKey,
        next: Option<SigningKey>,
        ring: KeyRing,
        membership: Membership,
        lanes: u8,
    ) -> Result<Self, IdentityError> {
        let mismatch = || IdentityError::Mismatch {
            identity: state.path_of(disk::IDENTITY),
            membership: state.path_of(disk::MEMBERSHIP),
        };
        let grant: NodeGrant = membership.grant.unverified().map_err(|_| mismatch())?;
        let keys = IdentityKeys::of(&state, key, next, &grant.identity)?.ok_or_else(mismatch)?;
        Ok(Self { state, keys, ring, membership, grant, lanes })
    }

    /// So many lanes go into the own record from now on.
    pub(crate) fn set_lanes(&mut self, lanes: u8) {
        self.lanes = lanes;
    }

    /// The state directory.
    pub(crate) fn state(&self) -> &StateDir {
        &self.state
    }

    /// This node's id.
    pub(crate) fn node(&self) -> NodeId {
        self.grant.node
    }

    /// The mesh it belongs to.
    pub(crate) fn mesh(&self) -> MeshId {
        self.membership.mesh
    }

    /// The identity key that the own grant names.
    pub(crate) fn key(&self) -> &SigningKey {
        &self.keys.key
    }

    /// The own grant.
    pub(crate) fn grant(&self) -> &NodeGrant {
        &self.grant
    }

    /// The membership.
    pub(crate) fn membership(&self) -> &Membership {
        &self.membership
    }

    /// The tunnel keys.
    pub(crate) fn ring(&self) -> &KeyRing {
        &self.ring
    }

    /// The tunnel keys as the data plane needs them.
    pub(crate) fn own_keys(&self) -> OwnKeys {
        self.ring.own_keys()
    }

    /// The own record to publish. A new one, stored before it is given out, if the stored one does not say what holds.
    ///
    /// # Errors
    /// [`StateError`].
    pub(crate) fn record(&mut self) -> Result<Envelope, StateError> {
        let seal = self.sealing();
        match self.ring.record() {
            Some(record) if seal.is_said_by(record, &self.ring) => Ok(record.clone()),
            _ => self.replace_ring(self.ring.clone()),
        }
    }

    /// PROMOTE: the spare key becomes the current one, that one the previous one, and a new spare and ML-KEM pair are made; on disk when
    /// this returns, to be published after.
    ///
    /// # Errors
    /// [`RotateError`]; nothing has changed then.
    pub(crate) fn promote(&mut self, now: UnixSeconds, force: bool) -> Result<u64, RotateError> {
        self.ring.may_promote(now, force)?;
        let spare = random_secret().map_err(|error| RotateError::Storage(error.to_string()))?;
        let kem = kem::generate().map_err(|error| RotateError::Storage(error.to_string()))?;
        let next = self.ring.after_promotion(spare, kem, now);
        self.replace_ring(next).map_err(|error| RotateError::Storage(error.to_string()))?;
        Ok(self.ring.current().epoch)
    }

    /// Wipes the previous key when its day is over. Tells whether it did.
    ///
    /// # Errors
    /// [`StateError`]; the key is still there then.
    pub(crate) fn retire(&mut self, now: UnixSeconds) -> Result<bool, StateError> {
        let Some(next) = self.ring.retired(now) else { return Ok(false) };
        self.replace_ring(next)?;
        Ok(true)
    }

    /// Takes an own record that others hold. A higher `seq` is adopted and passed; keys that this disk does not know
    /// (it was restored from a backup) are passed too. Tells what was found.
    ///
    /// # Errors
    /// [`IdentityError::State`], [`IdentityError::NoKey`].
    pub(crate) fn meet_own_record(&mut self, met: &Envelope, now: UnixSeconds) -> Result<Met, IdentityError> {
        // What this node said with an identity key that it had before is its word, too.
        let keys: Vec<VerifyKey> = self.grant.identities().copied().collect();
        let Ok(record) = met.verified::<NodeRecord>(self.mesh(), &keys, 1) else {
            return Ok(Met::NotOurs);
        };
        let same = self.ring.record().is_some_and(|own| own.hash(self.mesh()) == met.hash(self.mesh()));
        if record.node != self.node() || same || record.seq < self.ring.seq() {
            return Ok(if record.node == self.node() { Met::Known } else { Met::NotOurs });
        }
        let mut next = if self.ring.knows_keys_of(&record) {
            self.ring.clone()
        } else {
            let secrets = [random_secret()?, random_secret()?];
            self.ring.past(&record, secrets, kem::generate()?, now)
        };
        next.stand_at(record.seq, met.clone());
        self.replace_ring(next)?;
        Ok(Met::Ahead)
    }

    fn grant_hash(&self) -> Hash {
        self.membership.grant.hash(self.membership.mesh)
    }

    fn sealing(&self) -> record::Sealing<'_> {
        let (mesh, node, key) = (self.mesh(), self.node(), &self.keys.key);
        record::Sealing { mesh, node, grant: self.grant_hash(), key, lanes: self.lanes }
    }

    fn replace_ring(&mut self, mut next: KeyRing) -> Result<Envelope, StateError> {
        let envelope = self.sealing().seal_next(&mut next);
        disk::write_keys(&self.state, &next)?;
        self.ring = next;
        Ok(envelope)
    }
}

/// What [`Identity::meet_own_record`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Met {
    /// The same, or an older one of ours.
    Known,
    /// At our `seq` or above it, and not ours: this disk is old, or a copy of it is at work elsewhere.
    Ahead,
    /// Not signed by this node.
    NotOurs,
}

fn random_secret() -> Result<TunnelSecret, IdentityError> {
    Ok(TunnelSecret::from_bytes(*random_bytes()?))
}

fn random_bytes() -> Result<Zeroizing<[u8; 32]>, IdentityError> {
    let mut bytes = Zeroizing::new([0; 32]);
    getrandom::fill(bytes.as_mut_slice()).map_err(|_| IdentityError::NoKey("the kernel gave no random bytes"))?;
    Ok(bytes)
}

#[cfg(test)]
pub(crate) mod tests;
