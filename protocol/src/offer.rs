//! Key offers: what makes tunnels post-quantum. Datagrams on the tunnels' ports, ahead of a handshake initiation.
//!
//! The initiator encapsulates to the responder's ML-KEM-768 key and sends the ciphertext in an *offer*; both ends derive
//! from it one preshared key for each pair of their lanes. Here are the layout, the keys and the checks; the KEM itself
//! is the caller's. An offer is [`Sealed`] until its MAC was checked, which proves that a holder of one of the two static
//! X25519 keys made it: before that nothing is computed with the ciphertext.
//!
//! ```text
//! offset bytes
//!      0     1  0xa5: neither a WireGuard message nor STUN
//!      1     1  1, the format
//!      2     1  n: pairs of lanes, 1, 2, 4 or 8
//!      3     1  0
//!      4     8  hint: which pair of keys; changes daily
//!     12     8  number: rises with each offer from one key to another
//!     20     8  epoch of the initiator's WireGuard key
//!     28     8  epoch of the responder's WireGuard key
//!     36     8  epoch of the responder's ML-KEM-768 key
//!     44    24  n receiver indices of the initiator's tunnels, 24 bits each, then zeros
//!     68  1088  ML-KEM-768 ciphertext
//!   1156    32  HMAC-SHA-256 over all before
//! ```
//!
//! Integers are big-endian. Pair of lanes `i` is the initiator's lane `i mod a` and the responder's lane `i mod b`, where the
//! ends have `a` and `b` lanes and `n` is the larger.

mod pair;
mod preshared;

use hmac::Mac as _;

pub use pair::{Direction, OfferKeys, SharedSecret};
pub use preshared::{Agreement, PresharedSecret};

/// Bytes of an ML-KEM-768 ciphertext (FIPS 203, table 3).
pub const CIPHERTEXT_BYTES: usize = 1088;
/// Bytes of an offer: below what every path carries (1,280 less IPv6 and UDP headers is 1,232).
pub const OFFER_BYTES: usize = MAC_AT + 32;
/// Pairs of lanes that two nodes have at most.
pub const MAX_PAIRS: usize = 8;
/// Bytes of a hint.
pub const HINT_BYTES: usize = 8;

const KIND: u8 = 0xa5;
const FORMAT: u8 = 1;
const HINT_AT: usize = 4;
const INDICES_AT: usize = 44;
const INDEX_BYTES: usize = 3;
const CIPHERTEXT_AT: usize = INDICES_AT + MAX_PAIRS * INDEX_BYTES;
const MAC_AT: usize = CIPHERTEXT_AT + CIPHERTEXT_BYTES;

/// A datagram is no offer of this pair. Nothing is answered, nothing was computed with the ciphertext.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// Another length, kind, format or number of pairs, or bits set that have to be zero.
    #[error("not an offer of format {FORMAT}")]
    Malformed,
    /// Made by somebody else, or changed on the way.
    #[error("the offer's MAC does not match")]
    WrongMac,
}

/// What an offer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Rises with each offer that is made with one pair of static keys, also over restarts: microseconds since 1970.
    pub number: u64,
    /// Epoch of the initiator's WireGuard key.
    pub initiator_epoch: u64,
    /// Epoch of the responder's WireGuard key.
    pub responder_epoch: u64,
    /// Epoch of the responder's ML-KEM-768 key that the ciphertext is for.
    pub kem_epoch: u64,
    /// Upper 24 bits of the initiator's receiver indices, one for each pair of lanes: 1, 2, 4 or 8.
    pub indices: Vec<u32>,
    /// ML-KEM-768 ciphertext.
    pub ciphertext: Box<[u8; CIPHERTEXT_BYTES]>,
}

impl Offer {
    /// The datagram, under the hint of `day` (days since 1970).
    ///
    /// # Panics
    /// If there are not 1, 2, 4 or 8 indices of at most 24 bits: the caller made them.
    #[must_use]
    pub fn seal(&self, keys: &OfferKeys, day: u64) -> Box<[u8; OFFER_BYTES]> {
        assert!(is_pair_count(self.indices.len()), "{} pairs of lanes", self.indices.len());
        let mut bytes = Box::new([0; OFFER_BYTES]);
        bytes[..HINT_AT].copy_from_slice(&[KIND, FORMAT, self.indices.len() as u8, 0]);
        bytes[HINT_AT..HINT_AT + HINT_BYTES].copy_from_slice(&keys.hint(day));
        let numbers = [self.number, self.initiator_epoch, self.responder_epoch, self.kem_epoch];
        for (place, number) in bytes[HINT_AT + HINT_BYTES..INDICES_AT].chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_be_bytes());
        }
        for (place, index) in bytes[INDICES_AT..CIPHERTEXT_AT].chunks_exact_mut(INDEX_BYTES).zip(&self.indices) {
            let [high, rest @ ..] = index.to_be_bytes();
            assert_eq!(high, 0, "an index of more than 24 bits");
            place.copy_from_slice(&rest);
        }
        bytes[CIPHERTEXT_AT..MAC_AT].copy_from_slice(self.ciphertext.as_slice());
        let mac = keys.mac(&bytes[..MAC_AT]).finalize().into_bytes();
        bytes[MAC_AT..].copy_from_slice(&mac);
        bytes
    }
}

/// A datagram that has the shape of an offer. Who made it is not known.
#[derive(Debug, Clone, Copy)]
pub struct Sealed<'a>(&'a [u8; OFFER_BYTES]);

impl<'a> Sealed<'a> {
    /// Looks at the shape alone.
    ///
    /// # Errors
    /// [`OfferError::Malformed`].
    pub fn parse(datagram: &'a [u8]) -> Result<Self, OfferError> {
        let bytes: &[u8; OFFER_BYTES] = datagram.try_into().map_err(|_| OfferError::Malformed)?;
        let pairs = usize::from(bytes[2]);
        let is_rest_zero = || bytes[INDICES_AT + pairs * INDEX_BYTES..CIPHERTEXT_AT].iter().all(|byte| *byte == 0);
        if bytes[..2] != [KIND, FORMAT] || bytes[3] != 0 || !is_pair_count(pairs) || !is_rest_zero() {
            return Err(OfferError::Malformed);
        }
        Ok(Self(bytes))
    }

    /// Says which pair of keys to [`open`](Self::open) it with: one that has this hint today, yesterday or tomorrow.
    #[must_use]
    pub fn hint(&self) -> [u8; HINT_BYTES] {
        self.0[HINT_AT..].first_chunk().copied().unwrap_or_default()
    }

    /// Checks the MAC, in constant time, and reads what it covers.
    ///
    /// # Errors
    /// [`OfferError::WrongMac`].
    pub fn open(&self, keys: &OfferKeys) -> Result<Offer, OfferError> {
        let (said, mac) = self.0.split_at(MAC_AT);
        keys.mac(said).verify_slice(mac).map_err(|_| OfferError::WrongMac)?;
        let mut numbers = said[HINT_AT + HINT_BYTES..INDICES_AT].chunks_exact(8).map(be_number);
        let mut next = || numbers.next().unwrap_or_default();
        let (number, initiator_epoch, responder_epoch, kem_epoch) = (next(), next(), next(), next());
        let indices = said[INDICES_AT..CIPHERTEXT_AT].chunks_exact(INDEX_BYTES).take(usize::from(said[2]));
        let mut ciphertext = Box::new([0; CIPHERTEXT_BYTES]);
        ciphertext.copy_from_slice(&said[CIPHERTEXT_AT..]);
        Ok(Offer {
            number,
            initiator_epoch,
            responder_epoch,
            kem_epoch,
            indices: indices.map(|index| be_number(index) as u32).collect(),
            ciphertext,
        })
    }
}

/// True for datagrams that claim to be offers.
#[must_use]
pub fn is_offer(datagram: &[u8]) -> bool {
    datagram.len() == OFFER_BYTES && datagram[0] == KIND
}

/// Lanes `(initiator's, responder's)` of each pair of two nodes with so many lanes.
pub fn lane_pairs(initiator: u8, responder: u8) -> impl Iterator<Item = (u8, u8)> {
    let (a, b) = (initiator.max(1), responder.max(1));
    (0..a.max(b)).map(move |pair| (pair % a, pair % b))
}

fn is_pair_count(pairs: usize) -> bool {
    pairs.is_power_of_two() && pairs <= MAX_PAIRS
}

fn be_number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests;
