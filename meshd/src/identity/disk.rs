//! The files of an identity: formats, reading, writing.

use mesh_protocol::cbor;
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::MeshId;
use mesh_protocol::key::{KemPublic, SigningKey, TunnelSecret};
use minicbor::{Decode, Encode};
use zeroize::{Zeroize, Zeroizing};

use super::kem::{KEM_SECRET_BYTES, KemPair};
use super::ring::{EpochSecret, KeyRing};
use crate::state_dir::{StateDir, StateError};

/// Seed of the identity key, as it is.
pub(super) const IDENTITY: &str = "identity";
/// Seed of the identity key that follows, as it is.
pub(super) const IDENTITY_NEXT: &str = "identity-next";
/// Tunnel keys.
pub(super) const KEYS: &str = "keys";
/// Mesh id and grant.
pub(super) const MEMBERSHIP: &str = "membership";

const KEYS_LABEL: &str = "mesh keys 1";
const MEMBERSHIP_LABEL: &str = "mesh membership 1";
/// Three tunnel keys, two KEM pairs and one record: below 16 KiB, with room for a later version's fields.
const KEYS_LIMIT: u64 = 64 * 1024;
/// A grant of the longest payload and a few addresses.
const MEMBERSHIP_LIMIT: u64 = 128 * 1024;
const FIX: &str = "put back a backup of it, or move the whole directory away and run meshd join with a new token";

/// What joining left behind.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Membership {
    /// The mesh pinned at join.
    #[n(0)]
    pub(crate) mesh: MeshId,
    /// The own grant.
    #[n(1)]
    pub(crate) grant: Envelope,
    /// Addresses of keyservers that the join token named, `host:port`.
    #[n(2)]
    pub(crate) keyservers: Vec<String>,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct KeyOnDisk {
    #[n(0)]
    epoch: u64,
    #[cbor(n(1), with = "minicbor::bytes")]
    secret: [u8; 32],
}

impl Drop for KeyOnDisk {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

impl KeyOnDisk {
    fn of(key: &EpochSecret) -> Self {
        Self { epoch: key.epoch, secret: *key.secret.bytes() }
    }

    fn key(&self) -> EpochSecret {
        EpochSecret { epoch: self.epoch, secret: TunnelSecret::from_bytes(self.secret) }
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct KemOnDisk {
    #[n(0)]
    epoch: u64,
    #[cbor(n(1), with = "minicbor::bytes")]
    public: Vec<u8>,
    #[cbor(n(2), with = "minicbor::bytes")]
    secret: Vec<u8>,
}

impl Drop for KemOnDisk {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct KeysOnDisk {
    #[n(0)]
    seq: u64,
    #[n(1)]
    current: KeyOnDisk,
    #[n(2)]
    previous: Option<KeyOnDisk>,
    #[n(3)]
    spare: KeyOnDisk,
    #[n(4)]
    promoted: u64,
    #[n(5)]
    kem_epoch: u64,
    #[cbor(n(6), with = "minicbor::bytes")]
    kem_public: Vec<u8>,
    #[cbor(n(7), with = "minicbor::bytes")]
    kem_secret: Vec<u8>,
    #[n(8)]
    record: Option<Envelope>,
    #[n(9)]
    previous_kem: Option<KemOnDisk>,
}

impl Drop for KeysOnDisk {
    fn drop(&mut self) {
        self.kem_secret.zeroize();
    }
}

pub(super) fn read_identity(state: &StateDir) -> Result<Option<SigningKey>, StateError> {
    read_seed(state, IDENTITY)
}

pub(super) fn read_identity_next(state: &StateDir) -> Result<Option<SigningKey>, StateError> {
    read_seed(state, IDENTITY_NEXT)
}

fn read_seed(state: &StateDir, name: &str) -> Result<Option<SigningKey>, StateError> {
    let Some(bytes) = state.read_exact(name, 32)? else { return Ok(None) };
    let mut seed = Zeroizing::new([0; 32]);
    seed.copy_from_slice(&bytes);
    Ok(Some(SigningKey::from_seed(*seed)))
}

pub(super) fn write_identity(state: &StateDir, key: &SigningKey) -> Result<(), StateError> {
    state.write_raw(IDENTITY, key.seed().as_slice())
}

pub(super) fn write_identity_next(state: &StateDir, key: &SigningKey) -> Result<(), StateError> {
    state.write_raw(IDENTITY_NEXT, key.seed().as_slice())
}

pub(super) fn read_keys(state: &StateDir) -> Result<Option<KeyRing>, StateError> {
    let Some(bytes) = state.read(KEYS, KEYS_LABEL, KEYS_LIMIT, FIX)? else { return Ok(None) };
    decode_keys(&bytes).map(Some).map_err(|reason| state.damaged(KEYS, reason, FIX))
}

pub(super) fn write_keys(state: &StateDir, ring: &KeyRing) -> Result<(), StateError> {
    state.write(KEYS, KEYS_LABEL, &encode_keys(ring))
}

pub(super) fn read_membership(state: &StateDir) -> Result<Option<Membership>, StateError> {
    let Some(bytes) = state.read(MEMBERSHIP, MEMBERSHIP_LABEL, MEMBERSHIP_LIMIT, FIX)? else { return Ok(None) };
    let decoded = cbor::from_slice(&bytes);
    decoded.map(Some).map_err(|error| state.damaged(MEMBERSHIP, error.to_string(), FIX))
}

pub(super) fn write_membership(state: &StateDir, membership: &Membership) -> Result<(), StateError> {
    state.write(MEMBERSHIP, MEMBERSHIP_LABEL, &cbor::to_vec(membership))
}

pub(super) fn encode_keys(ring: &KeyRing) -> Zeroizing<Vec<u8>> {
    let file = KeysOnDisk {
        seq: ring.seq,
        current: KeyOnDisk::of(&ring.current),
        previous: ring.previous.as_ref().map(KeyOnDisk::of),
        spare: KeyOnDisk::of(&ring.spare),
        promoted: ring.promoted,
        kem_epoch: ring.kem_epoch,
        kem_public: ring.kem.public.as_bytes().to_vec(),
        kem_secret: ring.kem.secret.to_vec(),
        record: ring.record.clone(),
        previous_kem: ring.previous_kem.as_ref().map(|(epoch, kem)| KemOnDisk {
            epoch: *epoch,
            public: kem.public.as_bytes().to_vec(),
            secret: kem.secret.to_vec(),
        }),
    };
    // Room for all of it at once: a growing buffer would leave copies of secrets behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(KEYS_LIMIT as usize));
    minicbor::encode(&file, &mut *bytes).expect("writing to memory does not fail");
    bytes
}

pub(super) fn decode_keys(bytes: &[u8]) -> Result<KeyRing, String> {
    let file: KeysOnDisk = cbor::from_slice(bytes).map_err(|error| error.to_string())?;
    let kem = decode_kem(&file.kem_public, &file.kem_secret)?;
    let previous_kem = match &file.previous_kem {
        Some(previous) => Some((previous.epoch, decode_kem(&previous.public, &previous.secret)?)),
        None => None,
    };
    Ok(KeyRing {
        seq: file.seq,
        current: file.current.key(),
        previous: file.previous.as_ref().map(KeyOnDisk::key),
        spare: file.spare.key(),
        promoted: file.promoted,
        kem_epoch: file.kem_epoch,
        kem,
        previous_kem,
        record: file.record.clone(),
    })
}

fn decode_kem(public: &[u8], secret: &[u8]) -> Result<KemPair, String> {
    if secret.len() != KEM_SECRET_BYTES {
        return Err(format!("ML-KEM-768 key of {} bytes", secret.len()));
    }
    let public = KemPublic::from_bytes(public).map_err(|error| error.to_string())?;
    Ok(KemPair { public, secret: Zeroizing::new(secret.to_vec()) })
}
