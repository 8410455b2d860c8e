//! The control task against a small keyserver of the test's own, over real QUIC and TLS on loopback, and the agent alone
//! with virtual time.

#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod issuer;
mod rotation;
mod succession;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_protocol::control::{
    ALPN_JOIN, ALPN_NODE, JoinReply, JoinRequest, NodeMessage, Refusal, RefusalCode, ServerMessage,
};
use mesh_protocol::envelope::{Envelope, Kind};
use mesh_protocol::id::Position;
use mesh_protocol::key::SigningKey;
use mesh_protocol::record::{Endpoints, NodeRecord};
use mesh_protocol::tls;
use mesh_protocol::token::{EXPORTER_LABEL, JoinToken, TokenLimits};
use tokio::io::{AsyncRead, AsyncWrite};

use super::agent::{Agent, Now};
use super::frames::{self, Frame};
use super::session::SessionEvent;
use super::*;
use crate::control::connect::Transport;
use crate::control::enrol::{EnrolError, enrol};
use crate::directory::alarm;
use crate::directory::tests::{START, World};
use crate::identity::tests::{Joined, joined};

const DEADLINE: Duration = Duration::from_secs(20);

fn setup(keyserver: &str) -> ControlSetup {
    let config = ControlConfig { keyservers: vec![keyserver.to_owned()], advertise: vec![] };
    ControlSetup { config, mark: 0, port: 7100, lanes: 2, keys: KeysConfig::default() }
}

fn now_at(start: Instant, seconds: u64) -> Now {
    Now { instant: start + Duration::from_secs(seconds), wall: START + seconds }
}

/// Node 1 with its directory stored, and an agent on them.
fn agent(joined: &mut Joined, start: Instant) -> Agent {
    let (mut directory, _) = directory_of(joined);
    directory.save(&joined.state).unwrap();
    reopened(joined, now_at(start, 0))
}

fn reopened(joined: &Joined, now: Now) -> Agent {
    let identity = Identity::open(&joined.state, 2).unwrap();
    let directory = Directory::open(&joined.state, &identity).unwrap();
    let host = HostFacts { underlay_addresses: vec!["192.0.2.1".parse().unwrap()], ..HostFacts::default() };
    Agent::new(setup("192.0.2.9:7443"), identity, directory, host, now)
}

fn directory_of(joined: &Joined) -> (Directory, Envelope) {
    let mut view = mesh_protocol::trust::View::pinned(joined.world.mesh, &joined.world.history[..1]).unwrap();
    view.apply(&joined.grant).unwrap();
    (Directory::new(view, World::node(1), None), joined.grant.clone())
}

fn welcome(joined: &Joined, own_record: Option<Envelope>, time: u64) -> SessionEvent {
    SessionEvent::Welcome {
        checkpoint: joined.world.checkpoint(time),
        policies: vec![],
        own_record,
        own_grant: joined.grant.clone(),
        observed: "198.51.100.1:5000".parse().unwrap(),
    }
}

fn drain(agent: &mut Agent) -> Vec<NodeMessage> {
    std::iter::from_fn(|| agent.poll_transmit()).collect()
}

fn published_records(messages: &[NodeMessage]) -> Vec<NodeRecord> {
    let records = messages.iter().filter_map(|message| match message {
        NodeMessage::Publish { envelope } if envelope.kind() == Kind::NodeRecord => Some(envelope),
        _ => None,
    });
    records.map(|envelope| envelope.unverified().unwrap()).collect()
}

fn names_of(report: &[RaisedAlarm]) -> Vec<&'static str> {
    report.iter().map(|alarm| alarm.name).collect()
}

#[test]
fn a_session_publishes_record_and_endpoints_and_answers_a_rotation() {
    let (mut joined, start) = (joined(), Instant::now());
    let mut agent = agent(&mut joined, start);
    assert!(matches!(agent.hello(), NodeMessage::Hello { position: None, .. }));
    agent.handle_event(welcome(&joined, None, START), now_at(start, 1)).unwrap();
    let first = drain(&mut agent);
    assert_eq!(published_records(&first)[0].seq, 1);
    let NodeMessage::Publish { envelope } = &first[1] else { panic!("{first:?}") };
    let endpoints: Endpoints = envelope.unverified().unwrap();
    let expected: Vec<SocketAddr> =
        ["192.0.2.1:7100", "198.51.100.1:7100"].iter().map(|text| text.parse().unwrap()).collect();
    assert_eq!(endpoints.candidates, expected);
    assert!(!agent.is_published());
    agent.handle_event(SessionEvent::Published { seq: 1, endpoints: false }, now_at(start, 1)).unwrap();
    assert!(agent.is_published());
    agent.handle_event(SessionEvent::Rotate { request: 5, force: false, after: Some(1) }, now_at(start, 2)).unwrap();
    let second = drain(&mut agent);
    assert_eq!((published_records(&second)[0].seq, published_records(&second)[0].current.epoch), (2, 2));
    assert_eq!(second[1], NodeMessage::Rotated { request: 5, epoch: Some(2), error: None });
    agent.handle_event(SessionEvent::Rotate { request: 5, force: false, after: Some(1) }, now_at(start, 2)).unwrap();
    assert_eq!(drain(&mut agent), [NodeMessage::Rotated { request: 5, epoch: Some(2), error: None }], "asked again");
    agent.handle_event(SessionEvent::Rotate { request: 6, force: true, after: Some(2) }, now_at(start, 2)).unwrap();
    let unpublished = drain(&mut agent);
    assert!(matches!(&unpublished[..], [NodeMessage::Rotated { epoch: None, error: Some(_), .. }]), "{unpublished:?}");
    agent.handle_event(SessionEvent::Published { seq: 2, endpoints: false }, now_at(start, 2)).unwrap();
    agent.handle_event(SessionEvent::Rotate { request: 6, force: false, after: Some(2) }, now_at(start, 3)).unwrap();
    let third = drain(&mut agent);
    assert!(matches!(&third[..], [NodeMessage::Rotated { request: 6, epoch: None, error: Some(_) }]), "{third:?}");
}

#[test]
fn a_gap_asks_for_everything_once() {
    let (mut joined, start) = (joined(), Instant::now());
    let mut agent = agent(&mut joined, start);
    agent.hello();
    agent.handle_event(welcome(&joined, None, START), now_at(start, 1)).unwrap();
    let (from, to) = (joined.world.position_at(5), joined.world.position_at(6));
    let stray = SessionEvent::Items { from, to, items: vec![], checkpoint: None };
    assert!(agent.handle_event(stray, now_at(start, 1)).is_err());
    agent.session_ended();
    assert!(matches!(agent.hello(), NodeMessage::Hello { position: None, .. }));
    let map = |joined: &Joined| SessionEvent::Items {
        from: joined.world.position_at(0),
        to: joined.world.position(),
        items: joined.world.history.clone(),
        checkpoint: Some(joined.world.checkpoint(START + 2)),
    };
    agent.handle_event(welcome(&joined, None, START), now_at(start, 2)).unwrap();
    agent.handle_event(map(&joined), now_at(start, 2)).unwrap();
    agent.session_ended();
    let held = joined.world.position();
    assert!(matches!(agent.hello(), NodeMessage::Hello { position: Some(position), .. } if position == held));
}

#[test]
fn exposure_closes_tunnels_after_its_running_time_and_a_checkpoint_opens_them() {
    let (mut joined, start) = (joined(), Instant::now());
    let mut agent = agent(&mut joined, start);
    let limit = agent.exposure_limit().as_secs();
    agent.handle_timeout(now_at(start, 3600));
    assert_eq!(names_of(&agent.directory().alarms().standing()), [alarm::UNCONFIRMED]);
    assert!(!agent.facts(now_at(start, limit - 1)).exposed);
    assert!(agent.facts(now_at(start, limit)).exposed);
    // Over a restart the time counts on.
    agent.note_runtime(None, now_at(start, limit - 10));
    agent.directory().save(&joined.state).unwrap();
    let mut agent = reopened(&joined, now_at(start, limit));
    assert!(!agent.facts(now_at(start, limit)).exposed);
    assert!(agent.facts(now_at(start, limit + 10)).exposed);
    agent.hello();
    agent.handle_event(welcome(&joined, None, START + limit), now_at(start, limit + 20)).unwrap();
    assert!(!agent.facts(now_at(start, limit + 20)).exposed);
    // The same checkpoint once more is no news.
    let event = SessionEvent::Checkpoint(joined.world.checkpoint(START + limit));
    agent.handle_event(event, now_at(start, 2 * limit)).unwrap();
    assert!(agent.facts(now_at(start, 2 * limit + 20)).exposed);
}

#[test]
fn a_clock_that_stepped_back_promotes_the_spare() {
    let (mut joined, start) = (joined(), Instant::now());
    let mut first = agent(&mut joined, start);
    first.note_runtime(None, now_at(start, 86_400));
    first.directory().save(&joined.state).unwrap();
    drop(first);
    let mut agent = reopened(&joined, now_at(start, 0));
    assert_eq!(agent.keys().current.0, 2);
    assert_eq!(names_of(&agent.directory().alarms().standing()), [alarm::CLOCK]);
    agent.note_runtime(None, now_at(start, 1));
    agent.directory().save(&joined.state).unwrap();
    assert_eq!(reopened(&joined, now_at(start, 2)).keys().current.0, 2);
}

#[test]
fn a_revoked_node_closes_its_tunnels() {
    let (mut joined, start) = (joined(), Instant::now());
    let mut agent = agent(&mut joined, start);
    agent.hello();
    agent.handle_event(welcome(&joined, None, START), now_at(start, 1)).unwrap();
    joined.world.revoke(1);
    let items = SessionEvent::Items {
        from: joined.world.position_at(0),
        to: joined.world.position(),
        items: joined.world.history.clone(),
        checkpoint: None,
    };
    agent.handle_event(items, now_at(start, 2)).unwrap();
    let facts = agent.facts(now_at(start, 2));
    assert!(facts.exposed);
    assert_eq!(facts.own.node, World::node(1));
}

/// One connection of the test's keyserver.
struct Peer {
    reader: Box<dyn AsyncRead + Send + Unpin>,
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    exporter: [u8; 32],
    _quic: Option<quinn::Connection>,
}

impl Peer {
    async fn read<T: mesh_protocol::frame::Message>(&mut self) -> T {
        let Frame::Known(message) = frames::read(&mut self.reader).await.unwrap() else { panic!("unknown message") };
        message
    }

    async fn write<T: mesh_protocol::frame::Message>(&mut self, message: &T) {
        frames::write(&mut self.writer, message).await.unwrap();
    }
}

/// Listens on one transport only, so that the other one's fallback is exercised too.
enum Listener {
    Quic(quinn::Endpoint),
    Tls(tokio::net::TcpListener, tokio_rustls::TlsAcceptor),
}

impl Listener {
    async fn start(transport: Transport, key: &SigningKey) -> (Self, String) {
        let config = tls::server(key, &[ALPN_JOIN, ALPN_NODE]).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        match transport {
            Transport::Quic => {
                let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(config).unwrap();
                let server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
                let endpoint = quinn::Endpoint::server(server, any).unwrap();
                let address = endpoint.local_addr().unwrap().to_string();
                (Self::Quic(endpoint), address)
            }
            Transport::Tls => {
                let listener = tokio::net::TcpListener::bind(any).await.unwrap();
                let address = listener.local_addr().unwrap().to_string();
                (Self::Tls(listener, tokio_rustls::TlsAcceptor::from(Arc::new(config))), address)
            }
        }
    }

    /// Takes the next connection; on QUIC the node opens the stream.
    async fn accept(&self) -> Peer {
        match self {
            Self::Quic(endpoint) => {
                let connection = endpoint.accept().await.unwrap().await.unwrap();
                let (send, receive) = connection.accept_bi().await.unwrap();
                let mut exporter = [0; 32];
                connection.export_keying_material(&mut exporter, EXPORTER_LABEL, b"").unwrap();
                let (reader, writer) = (Box::new(receive), Box::new(send));
                Peer { reader, writer, exporter, _quic: Some(connection) }
            }
            Self::Tls(listener, acceptor) => {
                let (stream, _) = listener.accept().await.unwrap();
                let stream = acceptor.accept(stream).await.unwrap();
                let session = stream.get_ref().1;
                let exporter = session.export_keying_material([0; 32], EXPORTER_LABEL, Some(b"")).unwrap();
                let (reader, writer) = tokio::io::split(stream);
                Peer { reader: Box::new(reader), writer: Box::new(writer), exporter, _quic: None }
            }
        }
    }
}

async fn a_session_over(transport: Transport) {
    let mut joined = joined();
    let (mut directory, _) = directory_of(&joined);
    directory.save(&joined.state).unwrap();
    let (listener, address) = Listener::start(transport, &World::key()).await;
    let identity = Identity::open(&joined.state, 2).unwrap();
    let directory = Directory::open(&joined.state, &identity).unwrap();
    let mut handle = start(setup(&address), identity, directory, HostFacts::default(), None);
    assert!(handle.facts.borrow().peers.is_empty());

    let mut peer = listener.accept().await;
    assert!(matches!(peer.read::<NodeMessage>().await, NodeMessage::Hello { position: None, .. }));
    let grant = joined.world.grant(2, 1);
    joined.world.record(2, 1, &grant);
    let observed = "127.0.0.1:5000".parse().unwrap();
    let (checkpoint, own_grant) = (joined.world.checkpoint(START), joined.grant.clone());
    peer.write(&ServerMessage::Welcome { checkpoint, policies: vec![], own_record: None, own_grant, observed }).await;
    let NodeMessage::Publish { envelope } = peer.read().await else { panic!("a record was expected") };
    assert_eq!(envelope.unverified::<NodeRecord>().unwrap().seq, 1);
    let (from, to) = (joined.world.position_at(0), joined.world.position());
    let (items, checkpoint) = (joined.world.history.clone(), Some(joined.world.checkpoint(START + 1)));
    peer.write(&ServerMessage::Items { from, to, items, checkpoint }).await;
    peer.write(&ServerMessage::Published { seq: 1, endpoints: false }).await;

    let facts = handle.facts.wait_for(|facts| facts.peers.len() == 1).await.unwrap().clone();
    assert_eq!(facts.position, joined.world.position());
    let report = handle.report.wait_for(|report| report.published).await.unwrap().clone();
    assert_eq!(report.transport, Some(transport.as_str()));
    handle.applied(facts.position);
    handle.peer_active(vec![facts.peers[0].number]);
    assert_eq!(handle.rotate(false).await, Ok(2));
    assert_eq!(handle.keys.borrow().current.0, 2);
    let (mut applied, mut rotated) = (false, false);
    while !(applied && rotated) {
        match peer.read().await {
            NodeMessage::Applied { position } => applied = position == facts.position,
            NodeMessage::Publish { envelope } if envelope.kind() == Kind::NodeRecord => {
                rotated = envelope.unverified::<NodeRecord>().unwrap().seq == 2;
            }
            _ => {}
        }
    }
    handle.stop().await.unwrap();
    drop(peer);

    // With the keyserver down everything is there at once.
    let identity = Identity::open(&joined.state, 2).unwrap();
    let directory = Directory::open(&joined.state, &identity).unwrap();
    let again = start(setup("127.0.0.1:9"), identity, directory, HostFacts::default(), None);
    assert_eq!(again.facts.borrow().peers.len(), 1);
    assert_eq!(again.keys.borrow().current.0, 2);
    assert_eq!(again.recently_active(), [again.facts.borrow().peers[0].number]);
    again.stop().await.unwrap();
}

#[tokio::test]
async fn a_session_over_quic() {
    tokio::time::timeout(DEADLINE, a_session_over(Transport::Quic)).await.unwrap();
}

#[tokio::test]
async fn a_session_over_tls_where_udp_is_blocked() {
    tokio::time::timeout(DEADLINE, a_session_over(Transport::Tls)).await.unwrap();
}

fn token(world: &World, address: &str) -> JoinToken {
    let secret = SigningKey::from_seed([77; 32]);
    let limits = TokenLimits {
        key: secret.verify_key(),
        uses: 1,
        expires: START + 60,
        cluster: "east".parse().unwrap(),
        cidrs: vec![],
        tags: vec![],
        issued: Some(START),
    };
    JoinToken {
        mesh: world.mesh,
        policy_version: 1,
        policy: world.history[0].hash(mesh_protocol::envelope::NO_MESH),
        keyservers: vec![address.to_owned()],
        checkpoint: world.checkpoint(START),
        limits: Envelope::seal(world.mesh, &limits, &[&World::key()]),
        secret,
    }
}

/// Lets node 4 ask, and answers with what `reply` makes.
async fn enrolment(server_key: SigningKey, world: &World, reply: Option<JoinReply>) -> Result<(), EnrolError> {
    let (listener, address) = Listener::start(Transport::Quic, &server_key).await;
    let token = token(world, &address);
    let policies = vec![world.history[0].clone()];
    let server = async {
        let mut peer = listener.accept().await;
        let JoinRequest::Show { token: shown, signature, limits } = peer.read().await else { panic!("no token") };
        let of_token: TokenLimits = token.limits.unverified().unwrap();
        of_token.verify_shown(&peer.exporter, &signature).unwrap();
        assert_eq!((shown, limits.is_some()), (token.id(), server_key.verify_key() == World::key().verify_key()));
        peer.write(&JoinReply::Offer { policies }).await;
        let Some(reply) = reply else {
            // It must not hear anything.
            let heard = frames::read::<JoinRequest>(&mut peer.reader).await;
            assert!(heard.is_err());
            return;
        };
        let JoinRequest::Enrol { claim, signature } = peer.read().await else { panic!("no request") };
        claim.verify(&token.secret.verify_key(), &peer.exporter, &signature).unwrap();
        peer.write(&reply).await;
        let _ = frames::read::<JoinRequest>(&mut peer.reader).await;
    };
    let (key, name) = (World::identity_key(4), "n4".parse().unwrap());
    let (result, ()) = tokio::join!(enrol(&address, &token, &key, &name, &[], 0), server);
    result.map(drop)
}

#[tokio::test]
async fn enrolment_verifies_before_it_speaks_and_before_it_believes() {
    let mut world = World::new();
    let old_position = Position { revision: 0, ..world.position() };
    let grant = world.grant(4, 1);
    let foreign = world.grant(5, 1);
    let granted = |grant: &Envelope, checkpoint: &Envelope| {
        Some(JoinReply::Granted { grant: grant.clone(), checkpoint: checkpoint.clone() })
    };
    enrolment(World::key(), &world, granted(&grant, &world.checkpoint(START + 1))).await.unwrap();
    let other = enrolment(World::identity_key(50), &world, None).await;
    assert!(matches!(other, Err(EnrolError::UnknownKey(_))), "{other:?}");
    let wrong = enrolment(World::key(), &world, granted(&foreign, &world.checkpoint(START))).await;
    assert!(matches!(wrong, Err(EnrolError::BadGrant(_))), "{wrong:?}");
    let old = world.checkpoint_with(old_position, mesh_protocol::id::Hash([0; 32]), START);
    let stale = enrolment(World::key(), &world, granted(&grant, &old)).await;
    assert!(matches!(stale, Err(EnrolError::Stale)), "{stale:?}");
    let refusal = Refusal { code: RefusalCode::Token, message: "used up".to_owned() };
    let refused = enrolment(World::key(), &world, Some(JoinReply::Refused { refusal })).await;
    assert!(matches!(refused, Err(EnrolError::Refused(_))), "{refused:?}");
}
