//! Files that go between the keyserver and machines that hold keys and have no network: text that survives a mail, a
//! stick, a terminal.
//!
//! ```text
//! keyserver ── MeshFile ─────────> token create (issuer)        the mesh's policies, checkpoint, addresses
//! keyserver ── GrantRequests ────> grant sign (issuer) ──── SignedGrants ──> keyserver
//! keyserver ── PolicyProposal ───> policy sign (each root) ─ PolicyProposal ─> keyserver
//! ```
//!
//! Nothing in them is believed because it is in them: the rules are [`crate::trust`]'s, from the mesh id down. What the
//! signing machine remembers of earlier times ([`Memory`]) keeps a keyserver from showing it an older mesh.

mod armor;

use std::collections::BTreeMap;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::UnixSeconds;
use crate::cbor::{self, CborError};
use crate::envelope::Envelope;
use crate::id::{Hash, KeyId, MeshId, NodeId};
use crate::record::NodeGrant;
use crate::token::JoinClaim;
use crate::trust::{TrustError, View};

pub use armor::MAX_FILE_BYTES;

/// A file is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// No `-----BEGIN MESH ...-----` line of the expected kind.
    #[error("there is no '-----BEGIN {0}-----' in it")]
    NoBegin(&'static str),
    /// Lines are missing, or a character was changed.
    #[error("it is damaged: copy the whole file again")]
    Damaged,
    /// Longer than [`MAX_FILE_BYTES`].
    #[error("it is longer than {MAX_FILE_BYTES} bytes")]
    TooLong,
    /// It decodes to something else.
    #[error("it does not decode: {0}")]
    Malformed(#[from] CborError),
}

/// What travels in a file.
pub trait InFile: Encode<()> + for<'b> Decode<'b, ()> {
    /// Stands in the first and the last line.
    const LABEL: &'static str;

    /// The text of the file.
    #[must_use]
    fn to_text(&self) -> String {
        armor::encode(Self::LABEL, &cbor::to_vec(self))
    }

    /// Reads it from text; what stands around it is skipped.
    ///
    /// # Errors
    /// [`FileError`].
    fn from_text(text: &str) -> Result<Self, FileError> {
        let bytes = armor::decode(Self::LABEL, text)?;
        Ok(cbor::from_slice(&bytes)?)
    }
}

/// What a machine without a network has to know of a mesh.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct MeshFile {
    /// Which; all zero for one whose first policy is not signed yet.
    #[n(0)]
    pub mesh: MeshId,
    /// Every trust policy, oldest first.
    #[n(1)]
    pub policies: Vec<Envelope>,
    /// The newest checkpoint: goes into join tokens.
    #[n(2)]
    pub checkpoint: Option<Envelope>,
    /// Addresses of keyservers, `host:port`: go into join tokens.
    #[n(3)]
    pub keyservers: Vec<String>,
    /// How far grants have come, by the keyserver's word: goes into a policy that gives an issuer another key.
    #[n(4)]
    pub reached: Option<Reached>,
}

/// How far grants have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Reached {
    /// Highest generation of any grant.
    #[n(0)]
    pub generation: u64,
    /// Highest serial.
    #[n(1)]
    pub serial: u64,
}

impl InFile for MeshFile {
    const LABEL: &'static str = "MESH";
}

impl MeshFile {
    /// Verifies the chain of policies from the mesh id that the file names, which the reader has to know from elsewhere.
    ///
    /// # Errors
    /// As [`View::pinned`].
    pub fn view(&self) -> Result<View, TrustError> {
        View::pinned(self.mesh, &self.policies)
    }
}

/// Grants that issuers are asked for.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct GrantRequests {
    /// The mesh as the keyserver shows it.
    #[n(0)]
    pub mesh: MeshFile,
    /// One each, in the order of their serials.
    #[n(1)]
    pub requests: Vec<GrantRequest>,
}

impl InFile for GrantRequests {
    const LABEL: &'static str = "MESH GRANT REQUESTS";
}

/// One grant that an issuer is asked for: [`View::check_request`] judges it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct GrantRequest {
    /// The grant to be signed, word for word: what the keyserver has reserved.
    #[n(0)]
    pub grant: NodeGrant,
    /// Why it should be.
    #[n(1)]
    pub reason: GrantReason,
    /// Seconds since 1970 after which the reservation is void.
    #[n(2)]
    pub until: UnixSeconds,
}

/// What stands behind a request.
#[expect(clippy::large_enum_variant, reason = "almost every one is a Join")]
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum GrantReason {
    /// A node asks to enrol.
    #[n(0)]
    #[cbor(map)]
    Join {
        /// What it asks for.
        #[n(0)]
        claim: JoinClaim,
        /// Exporter of the connection it asked on.
        #[cbor(n(1), with = "minicbor::bytes")]
        exporter: [u8; 32],
        /// [`JoinClaim::sign`] over both, with the token.
        #[cbor(n(2), with = "minicbor::bytes")]
        signature: [u8; 64],
        /// The token's signed [`TokenLimits`](crate::token::TokenLimits).
        #[n(3)]
        limits: Envelope,
    },
    /// A member's grant comes to its end.
    #[n(1)]
    #[cbor(map)]
    Renewal {
        /// The grant it has.
        #[n(0)]
        held: Envelope,
    },
    /// A member replaces its identity key: the last handover in the grant is signed by the key it has and the new one.
    #[n(2)]
    #[cbor(map)]
    Succession {
        /// The grant it has.
        #[n(0)]
        held: Envelope,
    },
    /// A revoked node comes back: the grant lifts the revocation. A person has to know that its machine is in good hands.
    #[n(3)]
    #[cbor(map)]
    Restoration {
        /// The grant it had last.
        #[n(0)]
        held: Envelope,
    },
}

/// Grants as an issuer signed them.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SignedGrants {
    /// Of which mesh.
    #[n(0)]
    pub mesh: MeshId,
    /// One each.
    #[n(1)]
    pub grants: Vec<Envelope>,
}

impl InFile for SignedGrants {
    const LABEL: &'static str = "MESH SIGNED GRANTS";
}

/// A trust policy on its way to enough signatures.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PolicyProposal {
    /// The mesh as it is; without policies for the first one.
    #[n(0)]
    pub mesh: MeshFile,
    /// The [`TrustPolicy`](crate::record::TrustPolicy) after those, with the signatures it has so far.
    #[n(1)]
    pub proposal: Envelope,
}

impl InFile for PolicyProposal {
    const LABEL: &'static str = "MESH POLICY PROPOSAL";
}

/// A revocation, before or after its revoker signed it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RevocationFile {
    /// Of which mesh.
    #[n(0)]
    pub mesh: MeshId,
    /// The [`Revocation`](crate::record::Revocation).
    #[n(1)]
    pub revocation: Envelope,
}

impl InFile for RevocationFile {
    const LABEL: &'static str = "MESH REVOCATION";
}

/// What a signing machine has seen of a mesh, kept between uses. With it a stolen keyserver can neither show an older
/// policy nor have a grant signed that takes somebody's place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// The mesh, pinned at first use.
    pub mesh_id: MeshId,
    /// Newest policy seen.
    pub policy_version: u64,
    /// Its hash.
    pub policy: Hash,
    /// Highest serial signed.
    pub serial: u64,
    /// The identity keys signed last, of nodes that have replaced theirs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub identities: BTreeMap<NodeId, KeyId>,
}

/// What a file shows contradicts what this machine remembers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// Another mesh.
    #[error("the file is of mesh {got}, this key signs for mesh {held}")]
    OtherMesh {
        /// Remembered.
        held: MeshId,
        /// In the file.
        got: MeshId,
    },
    /// An older policy, or another one of the same version.
    #[error(
        "the file shows trust policy {got}, policy {held} was seen before and is not in it: is the keyserver's store old?"
    )]
    OlderPolicy {
        /// Remembered.
        held: u64,
        /// In the file.
        got: u64,
    },
    /// A serial that would win against grants signed before.
    #[error("grant of {name} has serial {got}, {held} was signed before: it could take another node's place")]
    OldSerial {
        /// Name in the grant.
        name: crate::id::Name,
        /// Remembered.
        held: u64,
        /// In the request.
        got: u64,
    },
    /// An identity key that the node has given up.
    #[error(
        "grant of {name} does not go on from identity key {}, which was signed before: is the keyserver's store old, or \
         does somebody else hold a key that the node had?",
        .held.short()
    )]
    OldIdentity {
        /// Name in the grant.
        name: crate::id::Name,
        /// Remembered.
        held: KeyId,
    },
}

impl Memory {
    /// Starts from a mesh whose id the operator has confirmed.
    #[must_use]
    pub fn first(view: &View) -> Self {
        let (policy_version, policy) = (view.policy().version, view.policy_hash());
        let (mesh_id, serial, identities) = (view.mesh(), serials_before(view), BTreeMap::new());
        Self { mesh_id, policy_version, policy, serial, identities }
    }

    /// Whether `view` is of this mesh and holds every policy seen before; remembers the newest.
    ///
    /// # Errors
    /// [`MemoryError::OtherMesh`], [`MemoryError::OlderPolicy`]; nothing changes then.
    pub fn see(&mut self, view: &View) -> Result<(), MemoryError> {
        if view.mesh() != self.mesh_id {
            return Err(MemoryError::OtherMesh { held: self.mesh_id, got: view.mesh() });
        }
        let same = view.policies().iter().find(|policy| policy.object.version == self.policy_version);
        if same.is_none_or(|policy| policy.hash != self.policy) {
            return Err(MemoryError::OlderPolicy { held: self.policy_version, got: view.policy().version });
        }
        (self.policy_version, self.policy) = (view.policy().version, view.policy_hash());
        self.serial = self.serial.max(serials_before(view));
        Ok(())
    }

    /// Whether a request may be signed after all that were; remembers its serial and the identity key of a node that has
    /// replaced its first. Requests come in the order of serials.
    ///
    /// # Errors
    /// [`MemoryError::OldSerial`], [`MemoryError::OldIdentity`]; nothing changes then.
    pub fn sign(&mut self, request: &GrantRequest) -> Result<(), MemoryError> {
        let grant = &request.grant;
        let held = self.identities.get(&grant.node).copied();
        if let Some(held) = held.filter(|held| grant.identities().all(|key| key.id() != *held)) {
            return Err(MemoryError::OldIdentity { name: grant.name.clone(), held });
        }
        // The others keep their serial, which is checked against the grant that they follow.
        if matches!(request.reason, GrantReason::Join { .. } | GrantReason::Restoration { .. }) {
            let (held, got) = (self.serial, grant.serial);
            if got <= held {
                return Err(MemoryError::OldSerial { name: grant.name.clone(), held, got });
            }
            self.serial = got;
        }
        if !grant.succession.is_empty() {
            self.identities.insert(grant.node, grant.identity.id());
        }
        Ok(())
    }
}

/// Serials that keys gave which issuers had before: their nodes' places are not to be taken.
fn serials_before(view: &View) -> u64 {
    let former = view.policy().issuers.iter().flat_map(|issuer| &issuer.former);
    former.map(|former| former.serial).max().unwrap_or(0)
}
