//! The device at work: carries out what is configured and what becomes of its link.
//!
//! It has a socket while its link is up, as the kernel's device has; while it is down it knows no peers and no sessions.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_dataplane::{
    Command, Engine, EngineConfig, EngineError, Events, LaneParts, LocalKey, PeerId, PeerSnapshot, SecretKey, Table,
    TableError, TableSpec,
    tun::Queue,
    udp::{
        Socket as _, Trains,
        closed::ClosedSocket,
        system::{SystemConfig, SystemSocket},
    },
};
use nix::sys::socket::{setsockopt, sockopt};
use tracing::{debug, info, warn};
use zeroize::Zeroizing;

use crate::{
    interface::{Interface, Past},
    uapi::{DeviceChange, PeerState, State, UapiError},
};

/// Two readings of one handshake's time lie closer together than this, two handshakes do not.
const SAME_HANDSHAKE: Duration = Duration::from_secs(1);

/// A running device.
#[derive(Debug)]
pub struct Device {
    engine: Engine,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    interface: Interface,
    /// The lane's socket, by a descriptor of our own; `None` while the link is down.
    socket: Option<OwnedFd>,
    /// MTU of the link.
    mtu: u16,
    /// Key of a device that has none: the data plane wants one, nobody knows it.
    stand_in: SecretKey,
    /// What its sockets may use.
    trains: Trains,
}

/// Why a device did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The system refused descriptors or random bytes.
    #[error("prepare the device")]
    System(#[from] io::Error),
    /// The data plane did not start.
    #[error("start the data plane")]
    Engine(#[from] EngineError),
    /// The data plane refused an empty table.
    #[error("make the peer table")]
    Table(#[from] TableError),
}

impl Device {
    /// Starts the data plane on `queue`: down, without key and peers. Its sockets use `trains`.
    ///
    /// # Errors
    ///
    /// See [`DeviceError`].
    pub fn start(queue: Box<dyn Queue>, trains: Trains) -> Result<(Self, Option<Events>), DeviceError> {
        let mut bytes = Zeroizing::new([0; 32]);
        getrandom::fill(&mut *bytes).map_err(io::Error::other)?;
        let stand_in = SecretKey::new(*bytes);
        let inner = Inner { interface: Interface::default(), socket: None, mtu: 1420, stand_in, trains };
        let table = Arc::new(Table::new(inner.table_spec())?);
        let parts = LaneParts { queue, socket: Box::new(ClosedSocket::new()?) };
        let mut engine = Engine::start(EngineConfig::default(), table, vec![parts])?;
        let events = engine.take_events();
        Ok((Self { engine, inner: Mutex::new(inner) }, events))
    }

    /// Takes what the kernel says of the link.
    pub fn set_link(&self, up: bool, mtu: u32) {
        let mtu = u16::try_from(mtu).unwrap_or(u16::MAX);
        let mut inner = self.lock();
        let was_up = inner.socket.is_some();
        if inner.mtu == mtu && was_up == up {
            return;
        }
        inner.mtu = mtu;
        if up && !was_up {
            let port = inner.interface.listen_port();
            if let Err(error) = self.open_socket(&mut inner, port) {
                warn!(port, %error, "no socket, the device carries nothing");
            }
        }
        if !up && was_up {
            self.close_socket(&mut inner);
        }
        info!(up, mtu, port = inner.interface.listen_port(), "link changed");
        self.set_table(&inner);
    }

    /// Carries out a change.
    ///
    /// # Errors
    ///
    /// [`UapiError::PortInUse`], [`UapiError::Io`]; nothing has changed then.
    pub fn set(&self, change: DeviceChange) -> Result<(), UapiError> {
        let mut inner = self.lock();
        let (before, port) = (inner.interface.fwmark(), change.listen_port);
        if let Some(fwmark) = change.fwmark.filter(|fwmark| *fwmark != before) {
            inner.set_mark(fwmark)?;
        }
        if let Some(port) = port.filter(|port| *port == 0 || *port != inner.interface.listen_port()) {
            let moved = match inner.socket {
                Some(_) => self.open_socket(&mut inner, port),
                None => {
                    inner.interface.set_listen_port(port);
                    Ok(())
                }
            };
            if let Err(error) = moved {
                // A socket takes any mark that it had before.
                let _ = inner.set_mark(before);
                debug!(port, %error, "listen port refused");
                return Err(errno_of(&error));
            }
        }
        if inner.interface.changes_key(&change) {
            self.remember(&mut inner);
        }
        let mut redirects = Vec::new();
        if inner.socket.is_some() && (port.is_some() || change.fwmark.is_some_and(|fwmark| fwmark != before)) {
            // Another port or mark may have another way out: the system chooses the address to send from anew.
            let live = self.live(&mut inner);
            redirects.extend(live.into_iter().filter_map(|(id, live)| Some((id, live.endpoint?))));
        }
        redirects.extend(inner.interface.apply(change).redirects);
        self.set_table(&inner);
        if !redirects.is_empty() && inner.socket.is_some() {
            // The lane's mailbox is full only if it hangs; the table carries the endpoints for all but known peers.
            if let Err(error) = self.engine.command(Command::Redirect(redirects)) {
                warn!(%error, "endpoints not taken");
            }
        }
        Ok(())
    }

    /// The whole state, as an answer to `get=1`.
    pub fn get(&self) -> Zeroizing<String> {
        let mut inner = self.lock();
        let mut live = self.live(&mut inner);
        let interface = &inner.interface;
        let state =
            State { private_key: interface.secret(), listen_port: interface.listen_port(), fwmark: interface.fwmark() };
        let mut answer = state.begin();
        for (id, peer) in interface.peers() {
            let live = live.remove(&id).unwrap_or(Live { past: peer.past, endpoint: None });
            answer.peer(PeerState {
                public_key: peer.public_key,
                preshared_key: peer.preshared_key.as_ref(),
                endpoint: live.endpoint.or(peer.endpoint),
                last_handshake: live.past.last_handshake,
                tx_bytes: live.past.tx_bytes,
                rx_bytes: live.past.rx_bytes,
                keepalive: peer.keepalive,
                allowed_ips: peer.allowed_ips.values(),
            });
        }
        answer.end()
    }

    /// Binds a socket and hands it to the lane, in place of the one it has.
    fn open_socket(&self, inner: &mut Inner, port: u16) -> io::Result<()> {
        let mark = Some(inner.interface.fwmark()).filter(|mark| *mark != 0);
        let socket = SystemSocket::bind(&SystemConfig { port, mark, trains: inner.trains, ..SystemConfig::default() })?;
        let port = socket.local_addr()?.port();
        let own = socket.as_fd().try_clone_to_owned()?;
        self.engine.replace_socket(0, Box::new(socket)).map_err(io::Error::other)?;
        inner.socket = Some(own);
        inner.interface.set_listen_port(port);
        Ok(())
    }

    /// Takes the lane's socket away; sessions and endpoints' sources end with it.
    fn close_socket(&self, inner: &mut Inner) {
        self.remember(inner);
        inner.interface.begin_new_lives();
        inner.socket = None;
        let closed = ClosedSocket::new().map_err(|error| error.to_string());
        let taken = closed
            .and_then(|closed| self.engine.replace_socket(0, Box::new(closed)).map_err(|error| error.to_string()));
        if let Err(error) = taken {
            warn!(%error, "socket not closed");
        }
        // Letters are answered in order: now the port is free again.
        self.engine.snapshot();
    }

    /// Writes down what the data plane knows of peers, before it forgets them.
    fn remember(&self, inner: &mut Inner) {
        let mut live = self.live(inner);
        for (id, peer) in inner.interface.peers_mut() {
            if let Some(live) = live.remove(&id) {
                peer.past = live.past;
                peer.endpoint = live.endpoint.or(peer.endpoint);
            }
        }
    }

    /// What the data plane and the past say together, of the peers that the data plane knows.
    fn live(&self, inner: &mut Inner) -> BTreeMap<PeerId, Live> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let snapshot = self.engine.snapshot();
        let merge = |(id, peer): (PeerId, &mut crate::interface::Peer)| {
            let live = Live::new(snapshot.peers.get(&id)?, &peer.past, now);
            // Times are read off two clocks: the first reading of a handshake holds.
            peer.past.last_handshake = live.past.last_handshake;
            Some((id, live))
        };
        inner.interface.peers_mut().filter_map(merge).collect()
    }

    /// Hands the data plane a table of what is configured now.
    fn set_table(&self, inner: &Inner) {
        match Table::new(inner.table_spec()) {
            Ok(table) => self.engine.set_table(Arc::new(table)),
            // The interface keeps keys and prefixes apart; were it to fail, the old table stays.
            Err(error) => warn!(%error, "peer table refused"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Peers only while packets can be carried: with a socket and a key.
    fn table_spec(&self) -> TableSpec {
        let key = self.interface.local_key().filter(|_| self.socket.is_some());
        let peers = if key.is_some() { self.interface.peer_specs() } else { Vec::new() };
        let key = key.unwrap_or_else(|| LocalKey { epoch: 0, secret: self.stand_in.clone() });
        TableSpec {
            local_keys: vec![key],
            peers,
            inner_mtu: self.mtu,
            rotation_spread: Duration::ZERO,
            plain: true,
            ..TableSpec::default()
        }
    }

    fn set_mark(&self, fwmark: u32) -> Result<(), UapiError> {
        let Some(socket) = &self.socket else { return Ok(()) };
        setsockopt(socket, sockopt::Mark, &fwmark).map_err(|_| UapiError::Io)
    }
}

/// What is known of a peer that was talked to.
#[derive(Debug)]
struct Live {
    past: Past,
    endpoint: Option<SocketAddr>,
}

impl Live {
    fn new(peer: &PeerSnapshot, past: &Past, now: Duration) -> Self {
        let handshake = peer.last_handshake.map(|ago| now.saturating_sub(ago));
        let last_handshake = match handshake {
            Some(at) if at.abs_diff(past.last_handshake) >= SAME_HANDSHAKE => at,
            _ => past.last_handshake,
        };
        let past = Past {
            tx_bytes: past.tx_bytes + peer.wire.tx_bytes,
            rx_bytes: past.rx_bytes + peer.wire.rx_bytes,
            last_handshake,
        };
        Self { past, endpoint: peer.endpoint }
    }
}

fn errno_of(error: &io::Error) -> UapiError {
    match error.kind() {
        io::ErrorKind::AddrInUse => UapiError::PortInUse,
        _ => UapiError::Io,
    }
}
