//! Keys: parse, print, redact, wipe.
//!
//! Ed25519 signs; X25519 is WireGuard's; ML-KEM-768 makes preshared keys. Secrets print `[redacted]` and are wiped when
//! dropped. Nothing here draws random numbers: a caller brings the 32 bytes.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::Signer as _;
use minicbor::{Decode, Decoder, Encode, Encoder, decode, encode};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::id::{KeyId, NodeId, sha256};

/// Bytes of an ML-KEM-768 encapsulation key (FIPS 203, table 3).
pub const KEM_PUBLIC_BYTES: usize = 1184;

/// A key could not be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// Wrong length or alphabet, or 32 bytes that encode no key.
    #[error("not a key: the base64 of 32 bytes that encode a key is expected")]
    Malformed,
    /// The point is weak: it would make any signature or any shared secret match.
    #[error("key is of low order")]
    LowOrder,
    /// The signature does not match, or is not in canonical form.
    #[error("signature does not match")]
    BadSignature,
}

/// An Ed25519 public key, checked to be a point that is not of low order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VerifyKey([u8; 32]);

impl VerifyKey {
    /// Checks 32 bytes as RFC 8032 encodes a public key.
    ///
    /// # Errors
    /// [`KeyError::Malformed`] if it is no point, or not the canonical encoding of one (else one key had two ids);
    /// [`KeyError::LowOrder`] if it is a weak one.
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, KeyError> {
        if !is_reduced(&with_top_bit_clear(bytes)) {
            return Err(KeyError::Malformed);
        }
        let key = ed25519_dalek::VerifyingKey::from_bytes(&bytes).map_err(|_| KeyError::Malformed)?;
        if key.is_weak() { Err(KeyError::LowOrder) } else { Ok(Self(bytes)) }
    }

    /// The 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The id other objects name this key by.
    #[must_use]
    pub fn id(&self) -> KeyId {
        KeyId(sha256(&[b"mesh key\0", &self.0]))
    }

    /// The id of the node that began with this identity key.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        NodeId(sha256(&[b"mesh node\0", &self.0]))
    }

    /// Verifies strictly: canonical S, no small-order R or A, so that one message has one valid signature per key.
    ///
    /// # Errors
    /// [`KeyError::BadSignature`].
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> Result<(), KeyError> {
        let key = ed25519_dalek::VerifyingKey::from_bytes(&self.0).map_err(|_| KeyError::Malformed)?;
        let signature = ed25519_dalek::Signature::from_bytes(signature);
        key.verify_strict(message, &signature).map_err(|_| KeyError::BadSignature)
    }
}

/// An Ed25519 secret key: 32 bytes of seed.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct SigningKey([u8; 32]);

impl SigningKey {
    /// Takes the seed. It has to come from the operating system's random source, or from a file that did.
    #[must_use]
    pub fn from_seed(seed: [u8; 32]) -> Self {
        Self(seed)
    }

    /// The seed, to write to a file.
    #[must_use]
    pub fn seed(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0)
    }

    /// Its public half.
    #[must_use]
    pub fn verify_key(&self) -> VerifyKey {
        VerifyKey(self.expanded().verifying_key().to_bytes())
    }

    /// Signs `message` (RFC 8032, Ed25519 without context: callers prefix a domain label).
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.expanded().sign(message).to_bytes()
    }

    fn expanded(&self) -> ed25519_dalek::SigningKey {
        ed25519_dalek::SigningKey::from_bytes(&self.0)
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningKey([redacted])")
    }
}

/// A WireGuard (X25519) public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TunnelKey([u8; 32]);

impl TunnelKey {
    /// Takes 32 bytes (RFC 7748, little-endian u-coordinate).
    ///
    /// # Errors
    /// [`KeyError::Malformed`] if it is not below 2^255 - 19: X25519 ignores the top bit and reduces the rest, so that
    /// other bytes would be the same key, and could be shown as somebody else's. [`KeyError::LowOrder`] if every shared
    /// secret with it would be zero.
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, KeyError> {
        if !is_reduced(&bytes) {
            return Err(KeyError::Malformed);
        }
        let probe = x25519_dalek::StaticSecret::from([0x55; 32]);
        let shared = probe.diffie_hellman(&x25519_dalek::PublicKey::from(bytes));
        if shared.was_contributory() { Ok(Self(bytes)) } else { Err(KeyError::LowOrder) }
    }

    /// The 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first eight characters of the base64 form, for logs.
    #[must_use]
    pub fn short(&self) -> String {
        BASE64.encode(self.0).chars().take(8).collect()
    }
}

/// A WireGuard (X25519) secret key.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct TunnelSecret([u8; 32]);

impl TunnelSecret {
    /// Takes 32 random bytes; clamping happens at use (RFC 7748, section 5).
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes, for the tunnel or a file.
    #[must_use]
    pub fn bytes(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0)
    }

    /// Its public half.
    #[must_use]
    pub fn public(&self) -> TunnelKey {
        let secret = x25519_dalek::StaticSecret::from(self.0);
        TunnelKey(x25519_dalek::PublicKey::from(&secret).to_bytes())
    }
}

impl fmt::Debug for TunnelSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TunnelSecret([redacted])")
    }
}

/// Whether 32 little-endian bytes are a number below 2^255 - 19.
fn is_reduced(bytes: &[u8; 32]) -> bool {
    let [first, middle @ .., last] = bytes;
    *last < 0x7f || (*last == 0x7f && (middle.iter().any(|byte| *byte != 0xff) || *first < 0xed))
}

fn with_top_bit_clear(mut bytes: [u8; 32]) -> [u8; 32] {
    bytes[31] &= 0x7f;
    bytes
}

macro_rules! base64_key {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&BASE64.encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = KeyError;

            fn from_str(text: &str) -> Result<Self, KeyError> {
                let bytes = BASE64.decode(text).map_err(|_| KeyError::Malformed)?;
                Self::from_bytes(bytes.try_into().map_err(|_| KeyError::Malformed)?)
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }

        impl<C> Encode<C> for $name {
            fn encode<W: encode::Write>(&self, e: &mut Encoder<W>, _: &mut C) -> Result<(), encode::Error<W::Error>> {
                e.bytes(&self.0)?.ok()
            }
        }

        impl<'b, C> Decode<'b, C> for $name {
            fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, decode::Error> {
                Self::from_bytes(crate::cbor::array32(d)?).map_err(|error| decode::Error::message(error.to_string()))
            }
        }
    };
}

base64_key!(VerifyKey);
base64_key!(TunnelKey);

/// An ML-KEM-768 encapsulation key (FIPS 203): 1184 bytes. Only its length is checked here; the KEM checks the rest.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct KemPublic(Vec<u8>);

impl KemPublic {
    /// Takes the encoded key.
    ///
    /// # Errors
    /// [`KeyError::Malformed`] unless it is 1184 bytes long.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KeyError> {
        if bytes.len() == KEM_PUBLIC_BYTES { Ok(Self(bytes.to_vec())) } else { Err(KeyError::Malformed) }
    }

    /// The 1184 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for KemPublic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KemPublic({}..)", hex::encode(&self.0[..4]))
    }
}

impl<C> Encode<C> for KemPublic {
    fn encode<W: encode::Write>(&self, e: &mut Encoder<W>, _: &mut C) -> Result<(), encode::Error<W::Error>> {
        e.bytes(&self.0)?.ok()
    }
}

impl<'b, C> Decode<'b, C> for KemPublic {
    fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, decode::Error> {
        Self::from_bytes(d.bytes()?).map_err(|_| decode::Error::message("ML-KEM-768 key is not 1184 bytes"))
    }
}

#[cfg(test)]
mod tests;
