//! Hostile ends, built from our own protocol crate: a keyserver whose keys were stolen, and a node that says what it likes.
#![allow(dead_code, clippy::unwrap_used, reason = "shared by several tests")]

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::mesh::{Mesh, MeshNode};
use mesh_e2e::wait;
use mesh_protocol::control::{ALPN_JOIN, ALPN_NODE, NodeMessage, ServerMessage};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::frame::{self, Message};
use mesh_protocol::id::{MeshId, NodeId, Position};
use mesh_protocol::key::SigningKey;
use mesh_protocol::record::{Checkpoint, NodeGrant, NodeRecord};
use mesh_protocol::tls::{self, ServerKeys};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ServerConnection, StreamOwned};

const DEADLINE: Duration = Duration::from_secs(30);
/// How long a read waits before it looks whether there is something to send.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Seconds since 1970.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// A key of the keyserver, as a thief of its disk has it.
pub(crate) fn stolen_key(mesh: &Mesh, name: &str) -> Result<SigningKey> {
    let text = std::fs::read_to_string(mesh.keyserver_directory().join("keys").join(name))?;
    let mut seed = [0; 32];
    hex::decode_to_slice(text.trim_end(), &mut seed)?;
    Ok(SigningKey::from_seed(seed))
}

/// The identity key of a node, as a thief of its disk has it.
pub(crate) fn identity(node: &MeshNode) -> Result<SigningKey> {
    let bytes = std::fs::read(node.node.directory().join("state/identity"))?;
    Ok(SigningKey::from_seed(bytes.try_into().ok().context("an identity of another length")?))
}

/// A stream of frames over TLS, either end.
struct Frames<S> {
    stream: S,
    buffer: Vec<u8>,
}

impl<S: Read + Write> Frames<S> {
    fn send<T: Message>(&mut self, message: &T) -> Result<()> {
        self.stream.write_all(&frame::encode(message)?)?;
        Ok(self.stream.flush()?)
    }

    /// The next message; `None` if none came for a moment.
    fn next<T: Message>(&mut self) -> Result<Option<T>> {
        let mut chunk = [0; 16 * 1024];
        loop {
            if let Some((header, rest)) = self.buffer.split_first_chunk::<4>() {
                let length = frame::message_length(*header)?;
                if rest.len() >= length {
                    let message = frame::decode(&rest[..length])?;
                    self.buffer.drain(..4 + length);
                    return Ok(Some(message));
                }
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => anyhow::bail!("the other end closed the stream"),
                Ok(read) => self.buffer.extend_from_slice(&chunk[..read]),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn expect<T: Message>(&mut self) -> Result<T> {
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            if let Some(message) = self.next()? {
                return Ok(message);
            }
        }
        anyhow::bail!("nothing was said within {DEADLINE:?}")
    }
}

/// A control session with the real keyserver, by whoever has the node's key.
pub(crate) struct Speaker {
    frames: Frames<StreamOwned<ClientConnection, TcpStream>>,
}

impl Speaker {
    /// Connects from `from`'s machine and opens a session that asks for everything.
    pub(crate) fn open(mesh: &Mesh, from: &MeshNode, key: &SigningKey, mesh_id: MeshId) -> Result<Self> {
        let address = SocketAddr::from((mesh.keyserver_node().v4(), 7443));
        let stream = from.node.netns()?.run(move || TcpStream::connect_timeout(&address, DEADLINE))??;
        stream.set_read_timeout(Some(LOOK_EVERY))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        let config = Arc::new(tls::client(key, ServerKeys::Any, ALPN_NODE)?);
        let mut session = ClientConnection::new(config, ServerName::try_from("keyserver.mesh")?)?;
        let mut stream = stream;
        handshake(|| session.complete_io(&mut stream))?;
        let mut frames = Frames { stream: StreamOwned::new(session, stream), buffer: Vec::new() };
        let version = "hostile".into();
        let hello = NodeMessage::Hello { mesh: mesh_id, position: None, policy_version: 0, version, grant: None };
        frames.send(&hello)?;
        Ok(Self { frames })
    }

    /// Publishes, and gives the refusal's words, or `None` if it was taken.
    pub(crate) fn publish(&mut self, envelope: &Envelope) -> Result<Option<String>> {
        self.frames.send(&NodeMessage::Publish { envelope: envelope.clone() })?;
        loop {
            match self.frames.expect()? {
                ServerMessage::Published { .. } => return Ok(None),
                ServerMessage::Error { refusal } => return Ok(Some(refusal.message)),
                ServerMessage::Ping { nonce } => self.frames.send(&NodeMessage::Pong { nonce })?,
                _ => {}
            }
        }
    }

    /// Everything the keyserver shows a node that asks for it.
    pub(crate) fn learn(&mut self, mesh: MeshId) -> Result<World> {
        let mut items = Vec::new();
        loop {
            match self.frames.expect()? {
                ServerMessage::Items { from, to, items: more, checkpoint } => {
                    items.extend(more);
                    if let Some(checkpoint) = checkpoint.filter(|_| to != from || !items.is_empty()) {
                        return Ok(World { mesh, items, checkpoint });
                    }
                }
                ServerMessage::Ping { nonce } => self.frames.send(&NodeMessage::Pong { nonce })?,
                _ => {}
            }
        }
    }
}

fn handshake<T>(mut step: impl FnMut() -> io::Result<T>) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match step() {
            Ok(_) => return Ok(()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                ensure!(Instant::now() < deadline, "no handshake within {DEADLINE:?}");
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// What the real keyserver showed.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) mesh: MeshId,
    pub(crate) items: Vec<Envelope>,
    pub(crate) checkpoint: Envelope,
}

impl World {
    pub(crate) fn checkpoint(&self) -> Checkpoint {
        self.checkpoint.unverified().unwrap()
    }

    /// The newest grant of the node of that name.
    pub(crate) fn grant(&self, name: &str) -> (NodeGrant, Envelope) {
        let mut grants =
            self.items.iter().filter_map(|item| Some((item.unverified::<NodeGrant>().ok()?, item.clone())));
        grants.rfind(|(grant, _)| grant.name.as_str() == name).expect("the node was granted")
    }

    /// The newest record of the node of that name.
    pub(crate) fn record(&self, name: &str) -> (NodeRecord, Envelope) {
        let node = self.grant(name).0.node;
        let mut records =
            self.items.iter().filter_map(|item| Some((item.unverified::<NodeRecord>().ok()?, item.clone())));
        records.rfind(|(record, _)| record.node == node).expect("the node spoke")
    }

    fn grant_of(&self, node: NodeId) -> Option<Envelope> {
        let mut grants = self.items.iter().filter_map(|item| Some((item.unverified::<NodeGrant>().ok()?, item)));
        grants.rfind(|(grant, _)| grant.node == node).map(|(_, item)| item.clone())
    }
}

/// What one node is told, and where it stands.
#[derive(Default)]
struct Told {
    queue: VecDeque<ServerMessage>,
    position: Option<Position>,
    connected: bool,
}

/// A keyserver that does as the test says. Its threads end when it is dropped.
pub(crate) struct Hostile {
    told: Arc<Mutex<BTreeMap<NodeId, Told>>>,
    stop: Arc<AtomicBool>,
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Hostile {
    /// Takes the place of the real keyserver, which is dead, with its transport key. Nodes are welcomed with `world`.
    pub(crate) fn start(mesh: &Mesh, transport: &SigningKey, world: World) -> Result<Self> {
        let address = SocketAddr::from((mesh.keyserver_node().v4(), 7443));
        let listen = move || -> io::Result<TcpListener> {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let netns = mesh.keyserver_node().netns()?;
        // Connections of the dead one may hold the port for a moment.
        let listener = wait::until("the port is free", DEADLINE, || Ok(netns.run(listen)??))?;
        let config = Arc::new(tls::server(transport, &[ALPN_JOIN, ALPN_NODE])?);
        let (told, stop) = (Arc::new(Mutex::new(BTreeMap::new())), Arc::new(AtomicBool::new(false)));
        let hostile = Self { told: Arc::clone(&told), stop: Arc::clone(&stop) };
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let Ok((stream, _)) = listener.accept() else {
                    std::thread::sleep(LOOK_EVERY);
                    continue;
                };
                let (config, world, told, stop) = (config.clone(), world.clone(), told.clone(), stop.clone());
                std::thread::spawn(move || {
                    // A node that hangs up comes back.
                    let _ = serve(stream, config, &world, &told, &stop);
                });
            }
        });
        Ok(hostile)
    }

    /// Waits until this node has a session.
    pub(crate) fn wait_for(&self, node: NodeId) -> Result<()> {
        wait::until_true("the node has a session with the hostile keyserver", Duration::from_secs(60), || {
            Ok(self.told.lock().unwrap().get(&node).is_some_and(|told| told.connected && told.position.is_some()))
        })
    }

    /// Where the node stands.
    pub(crate) fn position(&self, node: NodeId) -> Position {
        self.told.lock().unwrap()[&node].position.expect("it has a session")
    }

    /// Shows the node changes that lead `steps` revisions on, more than there are items if told so.
    pub(crate) fn items(&self, node: NodeId, items: Vec<Envelope>, steps: u64, checkpoint: Option<Envelope>) {
        let mut told = self.told.lock().unwrap();
        let told = told.entry(node).or_default();
        let from = told.position.expect("it has a session");
        let to = Position { revision: from.revision + steps, ..from };
        told.position = Some(to);
        told.queue.push_back(ServerMessage::Items { from, to, items, checkpoint });
    }

    /// Shows the node a checkpoint.
    pub(crate) fn checkpoint(&self, node: NodeId, checkpoint: Envelope) {
        let mut told = self.told.lock().unwrap();
        told.entry(node).or_default().queue.push_back(ServerMessage::Checkpoint { checkpoint });
    }
}

fn serve(
    mut stream: TcpStream,
    config: Arc<rustls::ServerConfig>,
    world: &World,
    told: &Mutex<BTreeMap<NodeId, Told>>,
    stop: &AtomicBool,
) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(LOOK_EVERY))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    let peer = stream.peer_addr()?;
    let mut session = ServerConnection::new(config)?;
    handshake(|| session.complete_io(&mut stream))?;
    let shown = session.peer_certificates().and_then(<[_]>::first).context("no key was shown")?;
    let node = tls::peer_key(shown)?.node_id();
    let mut frames = Frames { stream: StreamOwned::new(session, stream), buffer: Vec::new() };
    let NodeMessage::Hello { position, .. } = frames.expect()? else { anyhow::bail!("no hello") };
    let own_grant = world.grant_of(node).context("a stranger")?;
    let checkpoint = world.checkpoint.clone();
    frames.send(&ServerMessage::Welcome {
        checkpoint,
        policies: vec![],
        own_record: None,
        own_grant,
        observed: peer,
    })?;
    {
        let mut told = told.lock().unwrap();
        let told = told.entry(node).or_default();
        told.queue.clear();
        (told.position, told.connected) = (position.or(Some(world.checkpoint().position)), true);
    }
    let mut pinged = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        // What nodes say is of no interest.
        while frames.next::<NodeMessage>()?.is_some() {}
        if pinged.elapsed() > Duration::from_secs(2) {
            pinged = Instant::now();
            frames.send(&ServerMessage::Ping { nonce: 1 })?;
        }
        loop {
            let message = told.lock().unwrap().get_mut(&node).and_then(|told| told.queue.pop_front());
            let Some(message) = message else { break };
            frames.send(&message)?;
        }
    }
    Ok(())
}

/// Waits until `meshctl audit` on the node shows an alarm of this name whose message holds `text`.
pub(crate) fn wait_alarm(node: &MeshNode, name: &str, text: &str) -> Result<()> {
    let mut seen = String::new();
    let shown =
        wait::until_true(&format!("alarm {name} '{text}' on {}", node.node.name()), Duration::from_secs(70), || {
            let audit = node.ctl_json(&["audit"])?;
            seen = audit["alarms"].to_string();
            let alarms = audit["alarms"].as_array().context("no alarms")?;
            Ok(alarms
                .iter()
                .any(|alarm| alarm["name"] == name && alarm["message"].as_str().is_some_and(|m| m.contains(text))))
        });
    shown.with_context(|| format!("alarms were {seen}"))
}
