//! Enrolment: one request on a connection of its own. The node shows that it holds the token, which tells a stranger
//! nothing, and asks once it has verified the policy chain from the token's pin.

use std::time::Duration;

use ipnet::IpNet;
use mesh_protocol::control::{ALPN_JOIN, JoinReply, JoinRequest, Refusal};
use mesh_protocol::envelope::{Envelope, Kind};
use mesh_protocol::id::Name;
use mesh_protocol::key::{SigningKey, VerifyKey};
use mesh_protocol::record::{Checkpoint, NodeGrant};
use mesh_protocol::tls::ServerKeys;
use mesh_protocol::token::{JoinClaim, JoinToken};
use mesh_protocol::trust::{CheckpointVerdict, TrustError, View, compare_checkpoints};
use tokio::time::timeout;

use super::connect::{ConnectError, Connection, Dialer, Transport};
use super::frames::{self, Frame, StreamError};

/// How long a keyserver may take for its offer, and for its answer: it writes to disk in between.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// How long the rest of a long policy chain may take, when what came so far does not do.
const MORE_WITHIN: Duration = Duration::from_secs(3);
/// Longest policy chain read: a policy for each change of clusters or keys. At most 32 KiB each.
const MOST_POLICIES: usize = 4096;

/// Enrolment failed. Unless said otherwise nothing was granted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum EnrolError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It broke.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// It is silent.
    #[error("the keyserver does not answer")]
    Silent,
    /// It said something that does not belong there.
    #[error("the keyserver sent {0}")]
    Unexpected(&'static str),
    /// Its trust policies do not follow from the token.
    #[error("the keyserver does not belong to the token's mesh: {0}")]
    OtherMesh(TrustError),
    /// Its newest policy is older than the token, or another one of the same version.
    #[error("the keyserver shows trust policy {shown}, the token was made under policy {pinned} or another one")]
    OtherPolicy {
        /// Newest version shown.
        shown: u64,
        /// The token's.
        pinned: u64,
    },
    /// It answers with a key that the policy does not name.
    #[error("the keyserver answers with key {0}, which the mesh's trust policy does not name")]
    UnknownKey(VerifyKey),
    /// It refused the request.
    #[error("the keyserver refused: {0}")]
    Refused(Refusal),
    /// What it granted is not for this node, or not by an issuer.
    #[error("the keyserver's grant is not valid: {0}")]
    BadGrant(String),
    /// It has forgotten what the token tells of. The grant was given, and is not used.
    #[error("STALE: the keyserver shows an older state than when the token was made: it was restored from a backup")]
    Stale,
}

/// What the keyserver says.
pub(crate) enum Answer {
    /// The node is in.
    Granted(Box<Enrolled>),
    /// It will be once its issuer has signed: ask again with the same token, name and CIDRs.
    Pending {
        /// Seconds since 1970 after which that is over.
        until: u64,
    },
}

/// What enrolment gives.
pub(crate) struct Enrolled {
    /// The policies, and the own grant.
    pub(crate) view: View,
    /// The own grant.
    pub(crate) grant: Envelope,
    /// The newest checkpoint.
    pub(crate) checkpoint: (Checkpoint, Envelope),
}

/// Asks the keyserver at `address` for a grant.
///
/// # Errors
/// [`EnrolError`].
pub(crate) async fn enrol(
    address: &str,
    token: &JoinToken,
    key: &SigningKey,
    name: &Name,
    pod_cidrs: &[IpNet],
    mark: u32,
) -> Result<Answer, EnrolError> {
    let dialer = Dialer { key: key.clone(), servers: ServerKeys::Any, alpn: ALPN_JOIN, mark };
    let mut connection = dialer.dial(address, Transport::Quic).await?;
    let limits = token.is_from(&connection.server).then(|| token.limits.clone());
    let shown = JoinRequest::Show { token: token.id(), signature: token.show(&connection.exporter), limits };
    frames::write(&mut connection.writer, &shown).await?;
    let mut view = read_offers(&mut connection, token).await?;
    let claim = JoinClaim {
        mesh: token.mesh,
        token: token.id(),
        identity: key.verify_key(),
        name: name.clone(),
        pod_cidrs: pod_cidrs.to_vec(),
    };
    let signature = claim.sign(&token.secret, &connection.exporter);
    frames::write(&mut connection.writer, &JoinRequest::Enrol { claim, signature }).await?;
    let (grant, checkpoint) = loop {
        match answer(&mut connection, ANSWER_WITHIN).await? {
            JoinReply::Granted { grant, checkpoint } => break (grant, checkpoint),
            JoinReply::Pending { until } => return Ok(Answer::Pending { until }),
            JoinReply::Refused { refusal } => return Err(EnrolError::Refused(refusal)),
            // The end of a long chain, which was not waited for.
            JoinReply::Offer { policies } => extend(&mut view, &policies)?,
        }
    };
    let checkpoint = check_granted(token, &mut view, key, &grant, &checkpoint)?;
    Ok(Answer::Granted(Box::new(Enrolled { view, grant, checkpoint })))
}

async fn answer(connection: &mut Connection, within: Duration) -> Result<JoinReply, EnrolError> {
    match timeout(within, frames::read(&mut connection.reader)).await {
        Err(_) => Err(EnrolError::Silent),
        Ok(Err(error)) => Err(error.into()),
        Ok(Ok(Frame::Unknown(_))) => Err(EnrolError::Unexpected("a message of a later version: upgrade meshd")),
        Ok(Ok(Frame::Known(JoinReply::Refused { refusal }))) => Err(EnrolError::Refused(refusal)),
        Ok(Ok(Frame::Known(reply))) => Ok(reply),
    }
}

/// Reads policies until everything holds that has to before the node says what it is and wants.
async fn read_offers(connection: &mut Connection, token: &JoinToken) -> Result<View, EnrolError> {
    let JoinReply::Offer { policies } = answer(connection, ANSWER_WITHIN).await? else {
        return Err(EnrolError::Unexpected("something else than its policies first"));
    };
    let mut view = View::pinned(token.mesh, &policies).map_err(EnrolError::OtherMesh)?;
    while let Err(error) = check_offer(token, &view, &connection.server) {
        // What is missing may be in the next piece of a long chain.
        match answer(connection, MORE_WITHIN).await {
            Ok(JoinReply::Offer { policies }) if !policies.is_empty() => extend(&mut view, &policies)?,
            _ => return Err(error),
        }
    }
    Ok(view)
}

fn extend(view: &mut View, policies: &[Envelope]) -> Result<(), EnrolError> {
    let longer = view.policies().len() + policies.len();
    if longer > MOST_POLICIES {
        return Err(EnrolError::Unexpected("more trust policies than a mesh has"));
    }
    let mut policies = policies.iter().filter(|envelope| envelope.kind() == Kind::TrustPolicy);
    policies.try_for_each(|policy| view.apply(policy).map(drop).map_err(EnrolError::OtherMesh))
}

fn check_offer(token: &JoinToken, view: &View, server: &VerifyKey) -> Result<(), EnrolError> {
    let pinned = view.policies().iter().find(|policy| policy.object.version == token.policy_version);
    if pinned.is_none_or(|pinned| pinned.hash != token.policy) {
        return Err(EnrolError::OtherPolicy { shown: view.policy().version, pinned: token.policy_version });
    }
    if view.policy().keyservers.contains(server) { Ok(()) } else { Err(EnrolError::UnknownKey(*server)) }
}

/// Everything that has to hold before the node believes its grant.
fn check_granted(
    token: &JoinToken,
    view: &mut View,
    key: &SigningKey,
    grant: &Envelope,
    checkpoint: &Envelope,
) -> Result<(Checkpoint, Envelope), EnrolError> {
    let bad = |error: TrustError| EnrolError::BadGrant(error.to_string());
    let said: NodeGrant = grant.unverified().map_err(|error| EnrolError::BadGrant(error.to_string()))?;
    if said.identity != key.verify_key() {
        return Err(EnrolError::BadGrant("it is for another node".to_owned()));
    }
    view.apply(grant).map_err(bad)?;
    let got = view.checkpoint(checkpoint).map_err(bad)?;
    // The token's own checkpoint may be signed by a key that a later policy has dropped.
    let keys: Vec<VerifyKey> = view.policies().iter().flat_map(|policy| policy.object.keyservers.clone()).collect();
    let held: Checkpoint = token.checkpoint.verified(token.mesh, &keys, 1).map_err(|error| bad(error.into()))?;
    match compare_checkpoints(&held, &got) {
        CheckpointVerdict::Newer => Ok((got, checkpoint.clone())),
        CheckpointVerdict::Stale | CheckpointVerdict::Equivocation => Err(EnrolError::Stale),
    }
}
