//! Secrets at rest, sealed under a key that does not lie beside them.
//!
//! systemd hands a service the credential `mesh.seal` (`LoadCredentialEncrypted=`), opened by the machine's TPM or by a key
//! that only this system has. A disk alone, or a copy of it, then holds nothing of use.
//!
//! ```text
//! key  = SHA-256("mesh seal\0" ‖ credential)
//! file = "mesh sealed 1\n" ‖ nonce (12 bytes) ‖ AES-256-GCM(contents; associated data: the file's name)
//! ```

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, RandomizedNonceKey};
use zeroize::{Zeroize as _, ZeroizeOnDrop, Zeroizing};

use crate::id::sha256;

/// Name of the credential.
pub const CREDENTIAL: &str = "mesh.seal";
/// What a sealed file begins with.
const LABEL: &[u8] = b"mesh sealed 1\n";
/// Bytes that a sealed file is longer than its contents.
pub const OVERHEAD: usize = LABEL.len() + NONCE_LEN + 16;
/// Fewer bytes are no secret.
const SHORTEST: usize = 32;

/// A sealed file, or the credential, is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// The credential is too short.
    #[error("the credential {CREDENTIAL} has fewer than {SHORTEST} bytes: make it of random ones")]
    TooShort,
    /// Another key, another file's place, or damage.
    #[error("it was sealed with another {CREDENTIAL}, or is damaged")]
    Refused,
}

/// Seals and opens.
#[derive(ZeroizeOnDrop)]
pub struct SealKey([u8; 32]);

impl std::fmt::Debug for SealKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SealKey([redacted])")
    }
}

impl SealKey {
    /// The key that a credential stands for.
    ///
    /// # Errors
    /// [`SealError::TooShort`] below 32 bytes.
    pub fn new(credential: &[u8]) -> Result<Self, SealError> {
        if credential.len() < SHORTEST {
            return Err(SealError::TooShort);
        }
        Ok(Self(sha256(&[b"mesh seal\0", credential])))
    }

    fn aead(&self) -> Result<RandomizedNonceKey, SealError> {
        RandomizedNonceKey::new(&AES_256_GCM, &self.0).map_err(|_| SealError::Refused)
    }

    /// What the file `name` is to hold in place of `contents`.
    ///
    /// # Errors
    /// [`SealError::Refused`] if the system gives no random bytes.
    pub fn seal(&self, name: &str, contents: &[u8]) -> Result<Vec<u8>, SealError> {
        let mut sealed = Zeroizing::new(Vec::with_capacity(contents.len() + OVERHEAD));
        sealed.extend_from_slice(contents);
        let nonce =
            self.aead()?.seal_in_place_append_tag(Aad::from(name), &mut *sealed).map_err(|_| SealError::Refused)?;
        Ok([LABEL, nonce.as_ref().as_slice(), &sealed].concat())
    }

    /// What the file `name` held before it was sealed.
    ///
    /// # Errors
    /// [`SealError::Refused`].
    pub fn open(&self, name: &str, file: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let (nonce, sealed) =
            file.strip_prefix(LABEL).and_then(<[u8]>::split_first_chunk::<NONCE_LEN>).ok_or(SealError::Refused)?;
        let mut bytes = Zeroizing::new(sealed.to_vec());
        let opened = self.aead()?.open_in_place(nonce.into(), Aad::from(name), &mut bytes);
        let length = opened.map_err(|_| SealError::Refused)?.len();
        bytes[length..].zeroize();
        bytes.truncate(length);
        Ok(bytes)
    }
}

/// True for a file that was sealed.
pub fn is_sealed(file: &[u8]) -> bool {
    file.starts_with(LABEL)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_was_sealed_opens_in_its_place_with_its_key_only() {
        let key = SealKey::new(&[1; 32]).unwrap();
        let file = key.seal("keys", b"the contents").unwrap();
        assert!(is_sealed(&file) && file.len() == 12 + OVERHEAD);
        assert!(!file.windows(12).any(|window| window == b"the contents"));
        assert_ne!(key.seal("keys", b"the contents").unwrap(), file, "another nonce");
        assert_eq!(*key.open("keys", &file).unwrap(), b"the contents");
        assert_eq!(key.open("identity", &file), Err(SealError::Refused));
        assert_eq!(SealKey::new(&[2; 32]).unwrap().open("keys", &file), Err(SealError::Refused));
        assert_eq!(SealKey::new(&[1; 31]).map(drop), Err(SealError::TooShort));
        assert_eq!(format!("{key:?}"), "SealKey([redacted])");
    }

    proptest! {
        #[test]
        fn nothing_else_opens(mut file in proptest::collection::vec(any::<u8>(), 0..100), labelled: bool, at: usize) {
            let key = SealKey::new(&[1; 32]).unwrap();
            if labelled {
                file.splice(0..0, LABEL.iter().copied());
            }
            prop_assert!(key.open("keys", &file).is_err());
            let mut sealed = key.seal("keys", &file).unwrap();
            let at = at % sealed.len();
            sealed[at] ^= 1;
            prop_assert!(key.open("keys", &sealed).is_err());
        }
    }
}
