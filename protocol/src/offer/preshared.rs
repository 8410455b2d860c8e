//! From the KEM's secret to one preshared key for each pair of lanes.

use std::fmt;

use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::{CIPHERTEXT_BYTES, Direction};
use crate::id::sha256;
use crate::key::KemPublic;

/// The 32 bytes that ML-KEM-768 encapsulated. Wiped when dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PresharedSecret([u8; 32]);

impl PresharedSecret {
    /// Takes what the KEM gave.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for PresharedSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedSecret([redacted])")
    }
}

/// What a preshared key is bound to beside the KEM's secret.
#[derive(Debug, Clone, Copy)]
pub struct Agreement<'a> {
    /// Nodes and their WireGuard keys.
    pub direction: Direction,
    /// The responder's ML-KEM-768 key.
    pub kem: &'a KemPublic,
    /// The ciphertext.
    pub ciphertext: &'a [u8; CIPHERTEXT_BYTES],
}

impl Agreement<'_> {
    /// The preshared key of one pair of lanes: HKDF-SHA-256 of the secret, salt `mesh preshared`, info the
    /// [`Direction`] ‖ SHA-256(KEM key) ‖ SHA-256(ciphertext) ‖ initiator's lane (1 byte) ‖ responder's lane (1 byte).
    #[must_use]
    pub fn preshared_key(&self, secret: &PresharedSecret, (initiator, responder): (u8, u8)) -> Zeroizing<[u8; 32]> {
        let (kem, ciphertext) = (sha256(&[self.kem.as_bytes()]), sha256(&[self.ciphertext]));
        let info: [&[u8]; 4] = [&self.direction.bytes(), &kem, &ciphertext, &[initiator, responder]];
        let mut key = Zeroizing::new([0; 32]);
        let hkdf = Hkdf::<Sha256>::new(Some(b"mesh preshared"), &secret.0);
        hkdf.expand_multi_info(&info, key.as_mut_slice()).expect("32 bytes are few");
        key
    }
}
