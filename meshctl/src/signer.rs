//! Keys that sign grants, tokens and policies, wherever they are: a file, a command, a PKCS#11 token.
//!
//! ```text
//! PATH                  a key file: 64 hexadecimal digits, mode 0600 (meshctl signer new)
//! exec:COMMAND ARG ..   a program that signs: see `exec`
//! pkcs11:...            a key in a token: see `pkcs11`
//! ```
//!
//! A signature is verified before it is used, whoever made it.

mod exec;
mod file;
#[cfg(feature = "pkcs11")]
mod pkcs11;

use std::path::{Path, PathBuf};

use mesh_protocol::envelope::{Envelope, EnvelopeError};
use mesh_protocol::id::MeshId;
use mesh_protocol::key::{SigningKey, VerifyKey};

pub(crate) use file::make as make_key_file;

/// A signer cannot be used, or did not sign.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SignerError {
    /// What was given names none.
    #[error("'{spec}' is no signer: {reason}")]
    Spec { spec: String, reason: String },
    /// The key file.
    #[error("key file {}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    /// The command.
    #[error("signer command '{command}' {reason}")]
    Exec { command: String, reason: String },
    /// The token.
    #[cfg(feature = "pkcs11")]
    #[error("PKCS#11 token: {0}")]
    Token(String),
    /// It signed something else, or with another key.
    #[error("the signer's signature is not good")]
    Signature(#[source] EnvelopeError),
}

/// A key that signs.
#[derive(Debug)]
pub(crate) struct Signer {
    kind: Kind,
    public: VerifyKey,
}

#[derive(Debug)]
enum Kind {
    File(SigningKey, PathBuf),
    Exec(exec::Exec),
    #[cfg(feature = "pkcs11")]
    Token(pkcs11::Token),
}

impl Signer {
    /// Finds the key and its public half.
    pub(crate) fn open(spec: &str) -> Result<Self, SignerError> {
        if let Some(command) = spec.strip_prefix("exec:") {
            let exec = exec::Exec::new(command)?;
            let public = exec.public_key()?;
            return Ok(Self { kind: Kind::Exec(exec), public });
        }
        if spec.starts_with("pkcs11:") {
            return Self::open_token(spec);
        }
        let path = Path::new(spec.strip_prefix("file:").unwrap_or(spec));
        let key = file::read(path)?;
        let public = key.verify_key();
        Ok(Self { kind: Kind::File(key, path.to_owned()), public })
    }

    #[cfg(feature = "pkcs11")]
    fn open_token(spec: &str) -> Result<Self, SignerError> {
        let (token, public) = pkcs11::Token::open(spec)?;
        Ok(Self { kind: Kind::Token(token), public })
    }

    #[cfg(not(feature = "pkcs11"))]
    fn open_token(spec: &str) -> Result<Self, SignerError> {
        let reason = "this meshctl was built without PKCS#11 (feature 'pkcs11')".to_owned();
        Err(SignerError::Spec { spec: spec.to_owned(), reason })
    }

    /// Its public half.
    pub(crate) fn public(&self) -> VerifyKey {
        self.public
    }

    /// The file it is in, if it is in one.
    pub(crate) fn path(&self) -> Option<&Path> {
        match &self.kind {
            Kind::File(_, path) => Some(path),
            _ => None,
        }
    }

    /// Adds its signature to an object of `mesh`.
    pub(crate) fn sign(&self, mesh: MeshId, envelope: Envelope) -> Result<Envelope, SignerError> {
        let message = envelope.signed_bytes(mesh);
        let signature = match &self.kind {
            Kind::File(key, _) => key.sign(&message),
            Kind::Exec(exec) => exec.sign(&self.public, &message)?,
            #[cfg(feature = "pkcs11")]
            Kind::Token(token) => token.sign(&message)?,
        };
        envelope.with_signature_of(mesh, &self.public, signature).map_err(SignerError::Signature)
    }
}

#[cfg(test)]
mod tests;
