//! The vectors in `testdata/`: made again, compared byte for byte, and decoded.
//!
//! A released format never changes: a difference here is a break. Only for a new format, set `MESH_WRITE_VECTORS=1`.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use mesh_protocol::cbor;
use mesh_protocol::envelope::{Envelope, NO_MESH, Signed};
use mesh_protocol::frame::{self, Message};
use mesh_protocol::id::MeshId;
use mesh_protocol::key::SigningKey;
use mesh_protocol::offer::{Agreement, CIPHERTEXT_BYTES, Direction, Offer, OfferKeys, PresharedSecret, SharedSecret};
use mesh_protocol::offline::{
    GrantReason, GrantRequest, GrantRequests, InFile, MeshFile, PolicyProposal, Reached, SignedGrants,
};
use mesh_protocol::record::{Checkpoint, Endpoints, NodeGrant, NodeRecord, Revocation, TrustPolicy};
use mesh_protocol::token::{JoinToken, TokenLimits};
use serde_json::{Value, json};
use support::*;

fn compare(file: &str, made: &Value) {
    let path = format!("{}/testdata/{file}", env!("CARGO_MANIFEST_DIR"));
    let text = format!("{made:#}\n");
    if std::env::var_os("MESH_WRITE_VECTORS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "{file}");
}

fn object<T: Signed + PartialEq + std::fmt::Debug>(under: MeshId, object: &T, signer: &SigningKey) -> Value {
    let envelope = Envelope::seal(under, object, &[signer]);
    let bytes = cbor::to_vec(&envelope);
    let again: Envelope = cbor::from_slice(&bytes).unwrap();
    assert_eq!(&again.verified::<T>(under, &[signer.verify_key()], 1).unwrap(), object);
    json!({
        "kind": T::KIND.number(),
        "format": T::FORMAT,
        "signed_under_mesh": under.to_string(),
        "seed": hex::encode(*signer.seed()),
        "public_key": hex::encode(signer.verify_key().as_bytes()),
        "key_id": signer.verify_key().id().to_string(),
        "payload": hex::encode(envelope.payload()),
        "envelope": hex::encode(&bytes),
        "hash": envelope.hash(under).to_string(),
    })
}

#[test]
fn signed_objects() {
    compare(
        "objects.json",
        &json!({
            "mesh_id": mesh().to_string(),
            "trust-policy": object::<TrustPolicy>(NO_MESH, &policy_1(), &root()),
            "trust-policy-2": object::<TrustPolicy>(mesh(), &policy_2(), &root()),
            "node-grant": object::<NodeGrant>(mesh(), &grant(1), &issuer()),
            "node-grant-of-a-later-key": object::<NodeGrant>(mesh(), &succeeded(1, &[2, 3]), &issuer()),
            "node-record": object::<NodeRecord>(mesh(), &record(1), &identity(1)),
            "endpoints": object::<Endpoints>(mesh(), &endpoints(1), &identity(1)),
            "revocation": object::<Revocation>(mesh(), &revocation(9), &revoker()),
            "checkpoint": object::<Checkpoint>(mesh(), &checkpoint(), &keyserver()),
            "token-limits": object::<TokenLimits>(mesh(), &limits(), &issuer()),
        }),
    );
}

#[test]
fn ids_and_addresses() {
    let identity = identity(1).verify_key();
    compare(
        "ids.json",
        &json!({
            "mesh_id": mesh().to_string(),
            "identity_key": hex::encode(identity.as_bytes()),
            "node_id": identity.node_id().to_string(),
            "key_id": identity.id().to_string(),
            "token_key": hex::encode(token_secret().verify_key().as_bytes()),
            "token_id": limits().id().to_string(),
            "mesh_prefix": mesh_protocol::address::mesh_prefix(mesh()).to_string(),
            "node_pool_v6": mesh_protocol::address::node_pool_v6(mesh()).to_string(),
            "node_v6": mesh_protocol::address::mesh_v6(mesh(), identity.node_id()).to_string(),
            "cluster_1_pool_v6": mesh_protocol::address::cluster_pool_v6(mesh(), 1).to_string(),
            "next_state": mesh_protocol::trust::next_state(
                mesh_protocol::id::Hash([0; 32]),
                seal_grant(&grant(1)).hash(mesh()),
            ).to_string(),
        }),
    );
}

#[test]
fn join_token() {
    let line = token().to_line();
    assert_eq!(line.parse::<JoinToken>().unwrap().to_line(), line);
    compare(
        "token.json",
        &json!({
            "line": *line,
            "seed": hex::encode(*token().secret.seed()),
            "token_id": token().id().to_string(),
            "policy_hash": token().policy.to_string(),
            "claim": hex::encode(cbor::to_vec(&claim())),
            "exporter": hex::encode(messages::EXPORTER),
            "claim_signature": hex::encode(claim().sign(&token_secret(), &messages::EXPORTER)),
        }),
    );
}

#[test]
fn key_offers() {
    let (initiator, responder) = (tunnel_secret(1, 1), tunnel_secret(2, 2));
    let direction = Direction {
        mesh: mesh(),
        initiator: (identity(1).verify_key().node_id(), initiator.public()),
        responder: (identity(2).verify_key().node_id(), responder.public()),
    };
    let shared = SharedSecret::agree(&initiator, &responder.public());
    let (day, lanes) = (20_000, (1, 0));
    let offer = Offer {
        number: 1_728_000_000_000_001,
        initiator_epoch: 1,
        responder_epoch: 2,
        kem_epoch: 3,
        indices: vec![0x00_0102, 0x20_0304],
        ciphertext: Box::new([9; CIPHERTEXT_BYTES]),
    };
    let datagram = offer.seal(&OfferKeys::new(&shared, &direction), day);
    let kem = record(2).kem.key;
    let agreement = Agreement { direction, kem: &kem, ciphertext: &offer.ciphertext };
    let kem_secret = [0x11; 32];
    let preshared = agreement.preshared_key(&PresharedSecret::new(kem_secret), lanes);
    compare(
        "offer.json",
        &json!({
            "mesh_id": mesh().to_string(),
            "initiator": direction.initiator.0.to_string(),
            "initiator_secret": hex::encode(*initiator.bytes()),
            "responder": direction.responder.0.to_string(),
            "responder_secret": hex::encode(*responder.bytes()),
            "responder_kem_key": hex::encode(kem.as_bytes()),
            "day": day,
            "offer": hex::encode(datagram.as_slice()),
            "kem_secret": hex::encode(kem_secret),
            "initiator_lane": lanes.0,
            "responder_lane": lanes.1,
            "preshared_key": hex::encode(*preshared),
        }),
    );
}

fn frames<T: Message + PartialEq + std::fmt::Debug>(messages: Vec<(&str, T)>) -> Value {
    let one = |(name, message): (&str, T)| {
        let frame = frame::encode(&message).unwrap();
        let (length, body) = frame.split_first_chunk::<4>().unwrap();
        assert_eq!(frame::message_length(*length), Ok(body.len()));
        assert_eq!(frame::decode::<T>(body).unwrap(), message);
        json!({ "message": name, "frame": hex::encode(&frame) })
    };
    Value::Array(messages.into_iter().map(one).collect())
}

#[test]
fn files_for_machines_without_a_network() {
    let mesh_file = MeshFile {
        mesh: mesh(),
        policies: vec![sealed_policy_1()],
        checkpoint: Some(token().checkpoint),
        keyservers: token().keyservers,
        reached: None,
    };
    let signature = claim().sign(&token_secret(), &messages::EXPORTER);
    let (claim, exporter, limits) = (claim(), messages::EXPORTER, token().limits);
    let join = GrantReason::Join { claim, exporter, signature, limits };
    let renewal = GrantReason::Renewal { held: seal_grant(&grant(1)) };
    let request = |reason| GrantRequest { grant: grant(1), reason, until: NOW };
    let succession = GrantReason::Succession { held: seal_grant(&grant(1)) };
    let succession = GrantRequest { grant: succeeded(1, &[2]), reason: succession, until: NOW };
    let restoration = GrantReason::Restoration { held: seal_grant(&grant(1)) };
    let lifts = Some(sealed_policy_1().hash(mesh()));
    let restored = NodeGrant { generation: 2, serial: 9, lifts, ..grant(1) };
    let restoration = GrantRequest { grant: restored, reason: restoration, until: NOW };
    let restorations = GrantRequests { mesh: mesh_file.clone(), requests: vec![restoration] };
    let requests = GrantRequests { mesh: mesh_file.clone(), requests: vec![request(join), request(renewal)] };
    let successions = GrantRequests { mesh: mesh_file.clone(), requests: vec![succession] };
    let grants = SignedGrants { mesh: mesh(), grants: vec![seal_grant(&grant(1))] };
    let proposal = PolicyProposal { mesh: mesh_file.clone(), proposal: sealed_policy_1() };
    fn text<T: InFile + PartialEq + std::fmt::Debug>(file: &T) -> String {
        assert_eq!(T::from_text(&file.to_text()).as_ref(), Ok(file));
        file.to_text()
    }
    compare(
        "offline.json",
        &json!({
            "mesh": text(&mesh_file),
            "mesh-reached": text(&MeshFile { reached: Some(Reached { generation: 3, serial: 41 }), ..mesh_file.clone() }),
            "grant-requests": text(&requests),
            "grant-requests-of-a-later-key": text(&successions),
            "grant-requests-of-a-revoked-node": text(&restorations),
            "signed-grants": text(&grants),
            "policy-proposal": text(&proposal),
        }),
    );
}

#[test]
fn control_frames() {
    compare(
        "frames.json",
        &json!({
            "join-request": frames(messages::join_requests()),
            "join-reply": frames(messages::join_replies()),
            "node": frames(messages::node_messages()),
            "keyserver": frames(messages::server_messages()),
            "peer": frames(messages::peer_messages()),
        }),
    );
}
