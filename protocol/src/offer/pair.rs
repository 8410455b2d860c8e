//! Keys of the offers from one static key to another.

use std::fmt;

use hkdf::Hkdf;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::HINT_BYTES;
use crate::id::{MeshId, NodeId};
use crate::key::{TunnelKey, TunnelSecret};

/// What a WireGuard secret key and another's public key have in common (X25519). The same at both ends.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct SharedSecret([u8; 32]);

impl SharedSecret {
    /// One curve operation.
    #[must_use]
    pub fn agree(own: &TunnelSecret, other: &TunnelKey) -> Self {
        let secret = x25519_dalek::StaticSecret::from(*own.bytes());
        Self(secret.diffie_hellman(&x25519_dalek::PublicKey::from(*other.as_bytes())).to_bytes())
    }
}

impl fmt::Debug for SharedSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedSecret([redacted])")
    }
}

/// Who offers to whom, on which of their keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Direction {
    /// The mesh.
    pub mesh: MeshId,
    /// Who makes the offer.
    pub initiator: (NodeId, TunnelKey),
    /// Whom it is for.
    pub responder: (NodeId, TunnelKey),
}

impl Direction {
    /// mesh id ‖ initiator ‖ responder ‖ initiator's key ‖ responder's key, 32 bytes each.
    pub(super) fn bytes(&self) -> [u8; 160] {
        let ((initiator, initiator_key), (responder, responder_key)) = (self.initiator, self.responder);
        let parts = [
            self.mesh.as_bytes(),
            initiator.as_bytes(),
            responder.as_bytes(),
            initiator_key.as_bytes(),
            responder_key.as_bytes(),
        ];
        let mut bytes = [0; 160];
        for (place, part) in bytes.chunks_exact_mut(32).zip(parts) {
            place.copy_from_slice(part);
        }
        bytes
    }
}

/// What hints and MACs of one direction are made with. Wiped when dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct OfferKeys {
    hint: [u8; 32],
    mac: [u8; 32],
}

impl OfferKeys {
    /// HKDF-SHA-256 (RFC 5869) of the shared secret, salt `mesh offer`, info `hint` or `mac` ‖ [`Direction`].
    #[must_use]
    pub fn new(shared: &SharedSecret, direction: &Direction) -> Self {
        let hkdf = Hkdf::<Sha256>::new(Some(b"mesh offer"), &shared.0);
        let mut keys = Self { hint: [0; 32], mac: [0; 32] };
        for (label, key) in [(&b"hint"[..], &mut keys.hint), (b"mac", &mut keys.mac)] {
            hkdf.expand_multi_info(&[label, &direction.bytes()], key).expect("32 bytes are few");
        }
        keys
    }

    /// First eight bytes of HMAC-SHA-256 over the day, days since 1970 as 8 bytes.
    #[must_use]
    pub fn hint(&self, day: u64) -> [u8; HINT_BYTES] {
        let mac = keyed(&self.hint).chain_update(day.to_be_bytes()).finalize().into_bytes();
        mac.first_chunk().copied().unwrap_or_default()
    }

    pub(super) fn mac(&self, said: &[u8]) -> Hmac<Sha256> {
        keyed(&self.mac).chain_update(said)
    }
}

impl fmt::Debug for OfferKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OfferKeys([redacted])")
    }
}

fn keyed(key: &[u8; 32]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of any length")
}
