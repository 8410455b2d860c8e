//! What only shows from inside: renewals, queues that overflow, evidence.
#![allow(clippy::unwrap_used, reason = "tests")]

mod issuer;
mod post_quantum;
mod rotation;
mod succession;
mod waiting;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_protocol::address::mesh_v6;
use mesh_protocol::envelope::{Envelope, Kind};
use mesh_protocol::key::{KEM_PUBLIC_BYTES, KemPublic, SigningKey, TunnelSecret};
use mesh_protocol::record::{EpochKey, KemKey, NodeGrant, NodeRecord, PostQuantum};

use super::cluster::ClusterRequest;
use super::token::TokenRequest;
use super::*;
use crate::init::{NewMesh, init};
use crate::store::{Embedded, Range};

const DAY: u64 = 86_400;

struct Fixture {
    directory: Directory,
    node: SigningKey,
    _folder: tempfile::TempDir,
}

/// A directory with one member whose grant is `age` old.
fn directory(age: u64) -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("ks");
    let new = NewMesh {
        dir: dir.clone(),
        name: "test".parse().unwrap(),
        address: "localhost:7443".into(),
        mesh_cidr: "100.96.0.0/16".parse().unwrap(),
        exposure: Duration::from_secs(7 * DAY),
        pq: PostQuantum::Off,
        elsewhere: None,
    };
    init(&new).unwrap();
    let settings = Settings { addresses: vec![new.address], grant_life: Duration::from_secs(90 * DAY) };
    let store = Embedded::open(&dir.join("store.redb")).unwrap();
    let keys = Keys::load(&dir.join("keys")).unwrap();
    let (metrics, _) = Metrics::new();
    let mut directory =
        Directory::load(Box::new(store), keys, settings, WatermarkFile::in_dir(&dir), Arc::clone(&metrics)).unwrap();
    let cluster = "east".parse().unwrap();
    let pod_cidrs = vec!["10.1.0.0/16".parse().unwrap()];
    directory.add_cluster(ClusterRequest { cluster, pod_cidrs, node_prefix: None, node_prefix6: None }).unwrap();
    let node = crate::keys::generate().unwrap();
    let id = node.verify_key().node_id();
    let issued = unix_now() - age;
    let grant = NodeGrant {
        node: id,
        identity: node.verify_key(),
        generation: 1,
        name: "n1".parse().unwrap(),
        cluster: "east".parse().unwrap(),
        route_group: None,
        mesh_v4: "100.96.0.1".parse().unwrap(),
        mesh_v6: mesh_v6(directory.mesh(), id),
        pod_cidrs: vec!["10.1.0.0/24".parse().unwrap()],
        tags: Vec::new(),
        pq: PostQuantum::Off,
        serial: 1,
        issued,
        expires: issued + 90 * DAY,
        lifts: None,
        external: false,
        succession: Vec::new(),
    };
    let envelope = directory.seal_grant(&grant).unwrap();
    directory.change(&envelope, Vec::new(), Vec::new()).unwrap();
    Fixture { directory, node, _folder: folder }
}

fn record(fixture: &Fixture, lanes: u8) -> Envelope {
    let node = fixture.node.verify_key().node_id();
    let key = |byte: u8| EpochKey { epoch: byte.into(), key: TunnelSecret::from_bytes([byte; 32]).public() };
    let record = NodeRecord {
        node,
        seq: 1,
        grant: fixture.directory.view().member(node).unwrap().grant.hash,
        current: key(1),
        previous: None,
        spare: key(2),
        kem: KemKey { epoch: 1, key: KemPublic::from_bytes(&[3; KEM_PUBLIC_BYTES]).unwrap() },
        lanes,
        departed: false,
        before: None,
    };
    Envelope::seal(fixture.directory.mesh(), &record, &[&fixture.node])
}

fn hello(directory: &Directory) -> Hello {
    let identity = directory.view().members().next().unwrap().1.grant.object.identity;
    Hello { identity, mesh: directory.mesh(), position: None, policy_version: 1 }
}

fn peer() -> SocketAddr {
    "192.0.2.1:1".parse().unwrap()
}

#[test]
fn a_grant_is_renewed_after_two_thirds_of_its_life_and_keeps_its_addresses() {
    for (age, renewed) in [(59 * DAY, false), (61 * DAY, true), (100 * DAY, true)] {
        let mut fixture = directory(age);
        let node = fixture.node.verify_key().node_id();
        let said = record(&fixture, 1);
        fixture.directory.publish(node, &said).unwrap();
        let before = fixture.directory.view().member(node).unwrap().grant.object.clone();
        fixture.directory.open_session(node, peer(), &hello(&fixture.directory)).unwrap();
        let member = fixture.directory.view().member(node).unwrap();
        let after = &member.grant.object;
        assert_eq!(after.generation == 2, renewed, "{age} s old");
        assert_eq!((&after.pod_cidrs, after.mesh_v4), (&before.pod_cidrs, before.mesh_v4));
        assert_eq!(after.expires > before.expires, renewed);
        assert!(member.record.is_some(), "what the node said stays good");
    }
}

#[test]
fn the_timer_renews_grants_of_nodes_that_are_away() {
    let mut fixture = directory(70 * DAY);
    fixture.directory.renew_grants();
    assert_eq!(fixture.directory.list_nodes()[0].generation, 2);
}

#[test]
fn a_session_that_does_not_read_is_closed() {
    let mut fixture = directory(0);
    let node = fixture.node.verify_key().node_id();
    let hello = hello(&fixture.directory);
    let mut opening = fixture.directory.open_session(node, peer(), &hello).unwrap();
    let checkpoint = fixture.directory.checkpoint();
    for _ in 0..2_000 {
        fixture.directory.hub.send_checkpoint(&checkpoint);
    }
    assert!(!fixture.directory.is_current(opening.key));
    let mut queued = 0;
    while opening.rest.try_recv().is_ok() {
        queued += 1;
    }
    assert_eq!(queued, 1_024, "bounded, and nothing after the gap");
}

#[test]
fn both_truths_of_a_node_are_kept_as_evidence() {
    let mut fixture = directory(0);
    let node = fixture.node.verify_key().node_id();
    let (first, second) = (record(&fixture, 1), record(&fixture, 2));
    fixture.directory.publish(node, &first).unwrap();
    fixture.directory.publish(node, &second).unwrap_err();
    let kept = fixture.directory.store.range(&Range::prefix(layout::EVIDENCE), None, 9).unwrap();
    let both: Vec<Envelope> = mesh_protocol::cbor::from_slice(&kept[0].value).unwrap();
    assert_eq!(both, [first, second]);
    assert_eq!(fixture.directory.metrics.equivocations.get(), 1);
    assert_eq!(fixture.directory.status().alarms.len(), 1);
}

#[test]
fn checkpoints_hash_the_history() {
    let mut fixture = directory(0);
    let first = fixture.directory.checkpoint();
    assert_eq!(fixture.directory.checkpoint(), first, "signed once");
    let said = record(&fixture, 1);
    fixture.directory.publish(fixture.node.verify_key().node_id(), &said).unwrap();
    let before = fixture.directory.view().checkpoint(&first).unwrap();
    let second = fixture.directory.checkpoint();
    let after = fixture.directory.view().checkpoint(&second).unwrap();
    assert_eq!(after.position.revision, before.position.revision + 1);
    let mesh = fixture.directory.mesh();
    assert_eq!(after.state, mesh_protocol::trust::next_state(before.state, said.hash(mesh)));
}

#[test]
fn a_token_that_no_node_could_read_is_not_made() {
    let mut fixture = directory(0);
    let directory = &mut fixture.directory;
    let tag = |at: usize| format!("{at:0>63}").parse().unwrap();
    let cidr = |at: usize| format!("10.1.{at}.0/24").parse().unwrap();
    let request = |tags: usize| TokenRequest {
        cluster: "east".parse().unwrap(),
        uses: 1,
        ttl: 60,
        cidrs: (0..64).map(cidr).collect(),
        tags: (0..tags).map(tag).collect(),
    };
    directory.settings.addresses = (0..8).map(|at| format!("{at:0>253}:7443")).collect();
    let revision = directory.position();
    let refused = directory.create_token(request(64)).unwrap_err();
    assert!(refused.code == RefusalCode::BadMessage && refused.message.contains("fewer"), "{refused}");
    assert_eq!(directory.position(), revision, "its tags are not in the policy");
    assert!(directory.list_tokens().unwrap().is_empty());
    // The most that is made can be read.
    let most = (0..64).rev().find_map(|tags| directory.create_token(request(tags)).ok());
    let (line, _) = most.unwrap();
    assert!(line.parse::<mesh_protocol::token::JoinToken>().is_ok() && line.len() > 7_000, "{}", line.len());
}

#[test]
fn offers_fit_frames_however_many_clusters_there_are() {
    let mut fixture = directory(0);
    for at in 0..70 {
        let pod_cidrs = vec![format!("10.{}.0.0/16", at + 2).parse().unwrap()];
        let cluster = format!("c{at}").parse().unwrap();
        let request = ClusterRequest { cluster, pod_cidrs, node_prefix: None, node_prefix6: None };
        fixture.directory.add_cluster(request).unwrap();
    }
    let offer = fixture.directory.offer();
    assert!(offer.len() > 1 && Arc::ptr_eq(&offer, &fixture.directory.offer()), "made once, in several frames");
    assert!(offer.iter().all(|frame| frame.len() <= mesh_protocol::frame::MAX_MESSAGE_BYTES + 4));
}

/// A record with a field that this version does not know.
struct Padded(Vec<u8>);

impl<C> minicbor::Encode<C> for Padded {
    fn encode<W: minicbor::encode::Write>(
        &self,
        encoder: &mut minicbor::Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        encoder.writer_mut().write_all(&self.0).map_err(minicbor::encode::Error::write)
    }
}

impl<C> minicbor::Decode<'_, C> for Padded {
    fn decode(_: &mut minicbor::Decoder<'_>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
        Err(minicbor::decode::Error::message("only written"))
    }
}

impl mesh_protocol::envelope::Signed for Padded {
    const KIND: Kind = Kind::NodeRecord;
}

#[test]
fn a_welcome_fits_its_frame_whatever_the_node_said_and_missed() {
    let mut fixture = directory(0);
    let node = fixture.node.verify_key().node_id();
    let mut padded = record(&fixture, 1).payload().to_vec();
    padded[0] += 1;
    padded.push(20);
    padded.extend(mesh_protocol::cbor::to_vec(&minicbor::bytes::ByteVec::from(vec![7; 30_000])));
    let padded = Envelope::seal(fixture.directory.mesh(), &Padded(padded), &[&fixture.node]);
    fixture.directory.publish(node, &padded).unwrap();
    for at in 0..70 {
        let pod_cidrs = vec![format!("10.{}.0.0/16", at + 2).parse().unwrap()];
        let cluster = format!("c{at}").parse().unwrap();
        let request = ClusterRequest { cluster, pod_cidrs, node_prefix: None, node_prefix6: None };
        fixture.directory.add_cluster(request).unwrap();
    }
    let hello = hello(&fixture.directory);
    let opening = fixture.directory.open_session(node, peer(), &hello).unwrap();
    let most = mesh_protocol::frame::MAX_MESSAGE_BYTES + 4;
    assert!(opening.first.iter().all(|frame| frame.len() <= most));
    let items: usize = opening.first.iter().map(|frame| frame.len()).sum();
    assert!(items > 2 * most, "more policies than one frame holds");
}
