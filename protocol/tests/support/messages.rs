//! One of each control message.

use mesh_protocol::control::{JoinReply, JoinRequest, NodeMessage, Refusal, RefusalCode, ServerMessage};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Hash, Position};
use mesh_protocol::peer::{CheckpointHead, Heads, PeerMessage, Piece, RecordHead, Want};
use mesh_protocol::record::RevocationHead;

use super::*;

pub const EXPORTER: [u8; 32] = [0xee; 32];

fn sealed_checkpoint() -> Envelope {
    Envelope::seal(mesh(), &checkpoint(), &[&keyserver()])
}

fn refusal() -> Refusal {
    Refusal { code: RefusalCode::Taken, message: "10.1.1.0/24 of n2 overlaps 10.1.1.0/24 of n1".to_owned() }
}

pub fn join_replies() -> Vec<(&'static str, JoinReply)> {
    vec![
        ("offer", JoinReply::Offer { policies: vec![sealed_policy_1()] }),
        ("granted", JoinReply::Granted { grant: seal_grant(&grant(1)), checkpoint: sealed_checkpoint() }),
        ("refused", JoinReply::Refused { refusal: refusal() }),
        ("pending", JoinReply::Pending { until: NOW + 7 * 86_400 }),
    ]
}

pub fn join_requests() -> Vec<(&'static str, JoinRequest)> {
    let signature = claim().sign(&token_secret(), &EXPORTER);
    let shown = token().show(&EXPORTER);
    vec![
        ("enrol", JoinRequest::Enrol { claim: claim(), signature }),
        ("show", JoinRequest::Show { token: token().id(), signature: shown, limits: None }),
        ("show-limits", JoinRequest::Show { token: token().id(), signature: shown, limits: Some(token().limits) }),
    ]
}

pub fn node_messages() -> Vec<(&'static str, NodeMessage)> {
    let position = Position { epoch: 7, revision: 42 };
    let hello = |position| NodeMessage::Hello {
        mesh: mesh(),
        position,
        policy_version: 1,
        version: "0.1.0".to_owned(),
        grant: None,
    };
    vec![
        ("hello", hello(Some(position))),
        ("hello, from nothing", hello(None)),
        ("publish", NodeMessage::Publish { envelope: seal_record(1, &record(1)) }),
        ("applied", NodeMessage::Applied { position }),
        ("rotated", NodeMessage::Rotated { request: 5, epoch: Some(2), error: None }),
        ("rotated, not", NodeMessage::Rotated { request: 5, epoch: None, error: Some("disk full".to_owned()) }),
        ("pong", NodeMessage::Pong { nonce: 77 }),
        ("error", NodeMessage::Error { refusal: refusal() }),
        (
            "succeed",
            NodeMessage::Succeed {
                identity: succeeded(1, &[2]).identity,
                handover: succeeded(1, &[2]).succession.remove(0),
            },
        ),
        (
            "hello, with a grant",
            NodeMessage::Hello {
                mesh: mesh(),
                position: None,
                policy_version: 1,
                version: "0.1.0".to_owned(),
                grant: Some(seal_grant(&succeeded(1, &[2]))),
            },
        ),
    ]
}

pub fn server_messages() -> Vec<(&'static str, ServerMessage)> {
    let (from, to) = (Position { epoch: 7, revision: 42 }, Position { epoch: 7, revision: 44 });
    let live = Envelope::seal(mesh(), &endpoints(1), &[&identity(1)]);
    let items = vec![seal_grant(&grant(1)), seal_revocation(&revocation(9))];
    vec![
        (
            "welcome",
            ServerMessage::Welcome {
                checkpoint: sealed_checkpoint(),
                policies: vec![sealed_policy_1()],
                own_record: Some(seal_record(1, &record(1))),
                own_grant: seal_grant(&grant(1)),
                observed: "192.0.2.1:40000".parse().unwrap(),
            },
        ),
        ("items", ServerMessage::Items { from, to, items, checkpoint: Some(sealed_checkpoint()) }),
        ("live", ServerMessage::Live { items: vec![live] }),
        ("published", ServerMessage::Published { seq: 1, endpoints: false }),
        ("checkpoint", ServerMessage::Checkpoint { checkpoint: sealed_checkpoint() }),
        ("rotate", ServerMessage::Rotate { request: 5, force: true, after: Some(1) }),
        ("ping", ServerMessage::Ping { nonce: 77 }),
        ("error", ServerMessage::Error { refusal: refusal() }),
        ("replaced", ServerMessage::Replaced { node: node(1) }),
        (
            "succession",
            ServerMessage::Succession {
                identity: later_identity(1, 2).verify_key().id(),
                granted: true,
                refusal: None,
            },
        ),
        (
            "succession, not",
            ServerMessage::Succession {
                identity: later_identity(1, 2).verify_key().id(),
                granted: false,
                refusal: Some(refusal()),
            },
        ),
    ]
}

pub fn peer_messages() -> Vec<(&'static str, PeerMessage)> {
    let position = Position { epoch: 7, revision: 42 };
    let record = RecordHead { seq: 3, hash: Hash([3; 32]) };
    let revoker = keyserver().verify_key().id();
    let heads = Heads {
        policy_version: 1,
        policy: Hash([1; 32]),
        revocations: vec![RevocationHead { revoker, number: 2, hash: Hash([2; 32]) }],
        checkpoint: Some(CheckpointHead { position, state: Hash([4; 32]), time: 1_800_000_000 }),
        position: Some(position),
        generation: 1,
        own: record,
        yours: Some(record),
        cut_off: false,
        ask: true,
    };
    let want = Want::Revocation { revoker, number: 2 };
    let piece = Piece::of(b"an envelope", 0);
    vec![
        ("heads", PeerMessage::Heads { heads }),
        ("get", PeerMessage::Get { want, offset: 1024 }),
        ("part", PeerMessage::Part { want, offset: 0, piece }),
        ("part, not there", PeerMessage::Part { want: Want::Policy { version: 3 }, offset: 0, piece: None }),
        ("get members", PeerMessage::Get { want: Want::Members { after: Some(node(1)) }, offset: 0 }),
        ("get record", PeerMessage::Get { want: Want::Record { node: node(1) }, offset: 0 }),
    ]
}
