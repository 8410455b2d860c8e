//! The ML-KEM-768 pair (FIPS 203). Both halves are kept: the library cannot derive the public half from a restored
//! secret one.

use std::fmt;

use aws_lc_rs::kem::{Ciphertext, DecapsulationKey, EncapsulationKey, ML_KEM_768};
use mesh_protocol::key::KemPublic;
use mesh_protocol::offer::{CIPHERTEXT_BYTES, PresharedSecret};
use zeroize::Zeroizing;

use super::IdentityError;

/// Bytes of an expanded decapsulation key (FIPS 203, table 3).
pub(super) const KEM_SECRET_BYTES: usize = 2400;

/// Both halves. The secret one is wiped when dropped.
#[derive(Clone)]
pub(crate) struct KemPair {
    pub(super) public: KemPublic,
    pub(super) secret: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for KemPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KemPair({:?}, [redacted])", self.public)
    }
}

impl KemPair {
    /// What others encapsulate to.
    pub(crate) fn public(&self) -> &KemPublic {
        &self.public
    }

    /// The secret that a ciphertext holds; of a wrong one, another secret that nobody knows (FIPS 203, section 6.3). `None` if
    /// the library takes neither key nor ciphertext.
    pub(crate) fn decapsulate(&self, ciphertext: &[u8; CIPHERTEXT_BYTES]) -> Option<PresharedSecret> {
        let secret = DecapsulationKey::new(&ML_KEM_768, &self.secret).ok()?;
        preshared(secret.decapsulate(Ciphertext::from(ciphertext.as_slice())).ok()?.as_ref())
    }
}

/// Makes a secret and its ciphertext for the holder of a key. `None` if the key is none.
pub(crate) fn encapsulate(public: &KemPublic) -> Option<(PresharedSecret, Box<[u8; CIPHERTEXT_BYTES]>)> {
    let public = EncapsulationKey::new(&ML_KEM_768, public.as_bytes()).ok()?;
    let (ciphertext, secret) = public.encapsulate().ok()?;
    let bytes: [u8; CIPHERTEXT_BYTES] = ciphertext.as_ref().try_into().ok()?;
    Some((preshared(secret.as_ref())?, Box::new(bytes)))
}

fn preshared(secret: &[u8]) -> Option<PresharedSecret> {
    let bytes: Zeroizing<[u8; 32]> = Zeroizing::new(secret.try_into().ok()?);
    Some(PresharedSecret::new(*bytes))
}

/// Makes a pair.
pub(crate) fn generate() -> Result<KemPair, IdentityError> {
    let failed = || IdentityError::NoKey("ML-KEM-768 key generation failed");
    let pair = DecapsulationKey::generate(&ML_KEM_768).map_err(|_| failed())?;
    let public = pair.encapsulation_key().and_then(|public| public.key_bytes()).map_err(|_| failed())?;
    let secret = pair.key_bytes().map_err(|_| failed())?;
    Ok(KemPair {
        public: KemPublic::from_bytes(public.as_ref()).map_err(|_| failed())?,
        secret: Zeroizing::new(secret.as_ref().to_vec()),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn what_is_encapsulated_comes_out_for_the_holder_alone() {
        let (pair, other) = (generate().unwrap(), generate().unwrap());
        let (secret, ciphertext) = encapsulate(pair.public()).unwrap();
        let bytes = |secret: &PresharedSecret| {
            let direction = mesh_protocol::offer::Direction {
                mesh: mesh_protocol::id::MeshId([0; 32]),
                initiator: (mesh_protocol::id::NodeId([1; 32]), key(1)),
                responder: (mesh_protocol::id::NodeId([2; 32]), key(2)),
            };
            let agreement = mesh_protocol::offer::Agreement { direction, kem: pair.public(), ciphertext: &ciphertext };
            *agreement.preshared_key(secret, (0, 0))
        };
        assert_eq!(bytes(&secret), bytes(&pair.decapsulate(&ciphertext).unwrap()));
        assert_ne!(bytes(&secret), bytes(&other.decapsulate(&ciphertext).unwrap()));
        assert_ne!(bytes(&secret), bytes(&pair.decapsulate(&[0; CIPHERTEXT_BYTES]).unwrap()), "implicit rejection");
        assert!(encapsulate(&KemPublic::from_bytes(&[0xff; 1184]).unwrap()).is_none(), "no key of ML-KEM");
    }

    fn key(n: u8) -> mesh_protocol::key::TunnelKey {
        mesh_protocol::key::TunnelSecret::from_bytes([n; 32]).public()
    }

    #[test]
    fn restored_halves_still_belong_together() {
        let pair = generate().unwrap();
        assert_eq!(pair.secret.len(), KEM_SECRET_BYTES);
        let public = EncapsulationKey::new(&ML_KEM_768, pair.public.as_bytes()).unwrap();
        let (sent, ours) = public.encapsulate().unwrap();
        let secret = DecapsulationKey::new(&ML_KEM_768, &pair.secret).unwrap();
        let theirs = secret.decapsulate(Ciphertext::from(sent.as_ref())).unwrap();
        assert_eq!(ours.as_ref(), theirs.as_ref());
        assert!(!format!("{pair:?}").contains(&format!("{:?}", pair.secret[..4].to_vec())));
    }
}
