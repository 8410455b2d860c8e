//! A node as the keyserver sees it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mesh_protocol::control::{ALPN_JOIN, ALPN_NODE, JoinReply, JoinRequest, NodeMessage, Refusal, ServerMessage};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::frame::{self, Message};
use mesh_protocol::id::{MeshId, NodeId, Position};
use mesh_protocol::key::{KEM_PUBLIC_BYTES, KemPublic, SigningKey, TunnelSecret};
use mesh_protocol::record::{Checkpoint, Endpoints, EpochKey, KemKey, NodeGrant, NodeRecord};
use mesh_protocol::tls::{self, ServerKeys};
use mesh_protocol::token::{EXPORTER_LABEL, JoinClaim, JoinToken};
use mesh_protocol::trust::View;
use quinn::crypto::rustls::QuicClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpSocket;
use tokio::time::timeout;

use crate::server::{DEADLINE, nets};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Quic,
    Tls,
}

pub struct Stream {
    pub reader: Box<dyn AsyncRead + Send + Unpin>,
    pub writer: Box<dyn AsyncWrite + Send + Unpin>,
    pub exporter: [u8; 32],
    _quic: Option<(quinn::Endpoint, quinn::Connection)>,
}

impl Stream {
    pub async fn send<T: Message>(&mut self, message: &T) {
        self.writer.write_all(&frame::encode(message).unwrap()).await.unwrap();
        self.writer.flush().await.unwrap();
    }

    /// The next message; `None` when the stream ends.
    pub async fn next<T: Message>(&mut self) -> Option<T> {
        let read = async {
            let mut header = [0; 4];
            self.reader.read_exact(&mut header).await.ok()?;
            let mut body = vec![0; frame::message_length(header).unwrap()];
            self.reader.read_exact(&mut body).await.ok()?;
            Some(frame::decode(&body).unwrap())
        };
        timeout(DEADLINE, read).await.expect("the keyserver says something, or ends the stream")
    }
}

pub async fn connect(key: &SigningKey, alpn: &[u8], address: SocketAddr, transport: Transport) -> Option<Stream> {
    connect_from(key, alpn, address, transport, [127, 0, 0, 1].into()).await
}

pub async fn connect_from(
    key: &SigningKey,
    alpn: &[u8],
    address: SocketAddr,
    transport: Transport,
    source: IpAddr,
) -> Option<Stream> {
    let mut config = tls::client(key, ServerKeys::Any, alpn).unwrap();
    config.alpn_protocols.retain(|alpn| !alpn.is_empty());
    let connected = async {
        match transport {
            Transport::Quic => quic(config, address, source).await,
            Transport::Tls => tcp(config, address, source).await,
        }
    };
    timeout(DEADLINE, connected).await.ok().flatten()
}

async fn quic(config: rustls::ClientConfig, address: SocketAddr, source: IpAddr) -> Option<Stream> {
    let endpoint = quinn::Endpoint::client(SocketAddr::new(source, 0)).ok()?;
    let crypto = QuicClientConfig::try_from(config).unwrap();
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    let mut transport = quinn::TransportConfig::default();
    // As nodes do, but the idle timeout is out of the way: a test that waits for it sees it.
    transport.keep_alive_interval(Some(Duration::from_secs(3))).max_idle_timeout(None);
    config.transport_config(Arc::new(transport));
    let connecting = endpoint.connect_with(config, address, "keyserver.mesh");
    let connection = connecting.ok()?.await.ok()?;
    let mut exporter = [0; 32];
    connection.export_keying_material(&mut exporter, EXPORTER_LABEL, b"").unwrap();
    let (writer, reader) = connection.open_bi().await.ok()?;
    let quic = Some((endpoint, connection));
    Some(Stream { reader: Box::new(reader), writer: Box::new(writer), exporter, _quic: quic })
}

async fn tcp(config: rustls::ClientConfig, address: SocketAddr, source: IpAddr) -> Option<Stream> {
    let socket = TcpSocket::new_v4().ok()?;
    socket.bind(SocketAddr::new(source, 0)).ok()?;
    let stream = socket.connect(address).await.ok()?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = connector.connect(ServerName::try_from("keyserver.mesh").unwrap(), stream).await.ok()?;
    let exporter = stream.get_ref().1.export_keying_material([0; 32], EXPORTER_LABEL, Some(b"".as_slice())).unwrap();
    let (reader, writer) = tokio::io::split(stream);
    Some(Stream { reader: Box::new(reader), writer: Box::new(writer), exporter, _quic: None })
}

pub fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

/// A node with its keys and what it was granted.
pub struct Node {
    pub key: SigningKey,
    pub name: String,
    pub grant: Option<(NodeGrant, Envelope)>,
    pub seq: u64,
    tunnel: Vec<TunnelSecret>,
    kem: KemPublic,
}

impl Node {
    pub fn new(name: &str) -> Self {
        let mut kem = vec![0; KEM_PUBLIC_BYTES];
        getrandom::fill(&mut kem).unwrap();
        Self {
            key: SigningKey::from_seed(random()),
            name: name.to_owned(),
            grant: None,
            seq: 0,
            tunnel: (0..4).map(|_| TunnelSecret::from_bytes(random())).collect(),
            kem: KemPublic::from_bytes(&kem).unwrap(),
        }
    }

    pub fn id(&self) -> NodeId {
        self.grant.as_ref().map_or_else(|| self.key.verify_key().node_id(), |(grant, _)| grant.node)
    }

    pub fn grant(&self) -> &NodeGrant {
        &self.grant.as_ref().unwrap().0
    }

    pub fn claim(&self, token: &JoinToken, cidrs: &[&str]) -> JoinClaim {
        JoinClaim {
            mesh: token.mesh,
            token: token.id(),
            identity: self.key.verify_key(),
            name: self.name.parse().unwrap(),
            pod_cidrs: nets(cidrs),
        }
    }

    pub async fn join(&mut self, address: SocketAddr, token: &JoinToken) -> Result<Checkpoint, Refusal> {
        self.join_by(address, token, &[], Transport::Tls).await
    }

    pub async fn join_by(
        &mut self,
        address: SocketAddr,
        token: &JoinToken,
        cidrs: &[&str],
        transport: Transport,
    ) -> Result<Checkpoint, Refusal> {
        let stream = connect(&self.key, ALPN_JOIN, address, transport).await.expect("joining connects");
        self.join_on(stream, token, cidrs).await
    }

    async fn join_on(&mut self, mut stream: Stream, token: &JoinToken, cidrs: &[&str]) -> Result<Checkpoint, Refusal> {
        let view = match shown(&mut stream, token).await {
            Ok(view) => view,
            Err(refusal) => return Err(refusal),
        };
        let claim = self.claim(token, cidrs);
        let signature = claim.sign(&token.secret, &stream.exporter);
        stream.send(&JoinRequest::Enrol { claim, signature }).await;
        match stream.next().await.expect("an answer") {
            JoinReply::Granted { grant, checkpoint } => {
                let checkpoint = view.checkpoint(&checkpoint).unwrap();
                let mut view = view;
                view.apply(&grant).unwrap();
                self.grant = Some((grant.unverified().unwrap(), grant));
                assert!(stream.next::<JoinReply>().await.is_none(), "one request, then the end");
                Ok(checkpoint)
            }
            JoinReply::Refused { refusal } => Err(refusal),
            other => panic!("{other:?}"),
        }
    }

    /// As [`Self::join`], from another address of this machine.
    pub async fn join_from(&mut self, address: SocketAddr, token: &JoinToken, source: IpAddr) -> Result<(), Refusal> {
        let stream = connect_from(&self.key, ALPN_JOIN, address, Transport::Tls, source).await;
        self.join_on(stream.expect("joining connects"), token, &[]).await.map(|_| ())
    }

    /// As [`Self::open`] with everything, from another address of this machine.
    pub async fn open_from(&self, address: SocketAddr, source: IpAddr) -> Option<Session> {
        let stream = connect_from(&self.key, ALPN_NODE, address, Transport::Tls, source).await?;
        self.open_on(stream, None, source).await
    }

    pub fn record(&mut self) -> NodeRecord {
        self.seq += 1;
        self.record_at(self.seq, 1)
    }

    pub fn record_at(&self, seq: u64, epoch: usize) -> NodeRecord {
        let (_, grant) = self.grant.as_ref().unwrap();
        let mesh = self.mesh();
        let key = |at: usize| EpochKey { epoch: at as u64, key: self.tunnel[at].public() };
        NodeRecord {
            node: self.id(),
            seq,
            grant: grant.hash(mesh),
            current: key(epoch),
            previous: None,
            spare: key(epoch + 1),
            kem: KemKey { epoch: 1, key: self.kem.clone() },
            lanes: 1,
            departed: false,
            before: None,
        }
    }

    pub fn mesh(&self) -> MeshId {
        MESH.with(|mesh| mesh.get()).unwrap()
    }

    pub fn seal(&self, record: &NodeRecord) -> Envelope {
        Envelope::seal(self.mesh(), record, &[&self.key])
    }

    pub fn endpoints(&self, seq: u64, address: &str) -> Envelope {
        let candidates = vec![address.parse().unwrap()];
        let endpoints = Endpoints { node: self.id(), seq, candidates, expires: u64::MAX / 2 };
        Envelope::seal(self.mesh(), &endpoints, &[&self.key])
    }

    pub async fn open(&self, address: SocketAddr, position: Option<Position>, transport: Transport) -> Option<Session> {
        let stream = connect(&self.key, ALPN_NODE, address, transport).await?;
        self.open_on(stream, position, [127, 0, 0, 1].into()).await
    }

    async fn open_on(&self, mut stream: Stream, position: Option<Position>, source: IpAddr) -> Option<Session> {
        let grant = self.grant.as_ref().filter(|(grant, _)| !grant.succession.is_empty());
        let grant = grant.map(|(_, envelope)| envelope.clone());
        let hello =
            NodeMessage::Hello { mesh: self.mesh(), position, policy_version: 1, version: "test".into(), grant };
        stream.send(&hello).await;
        match stream.next().await? {
            ServerMessage::Welcome { observed, own_record, .. } => {
                assert_eq!(observed.ip(), source);
                Some(Session { stream, position, own_record, seen: Vec::new(), live: Vec::new(), other: Vec::new() })
            }
            other => panic!("{other:?} instead of a welcome"),
        }
    }
}

thread_local! {
    /// The mesh of the test that runs on this thread.
    static MESH: std::cell::Cell<Option<MeshId>> = const { std::cell::Cell::new(None) };
}

/// Shows the token, then reads the offered policies until they hold what it pins.
pub async fn shown(stream: &mut Stream, token: &JoinToken) -> Result<View, Refusal> {
    MESH.with(|mesh| mesh.set(Some(token.mesh)));
    let signature = token.show(&stream.exporter);
    let limits = Some(token.limits.clone());
    stream.send(&JoinRequest::Show { token: token.id(), signature, limits }).await;
    let mut policies = Vec::new();
    loop {
        let more = match stream.next().await.expect("an offer") {
            JoinReply::Offer { policies } => policies,
            JoinReply::Refused { refusal } => return Err(refusal),
            other => panic!("{other:?} first"),
        };
        policies.extend(more);
        let view = View::pinned(token.mesh, &policies).unwrap();
        let held = view.policies().iter().find(|policy| policy.object.version == token.policy_version);
        if held.is_some_and(|held| held.hash == token.policy) {
            return Ok(view);
        }
    }
}

/// An open control session and what came over it.
pub struct Session {
    pub stream: Stream,
    pub position: Option<Position>,
    pub own_record: Option<Envelope>,
    pub seen: Vec<Envelope>,
    pub live: Vec<Envelope>,
    pub other: Vec<ServerMessage>,
}

impl Session {
    /// Takes messages until `enough` says so; panics if the stream ends first.
    pub async fn until(&mut self, what: &str, mut enough: impl FnMut(&Self) -> bool) {
        while !enough(self) {
            let message = self.stream.next().await.unwrap_or_else(|| panic!("stream ended before {what}"));
            self.take(message);
        }
    }

    /// Takes messages until the stream ends.
    pub async fn until_end(&mut self) {
        while let Some(message) = self.stream.next().await {
            self.take(message);
        }
    }

    fn take(&mut self, message: ServerMessage) {
        match message {
            ServerMessage::Items { from, to, items, .. } => {
                assert!(from.revision == 0 || Some(from) == self.position, "{from:?} attaches to {:?}", self.position);
                self.seen.extend(items);
                if to != from {
                    self.position = Some(to);
                }
            }
            ServerMessage::Live { items } => self.live.extend(items),
            other => self.other.push(other),
        }
    }

    pub fn has(&self, envelope: &Envelope) -> bool {
        self.seen.contains(envelope)
    }

    pub async fn publish(&mut self, envelope: &Envelope) -> Result<(), Refusal> {
        self.stream.send(&NodeMessage::Publish { envelope: envelope.clone() }).await;
        let before = self.other.len();
        let answer =
            |message: &ServerMessage| matches!(message, ServerMessage::Published { .. } | ServerMessage::Error { .. });
        self.until("an answer", |session| session.other[before..].iter().any(answer)).await;
        match self.other[before..].iter().find(|message| answer(message)).unwrap() {
            ServerMessage::Error { refusal } => Err(refusal.clone()),
            _ => Ok(()),
        }
    }

    pub async fn applied(&mut self) {
        let position = self.position.unwrap();
        self.stream.send(&NodeMessage::Applied { position }).await;
    }
}
