//! What a peer may fetch: what it could have from any keyserver, straight from the directory.

use mesh_protocol::cbor;
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::NodeId;
use mesh_protocol::peer::{
    CheckpointHead, Heads, MAX_HEADS, MAX_MEMBERS, MemberHead, MembersPage, Piece, RecordHead, Want,
};
use mesh_protocol::trust::Member;

use super::OwnWord;
use crate::directory::Directory;

/// How far this node is, told to `to`. Of more revokers' chains than fit, `turn` chooses; so it does between the newest
/// checkpoint and one that proves two worlds, which is shown three times out of four.
pub(super) fn heads(directory: &Directory, own: &OwnWord, to: NodeId, turn: usize, ask: bool) -> Heads {
    let view = directory.view();
    let mut chains = view.revocation_heads();
    if chains.len() > MAX_HEADS {
        let first = turn % chains.len();
        chains.rotate_left(first);
        chains.truncate(MAX_HEADS);
    }
    let proof = directory.proof().filter(|_| !turn.is_multiple_of(4));
    let checkpoint = proof.or_else(|| directory.newest_checkpoint()).map(|(checkpoint, _)| CheckpointHead {
        position: checkpoint.position,
        state: checkpoint.state,
        time: checkpoint.time,
    });
    Heads {
        policy_version: view.policy().version,
        policy: view.policy_hash(),
        revocations: chains,
        checkpoint,
        position: directory.position(),
        generation: own.generation,
        own: own.record,
        yours: view.member(to).and_then(record_head),
        cut_off: own.cut_off,
        ask,
    }
}

/// A member's record in short.
pub(super) fn record_head(member: &Member) -> Option<RecordHead> {
    let record = member.record.as_ref()?;
    Some(RecordHead { seq: record.object.seq, hash: record.hash })
}

/// The piece of an object that a peer asks for; `None` if it is not here.
pub(super) fn piece(directory: &Directory, want: Want, offset: u32) -> Option<Piece> {
    let bytes = match want {
        Want::Members { after } => cbor::to_vec(&page(directory, after)),
        want => cbor::to_vec(envelope(directory, want)?),
    };
    Piece::of(&bytes, offset)
}

fn envelope(directory: &Directory, want: Want) -> Option<&Envelope> {
    let view = directory.view();
    match want {
        Want::Policy { version } => {
            let found = view.policies().iter().find(|policy| policy.object.version == version)?;
            Some(&found.envelope)
        }
        Want::Revocation { revoker, number } => Some(&view.revocation(revoker, number)?.envelope),
        Want::Checkpoint { time } => {
            let proof = directory.proof().filter(|(proof, _)| proof.time == time);
            proof.or_else(|| directory.newest_checkpoint()).map(|(_, envelope)| envelope)
        }
        Want::Grant { node } => Some(&view.member(node)?.grant.envelope),
        Want::Record { node } => Some(&view.member(node)?.record.as_ref()?.envelope),
        Want::Endpoints { node } => Some(&view.member(node)?.endpoints_to_show()?.envelope),
        Want::Members { .. } => None,
    }
}

fn page(directory: &Directory, after: Option<NodeId>) -> MembersPage {
    let members = directory.view().members_after(after).take(MAX_MEMBERS);
    let head = |(node, member): (&NodeId, &Member)| MemberHead {
        node: *node,
        generation: member.grant.object.generation,
        seq: record_head(member).map_or(0, |record| record.seq),
    };
    MembersPage { members: members.map(head).collect() }
}
