//! The envelope around every signed object: the payload's exact bytes, key ids, signatures.
//!
//! ```text
//! envelope  = { 0: kind, 1: format, 2: payload (byte string), 3: [ { 0: key id, 1: signature (64 bytes) }, .. ] }
//! signed    = "mesh object\0" ‖ kind (1 byte) ‖ format (1 byte) ‖ mesh id (32 bytes) ‖ payload
//! hash      = SHA-256 of signed
//! ```
//!
//! Nothing is re-encoded to be checked. The first trust policy makes the mesh id, so it is signed under 32 zero bytes.

use std::collections::BTreeMap;

use minicbor::{Decode, Decoder, Encode, Encoder, decode, encode};

use crate::cbor::{self, CborError};
use crate::id::{Hash, KeyId, MeshId, sha256};
use crate::key::{SigningKey, VerifyKey};

/// Longest payload of a signed object, in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 32 * 1024;
/// Most signatures on one object.
pub const MAX_SIGNATURES: usize = 16;
/// The mesh id under which a mesh's first policy is signed.
pub const NO_MESH: MeshId = MeshId([0; 32]);

const LABEL: &[u8] = b"mesh object\0";

/// What kind of object an envelope holds. Part of what is signed, so that none passes for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Kind {
    /// [`TrustPolicy`](crate::record::TrustPolicy)
    #[n(1)]
    TrustPolicy,
    /// [`NodeGrant`](crate::record::NodeGrant)
    #[n(2)]
    NodeGrant,
    /// [`NodeRecord`](crate::record::NodeRecord)
    #[n(3)]
    NodeRecord,
    /// [`Endpoints`](crate::record::Endpoints)
    #[n(4)]
    Endpoints,
    /// [`Revocation`](crate::record::Revocation)
    #[n(5)]
    Revocation,
    /// [`Checkpoint`](crate::record::Checkpoint)
    #[n(6)]
    Checkpoint,
    /// [`TokenLimits`](crate::token::TokenLimits)
    #[n(7)]
    TokenLimits,
}

impl Kind {
    /// The number that is signed and sent.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::TrustPolicy => 1,
            Self::NodeGrant => 2,
            Self::NodeRecord => 3,
            Self::Endpoints => 4,
            Self::Revocation => 5,
            Self::Checkpoint => 6,
            Self::TokenLimits => 7,
        }
    }
}

/// An object that travels in an envelope.
pub trait Signed: Encode<()> + for<'b> Decode<'b, ()> {
    /// Its number.
    const KIND: Kind;
    /// Version of its format. A reader refuses any other.
    const FORMAT: u8 = 1;
}

/// An envelope was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnvelopeError {
    /// The payload, or the envelope, is not well formed.
    #[error(transparent)]
    Cbor(#[from] CborError),
    /// It holds another kind of object.
    #[error("expected {expected:?}, got {got:?}")]
    Kind {
        /// What the place asked for.
        expected: Kind,
        /// What arrived.
        got: Kind,
    },
    /// A format that this version does not read.
    #[error("{kind:?} of format {format} is newer than this program")]
    Format {
        /// What it holds.
        kind: Kind,
        /// Its format's version.
        format: u8,
    },
    /// A payload above [`MAX_PAYLOAD_BYTES`], or more than [`MAX_SIGNATURES`]: no other process would read it.
    #[error("{kind:?} of {payload_bytes} bytes with {signatures} signatures is too large")]
    TooLarge {
        /// What it holds.
        kind: Kind,
        /// Length of its payload.
        payload_bytes: usize,
        /// How many signatures it has.
        signatures: usize,
    },
    /// A signature does not match the bytes that arrived.
    #[error("signature by key {} does not match", .0.short())]
    BadSignature(KeyId),
    /// Fewer good signatures by the keys that may sign than are asked for.
    #[error("signed by {got} of the keys that may, {needed} needed")]
    TooFewSignatures {
        /// Good signatures found.
        got: usize,
        /// Needed.
        needed: usize,
    },
}

/// One signature and who made it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Signature {
    /// Hash of the public key.
    #[n(0)]
    pub key: KeyId,
    /// Ed25519 (RFC 8032), 64 bytes.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub signature: [u8; 64],
}

/// A signed object as it travels and is stored.
#[derive(Clone, PartialEq, Eq)]
pub struct Envelope {
    kind: Kind,
    format: u8,
    payload: Vec<u8>,
    signatures: Vec<Signature>,
}

impl Envelope {
    /// Encodes `object` once, and signs those bytes with each of `keys`.
    #[must_use]
    pub fn seal<T: Signed>(mesh: MeshId, object: &T, keys: &[&SigningKey]) -> Self {
        keys.iter().fold(Self::unsigned(object), |envelope, key| envelope.with_signature(mesh, key))
    }

    /// Adds one more signature over the same bytes; replaces one by the same key.
    #[must_use]
    pub fn with_signature(self, mesh: MeshId, key: &SigningKey) -> Self {
        let signature = Signature { key: key.verify_key().id(), signature: key.sign(&self.signed_bytes(mesh)) };
        self.with(signature)
    }

    /// Encodes `object` once, for keys that are elsewhere: what they sign is [`Self::signed_bytes`].
    #[must_use]
    pub fn unsigned<T: Signed>(object: &T) -> Self {
        Self { kind: T::KIND, format: T::FORMAT, payload: cbor::to_vec(object), signatures: Vec::new() }
    }

    /// Adds a signature that `key` made elsewhere over [`Self::signed_bytes`]; replaces one by the same key.
    ///
    /// # Errors
    /// [`EnvelopeError::BadSignature`] if it does not match, [`EnvelopeError::TooLarge`] if there are too many.
    pub fn with_signature_of(self, mesh: MeshId, key: &VerifyKey, signature: [u8; 64]) -> Result<Self, EnvelopeError> {
        let id = key.id();
        key.verify(&self.signed_bytes(mesh), &signature).map_err(|_| EnvelopeError::BadSignature(id))?;
        self.with(Signature { key: id, signature }).small_enough()
    }

    /// Adds the signatures of `other`, unverified, if both hold the same object; `None` if not, or if there are too many.
    #[must_use]
    pub fn merged(self, other: &Self) -> Option<Self> {
        let same = self.kind == other.kind && self.format == other.format && self.payload == other.payload;
        let merged = other.signatures.iter().cloned().fold(self, Self::with);
        same.then_some(merged)?.small_enough().ok()
    }

    fn with(mut self, signature: Signature) -> Self {
        self.signatures.retain(|existing| existing.key != signature.key);
        self.signatures.push(signature);
        self
    }

    fn small_enough(self) -> Result<Self, EnvelopeError> {
        if self.payload.len() > MAX_PAYLOAD_BYTES || self.signatures.len() > MAX_SIGNATURES {
            let (payload_bytes, signatures) = (self.payload.len(), self.signatures.len());
            return Err(EnvelopeError::TooLarge { kind: self.kind, payload_bytes, signatures });
        }
        Ok(self)
    }

    /// What it holds.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The payload's exact bytes.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// Who signed, unverified.
    pub fn signers(&self) -> impl Iterator<Item = KeyId> + '_ {
        self.signatures.iter().map(|signature| signature.key)
    }

    /// Hash of what is signed. Signatures are not part of it.
    #[must_use]
    pub fn hash(&self, mesh: MeshId) -> Hash {
        Hash(sha256(&[&self.signed_bytes(mesh)]))
    }

    /// Decodes the payload without looking at signatures: to find out whose key to verify with.
    ///
    /// # Errors
    /// [`EnvelopeError::Kind`], [`EnvelopeError::Format`], [`EnvelopeError::TooLarge`], [`EnvelopeError::Cbor`].
    pub fn unverified<T: Signed>(&self) -> Result<T, EnvelopeError> {
        if self.kind != T::KIND {
            return Err(EnvelopeError::Kind { expected: T::KIND, got: self.kind });
        }
        if self.format != T::FORMAT {
            return Err(EnvelopeError::Format { kind: self.kind, format: self.format });
        }
        // What arrived was measured when it was decoded; this one may have been sealed here.
        if self.payload.len() > MAX_PAYLOAD_BYTES || self.signatures.len() > MAX_SIGNATURES {
            let (payload_bytes, signatures) = (self.payload.len(), self.signatures.len());
            return Err(EnvelopeError::TooLarge { kind: self.kind, payload_bytes, signatures });
        }
        Ok(cbor::from_signed(&self.payload)?)
    }

    /// Verifies, then decodes. At least `threshold` different keys among `keys` have to have signed, and every
    /// signature by one of `keys` has to match; signatures by others are not looked at.
    ///
    /// # Errors
    /// Any [`EnvelopeError`].
    pub fn verified<T: Signed>(&self, mesh: MeshId, keys: &[VerifyKey], threshold: usize) -> Result<T, EnvelopeError> {
        let object = self.unverified()?;
        self.verify(mesh, keys, threshold)?;
        Ok(object)
    }

    /// The signature half of [`Self::verified`].
    ///
    /// # Errors
    /// [`EnvelopeError::BadSignature`], [`EnvelopeError::TooFewSignatures`].
    pub fn verify(&self, mesh: MeshId, keys: &[VerifyKey], threshold: usize) -> Result<(), EnvelopeError> {
        // Each key is hashed once, however many signatures a stranger appended.
        let by_id: BTreeMap<KeyId, &VerifyKey> = keys.iter().map(|key| (key.id(), key)).collect();
        self.verify_by(mesh, |id| by_id.get(&id).copied(), threshold)
    }

    /// As [`Self::verify`], for a caller that keeps its keys by id.
    pub(crate) fn verify_by<'k>(
        &self,
        mesh: MeshId,
        key_of: impl Fn(KeyId) -> Option<&'k VerifyKey>,
        threshold: usize,
    ) -> Result<(), EnvelopeError> {
        let message = self.signed_bytes(mesh);
        let mut good = 0;
        for signature in &self.signatures {
            let Some(key) = key_of(signature.key) else {
                continue;
            };
            key.verify(&message, &signature.signature).map_err(|_| EnvelopeError::BadSignature(signature.key))?;
            good += 1;
        }
        let needed = threshold.max(1);
        if good >= needed { Ok(()) } else { Err(EnvelopeError::TooFewSignatures { got: good, needed }) }
    }

    /// The bytes that are signed, as the module's head lays them out.
    #[must_use]
    pub fn signed_bytes(&self, mesh: MeshId) -> Vec<u8> {
        [LABEL, &[self.kind.number(), self.format], mesh.as_bytes(), &self.payload].concat()
    }
}

impl std::fmt::Debug for Envelope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Envelope({:?}, {} bytes)", self.kind, self.payload.len())
    }
}

impl<C> Encode<C> for Envelope {
    fn encode<W: encode::Write>(&self, e: &mut Encoder<W>, ctx: &mut C) -> Result<(), encode::Error<W::Error>> {
        e.map(4)?.u8(0)?.u8(self.kind.number())?.u8(1)?.u8(self.format)?;
        e.u8(2)?.bytes(&self.payload)?.u8(3)?;
        self.signatures.encode(e, ctx)
    }
}

#[derive(Decode)]
#[cbor(map)]
struct EnvelopeFields<'b> {
    #[n(0)]
    kind: Kind,
    #[n(1)]
    format: u8,
    #[cbor(b(2), with = "minicbor::bytes")]
    payload: &'b [u8],
    #[n(3)]
    signatures: Vec<Signature>,
}

impl<'b, C> Decode<'b, C> for Envelope {
    fn decode(d: &mut Decoder<'b>, ctx: &mut C) -> Result<Self, decode::Error> {
        let EnvelopeFields { kind, format, payload, signatures } = EnvelopeFields::decode(d, ctx)?;
        if payload.len() > MAX_PAYLOAD_BYTES || signatures.len() > MAX_SIGNATURES {
            return Err(decode::Error::message("envelope is too large"));
        }
        let repeated = |(at, one): (usize, &Signature)| signatures[..at].iter().any(|other| other.key == one.key);
        if signatures.iter().enumerate().any(repeated) {
            return Err(decode::Error::message("one key signed twice"));
        }
        Ok(Self { kind, format, payload: payload.to_vec(), signatures })
    }
}
