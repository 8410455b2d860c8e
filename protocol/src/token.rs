//! The join token: one line a person can paste.
//!
//! The issuer signs the token's public half with its limits ([`TokenLimits`]); the line carries that, the secret seed,
//! and what a node needs to know a keyserver by. The node signs its request with the seed and never sends it.
//!
//! ```text
//! line  = "mesh-join-" ‖ base64url without padding of ( payload ‖ first 4 bytes of SHA-256(payload) )
//! ```

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ipnet::IpNet;
use minicbor::{Decode, Encode};
use zeroize::{Zeroize, Zeroizing};

use crate::cbor::{self, CborError};
use crate::envelope::{Envelope, Kind, Signed};
use crate::id::{Hash, MeshId, Name, NodeId, TokenId, sha256};
use crate::key::{SigningKey, VerifyKey};

const PREFIX: &str = "mesh-join-";
const MAX_LINE_BYTES: usize = 8 * 1024;
const REQUEST_LABEL: &[u8] = b"mesh join request\0";
const SHOW_LABEL: &[u8] = b"mesh join show\0";

/// A line is not a join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// It does not start as one.
    #[error("a join token starts with '{PREFIX}'")]
    NotAToken,
    /// A character was lost or changed on the way.
    #[error("join token is damaged: copy the whole line again")]
    Damaged,
    /// It decodes to something else.
    #[error("join token does not decode: {0}")]
    Malformed(#[from] CborError),
}

/// What the issuer allows the holder of a token.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct TokenLimits {
    /// Public half: verifies the join request.
    #[n(0)]
    pub key: VerifyKey,
    /// How many nodes may enrol.
    #[n(1)]
    pub uses: u32,
    /// Seconds since 1970 after which nobody may.
    #[n(2)]
    pub expires: u64,
    /// The cluster they enrol into.
    #[n(3)]
    pub cluster: Name,
    /// A pod CIDR a node asks for lies inside one of these; none given: inside the cluster's pools.
    #[cbor(n(4), with = "cbor::nets")]
    pub cidrs: Vec<IpNet>,
    /// Tags they get.
    #[n(5)]
    pub tags: Vec<Name>,
    /// Seconds since 1970, to the signer's clock: a keyserver whose store was restored since takes it no more.
    #[n(6)]
    pub issued: Option<u64>,
}

impl Signed for TokenLimits {
    const KIND: Kind = Kind::TokenLimits;
}

impl TokenLimits {
    /// The token's id: hash of its public half.
    #[must_use]
    pub fn id(&self) -> TokenId {
        token_id(&self.key)
    }

    /// Verifies [`JoinToken::show`].
    ///
    /// # Errors
    /// [`KeyError::BadSignature`](crate::key::KeyError::BadSignature).
    pub fn verify_shown(&self, exporter: &[u8; 32], signature: &[u8; 64]) -> Result<(), crate::key::KeyError> {
        self.key.verify(&shown_bytes(self.id(), exporter), signature)
    }
}

fn token_id(key: &VerifyKey) -> TokenId {
    TokenId(sha256(&[b"mesh token\0", key.as_bytes()]))
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Payload {
    #[n(0)]
    mesh: MeshId,
    #[n(1)]
    policy_version: u64,
    #[n(2)]
    policy: Hash,
    #[n(3)]
    keyservers: Vec<String>,
    #[n(4)]
    checkpoint: Envelope,
    #[n(5)]
    limits: Envelope,
    #[cbor(n(6), with = "minicbor::bytes")]
    seed: [u8; 32],
}

/// A join token with its secret half.
#[derive(Clone)]
pub struct JoinToken {
    /// The mesh it leads into.
    pub mesh: MeshId,
    /// Version of the policy when it was made.
    pub policy_version: u64,
    /// Hash of that policy.
    pub policy: Hash,
    /// Addresses of keyservers, `host:port`.
    pub keyservers: Vec<String>,
    /// The newest checkpoint when it was made: what the node meets must not be older.
    pub checkpoint: Envelope,
    /// The signed limits.
    pub limits: Envelope,
    /// The secret half.
    pub secret: SigningKey,
}

impl JoinToken {
    /// The line to paste. It is a secret.
    #[must_use]
    pub fn to_line(&self) -> Zeroizing<String> {
        let mut payload = Payload {
            mesh: self.mesh,
            policy_version: self.policy_version,
            policy: self.policy,
            keyservers: self.keyservers.clone(),
            checkpoint: self.checkpoint.clone(),
            limits: self.limits.clone(),
            seed: *self.secret.seed(),
        };
        let mut bytes = Zeroizing::new(cbor::to_vec(&payload));
        payload.seed.zeroize();
        let check = sha256(&[&bytes]);
        bytes.extend(&check[..4]);
        Zeroizing::new(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&*bytes)))
    }

    /// The token's id.
    #[must_use]
    pub fn id(&self) -> TokenId {
        token_id(&self.secret.verify_key())
    }

    /// Proves on one connection, named by its TLS exporter, that this end holds the token. Tells the other end nothing
    /// that it can use elsewhere.
    #[must_use]
    pub fn show(&self, exporter: &[u8; 32]) -> [u8; 64] {
        self.secret.sign(&shown_bytes(self.id(), exporter))
    }

    /// Whether the keyserver that answers with `key` is the one that signed the token's checkpoint: it may see the limits
    /// before the mesh's policies were verified.
    #[must_use]
    pub fn is_from(&self, key: &VerifyKey) -> bool {
        self.checkpoint.signers().any(|signer| signer == key.id())
    }
}

fn shown_bytes(token: TokenId, exporter: &[u8; 32]) -> Vec<u8> {
    [SHOW_LABEL, exporter, token.as_bytes().as_slice()].concat()
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(line: &str) -> Result<Self, TokenError> {
        let encoded = line.trim().strip_prefix(PREFIX).ok_or(TokenError::NotAToken)?;
        if encoded.len() > MAX_LINE_BYTES {
            return Err(TokenError::Damaged);
        }
        let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(encoded).map_err(|_| TokenError::Damaged)?);
        let (payload, check) = bytes.split_last_chunk::<4>().ok_or(TokenError::Damaged)?;
        if sha256(&[payload])[..4] != *check {
            return Err(TokenError::Damaged);
        }
        let mut payload: Payload = cbor::from_signed(payload)?;
        let secret = SigningKey::from_seed(payload.seed);
        payload.seed.zeroize();
        let Payload { mesh, policy_version, policy, keyservers, checkpoint, limits, .. } = payload;
        let halves_match = limits.unverified::<TokenLimits>().is_ok_and(|limits| limits.key == secret.verify_key());
        if !halves_match || checkpoint.kind() != Kind::Checkpoint {
            return Err(TokenError::Malformed(CborError::Meaning("its parts do not belong together".to_owned())));
        }
        Ok(Self { mesh, policy_version, policy, keyservers, checkpoint, limits, secret })
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, [redacted])", self.id().short())
    }
}

/// What a node signs with the token's seed: everything it asks for, and the connection it asks on.
///
/// The verifier encodes what it decoded: unlike signed objects, a claim with a field that the keyserver does not know is
/// refused. Another set of fields comes with another [`ALPN`](crate::control::ALPN_JOIN).
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct JoinClaim {
    /// The mesh it believes to join.
    #[n(0)]
    pub mesh: MeshId,
    /// With which token.
    #[n(1)]
    pub token: TokenId,
    /// Its identity key; the control channel shows that it holds it.
    #[n(2)]
    pub identity: VerifyKey,
    /// The name it would like.
    #[n(3)]
    pub name: Name,
    /// Pod CIDRs it needs; none: the keyserver picks.
    #[cbor(n(4), with = "cbor::nets")]
    pub pod_cidrs: Vec<IpNet>,
}

impl JoinClaim {
    /// Signs the claim for one connection, named by its TLS exporter (RFC 8446, section 7.5; 32 bytes).
    #[must_use]
    pub fn sign(&self, secret: &SigningKey, exporter: &[u8; 32]) -> [u8; 64] {
        secret.sign(&self.signed_bytes(exporter))
    }

    /// Verifies it with the token's public half.
    ///
    /// # Errors
    /// [`KeyError::BadSignature`](crate::key::KeyError::BadSignature).
    pub fn verify(
        &self,
        key: &VerifyKey,
        exporter: &[u8; 32],
        signature: &[u8; 64],
    ) -> Result<(), crate::key::KeyError> {
        key.verify(&self.signed_bytes(exporter), signature)
    }

    /// The node that asks.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.identity.node_id()
    }

    fn signed_bytes(&self, exporter: &[u8; 32]) -> Vec<u8> {
        [REQUEST_LABEL, exporter, &cbor::to_vec(self)].concat()
    }
}

/// Label under which both ends derive the exporter of a joining connection (RFC 5705).
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-mesh-join";
