//! The ML-KEM-768 pair (FIPS 203). Both halves are kept: the library cannot derive the public half from a restored
//! secret one.

use std::fmt;

use aws_lc_rs::kem::{DecapsulationKey, ML_KEM_768};
use mesh_protocol::key::KemPublic;
use zeroize::Zeroizing;

use super::IdentityError;

/// Bytes of an expanded decapsulation key (FIPS 203, table 3).
pub(super) const KEM_SECRET_BYTES: usize = 2400;

/// Both halves. The secret one is wiped when dropped.
#[derive(Clone)]
pub(super) struct KemPair {
    pub(super) public: KemPublic,
    pub(super) secret: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for KemPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KemPair({:?}, [redacted])", self.public)
    }
}

/// Makes a pair.
pub(super) fn generate() -> Result<KemPair, IdentityError> {
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

    use aws_lc_rs::kem::{Ciphertext, EncapsulationKey};

    use super::*;

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
