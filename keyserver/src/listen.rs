//! Connections: QUIC and TLS over TCP on the same port number, both ending as one pair of reader and writer.
//!
//! ```text
//! accept ── limits by source ── handshake (5 s) ──┬── ALPN mesh-join ── join
//!                                                 └── ALPN mesh-node ── session
//! ```

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_protocol::control::{ALPN_JOIN, ALPN_NODE};
use mesh_protocol::key::{SigningKey, VerifyKey};
use mesh_protocol::tls;
use mesh_protocol::token::EXPORTER_LABEL;
use quinn::crypto::rustls::{HandshakeData, QuicServerConfig};
use quinn::{IdleTimeout, TokioRuntime, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};

use crate::metrics::Metrics;
use crate::throttle::Throttle;
use crate::wire::{Reader, Writing};
use crate::writer::Writer;
use crate::{join, reset, session};

/// From the first packet to a finished handshake.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// Connections at once: ten thousand nodes and some that join. About 100 KiB each while they live.
const MAX_CONNECTIONS: usize = 16_384;
/// Connections at once from one source: nodes behind one NAT.
const MAX_PER_SOURCE: usize = 1_024;
/// Handshakes at once from one source.
const MAX_HANDSHAKES_PER_SOURCE: usize = 64;
/// Above this many handshakes at once, a QUIC client has to show first that it receives at its address.
const RETRY_ABOVE: usize = 256;
/// A QUIC connection that is silent for this long is dead.
const QUIC_IDLE: Duration = Duration::from_secs(30);
/// Memory that one QUIC connection may hold: four frames.
const QUIC_WINDOW: u32 = 256 * 1024;
/// Longest pause after the system refused a connection (no file descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Which protocol, as ALPN said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Join,
    Node,
}

impl Protocol {
    fn of(alpn: Option<&[u8]>) -> Option<Self> {
        match alpn? {
            alpn if alpn == ALPN_JOIN => Some(Self::Join),
            alpn if alpn == ALPN_NODE => Some(Self::Node),
            _ => None,
        }
    }
}

/// A connection whose handshake is done, before anything was said.
pub(crate) struct Connection {
    /// From where.
    pub(crate) peer: SocketAddr,
    /// The key it holds.
    pub(crate) identity: VerifyKey,
    /// Its exporter under [`EXPORTER_LABEL`].
    pub(crate) exporter: [u8; 32],
    /// Frames from the node.
    pub(crate) reader: Reader,
    /// Frames to it.
    pub(crate) writer: Writing,
}

/// A handshake came to nothing.
#[derive(Debug, thiserror::Error)]
enum HandshakeError {
    #[error("not finished within {HANDSHAKE_WITHIN:?}")]
    Slow,
    #[error("{0}")]
    Tls(#[from] std::io::Error),
    #[error("{0}")]
    Quic(#[from] quinn::ConnectionError),
    #[error("no key was shown, or no protocol named")]
    Nameless,
}

/// What every connection needs.
#[derive(Clone)]
pub(crate) struct Gate {
    pub(crate) writer: Writer,
    pub(crate) metrics: Arc<Metrics>,
    limits: Arc<Limits>,
    throttle: Arc<Mutex<Throttle>>,
}

impl Gate {
    pub(crate) fn new(writer: Writer, metrics: Arc<Metrics>) -> Self {
        let limits = Arc::new(Limits { sources: Mutex::default(), metrics: metrics.clone() });
        Self { writer, limits, metrics, throttle: Arc::default() }
    }
}

/// Sockets of one address.
pub(crate) struct Listener {
    quic: quinn::Endpoint,
    tcp: TcpListener,
    acceptor: TlsAcceptor,
}

impl Listener {
    /// Opens UDP and TCP on `address`. Where IPv6 is switched off, `[::]` means all of IPv4.
    pub(crate) async fn bind(address: SocketAddr, key: &SigningKey) -> anyhow::Result<Self> {
        match Self::bind_exactly(address, key).await {
            Err(_) if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
                let all = SocketAddr::new(std::net::Ipv4Addr::UNSPECIFIED.into(), address.port());
                Self::bind_exactly(all, key).await
            }
            other => other,
        }
    }

    async fn bind_exactly(address: SocketAddr, key: &SigningKey) -> anyhow::Result<Self> {
        let config = tls::server(key, &[ALPN_JOIN, ALPN_NODE])?;
        let acceptor = TlsAcceptor::from(Arc::new(config.clone()));
        let tcp = TcpListener::bind(address).await?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(config)?));
        server.transport_config(Arc::new(transport()?)).max_incoming(1_024);
        let socket = std::net::UdpSocket::bind(address)?;
        let runtime = Arc::new(TokioRuntime);
        let quic = quinn::Endpoint::new(reset::endpoint_config(key, address), Some(server), socket, runtime)?;
        Ok(Self { quic, tcp, acceptor })
    }

    /// Accepts until cancelled.
    pub(crate) async fn run(self, gate: Gate) {
        info!(address = ?self.tcp.local_addr().ok(), "listening");
        tokio::join!(accept_tcp(&self.tcp, &self.acceptor, &gate), accept_quic(&self.quic, &gate));
    }
}

fn transport() -> anyhow::Result<quinn::TransportConfig> {
    let mut transport = quinn::TransportConfig::default();
    transport
        .max_idle_timeout(Some(IdleTimeout::try_from(QUIC_IDLE)?))
        .keep_alive_interval(Some(QUIC_IDLE / 3))
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(QUIC_WINDOW))
        .receive_window(VarInt::from_u32(QUIC_WINDOW))
        .send_window(QUIC_WINDOW.into())
        .datagram_receive_buffer_size(None);
    Ok(transport)
}

async fn accept_tcp(listener: &TcpListener, acceptor: &TlsAcceptor, gate: &Gate) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "connection not accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let peer = canonical(peer);
        let Some(place) = gate.limits.enter(peer) else { continue };
        let (gate, acceptor) = (gate.clone(), acceptor.clone());
        tokio::spawn(async move {
            let handshake = timeout(HANDSHAKE_WITHIN, shake_tcp(stream, peer, &acceptor)).await;
            let result = handshake.unwrap_or(Err(HandshakeError::Slow));
            if let Some((protocol, connection)) = gate.judge(result, peer, &place) {
                gate.serve(protocol, connection).await;
            }
        });
    }
}

async fn shake_tcp(
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: &TlsAcceptor,
) -> Result<(Protocol, Connection), HandshakeError> {
    stream.set_nodelay(true)?;
    let stream = acceptor.accept(stream).await?;
    let (_, tls) = stream.get_ref();
    let protocol = Protocol::of(tls.alpn_protocol()).ok_or(HandshakeError::Nameless)?;
    let identity = key_of(tls.peer_certificates())?;
    let exporter = tls.export_keying_material([0; 32], EXPORTER_LABEL, Some(b"".as_slice()));
    let exporter = exporter.map_err(|_| HandshakeError::Nameless)?;
    let (reader, writer) = tokio::io::split(stream);
    Ok((protocol, Connection { peer, identity, exporter, reader: Box::new(reader), writer: Box::new(writer) }))
}

async fn accept_quic(endpoint: &quinn::Endpoint, gate: &Gate) {
    while let Some(incoming) = endpoint.accept().await {
        let peer = canonical(incoming.remote_address());
        if gate.limits.handshakes() > RETRY_ABOVE && incoming.may_retry() && !incoming.remote_address_validated() {
            // It fails only for an address that is validated.
            let _ = incoming.retry();
            continue;
        }
        let Some(place) = gate.limits.enter(peer) else {
            incoming.refuse();
            continue;
        };
        let gate = gate.clone();
        tokio::spawn(async move {
            let handshake = timeout(HANDSHAKE_WITHIN, shake_quic(incoming, peer)).await;
            match handshake.unwrap_or(Err(HandshakeError::Slow)) {
                Ok((protocol, connection, quic)) => {
                    if let Some((protocol, connection)) = gate.judge(Ok((protocol, connection)), peer, &place) {
                        gate.serve(protocol, connection).await;
                    }
                    // What was written last is still on its way: the stream's end is, too.
                    let _ = timeout(Duration::from_secs(1), quic.closed()).await;
                    quic.close(VarInt::from_u32(0), b"");
                }
                Err(error) => {
                    gate.judge(Err(error), peer, &place);
                }
            }
        });
    }
}

async fn shake_quic(
    incoming: quinn::Incoming,
    peer: SocketAddr,
) -> Result<(Protocol, Connection, quinn::Connection), HandshakeError> {
    let quic = incoming.await?;
    let data = quic.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
    let alpn = data.and_then(|data| data.protocol);
    let protocol = Protocol::of(alpn.as_deref()).ok_or(HandshakeError::Nameless)?;
    let shown = quic.peer_identity().and_then(|shown| shown.downcast::<Vec<CertificateDer<'static>>>().ok());
    let identity = key_of(shown.as_deref().map(Vec::as_slice))?;
    let mut exporter = [0; 32];
    quic.export_keying_material(&mut exporter, EXPORTER_LABEL, b"").map_err(|_| HandshakeError::Nameless)?;
    // The node speaks first, so it opens the stream: see `mesh_protocol::control`.
    let (writer, reader) = quic.accept_bi().await?;
    let connection = Connection { peer, identity, exporter, reader: Box::new(reader), writer: Box::new(writer) };
    Ok((protocol, connection, quic))
}

fn key_of(shown: Option<&[CertificateDer<'_>]>) -> Result<VerifyKey, HandshakeError> {
    let shown = shown.and_then(|shown| shown.first()).ok_or(HandshakeError::Nameless)?;
    tls::peer_key(shown).map_err(|_| HandshakeError::Nameless)
}

impl Gate {
    fn judge(
        &self,
        result: Result<(Protocol, Connection), HandshakeError>,
        peer: SocketAddr,
        place: &Place,
    ) -> Option<(Protocol, Connection)> {
        place.handshake_done();
        match result {
            Ok(done) => {
                self.metrics.handshakes.inc();
                Some(done)
            }
            Err(error) => {
                self.metrics.failed_handshakes.inc();
                debug!(%peer, %error, "handshake failed");
                None
            }
        }
    }

    async fn serve(&self, protocol: Protocol, connection: Connection) {
        match protocol {
            Protocol::Join => join::serve(&self.writer, &self.throttle, connection).await,
            Protocol::Node => session::serve(&self.writer, connection).await,
        }
    }
}

/// How many connections each source has.
struct Limits {
    /// Bounded by [`MAX_CONNECTIONS`]: a source without any is not in it.
    sources: Mutex<Sources>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Sources {
    by_source: HashMap<IpAddr, Counts>,
    open: usize,
    handshakes: usize,
}

#[derive(Default)]
struct Counts {
    open: usize,
    handshakes: usize,
}

impl Limits {
    fn lock(&self) -> MutexGuard<'_, Sources> {
        // Counts stay right whoever panicked: each change is one step.
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handshakes(&self) -> usize {
        self.lock().handshakes
    }

    /// Takes a place for a connection; `None` if there is none for this source.
    fn enter(self: &Arc<Self>, peer: SocketAddr) -> Option<Place> {
        let source = source(peer.ip());
        let mut sources = self.lock();
        let full = sources.open >= MAX_CONNECTIONS;
        let counts = sources.by_source.entry(source).or_default();
        if full || counts.open >= MAX_PER_SOURCE || counts.handshakes >= MAX_HANDSHAKES_PER_SOURCE {
            let unused = counts.open == 0;
            if unused {
                sources.by_source.remove(&source);
            }
            self.metrics.turned_away.inc();
            return None;
        }
        counts.open += 1;
        counts.handshakes += 1;
        sources.open += 1;
        sources.handshakes += 1;
        self.metrics.connections.inc();
        Some(Place { limits: self.clone(), source, shaking: Mutex::new(true) })
    }
}

/// A connection's place in the [`Limits`], given back when dropped.
struct Place {
    limits: Arc<Limits>,
    source: IpAddr,
    shaking: Mutex<bool>,
}

impl Place {
    fn handshake_done(&self) {
        let mut shaking = self.shaking.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut *shaking) {
            let mut sources = self.limits.lock();
            sources.handshakes -= 1;
            if let Some(counts) = sources.by_source.get_mut(&self.source) {
                counts.handshakes -= 1;
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.handshake_done();
        let mut sources = self.limits.lock();
        sources.open -= 1;
        let counts = sources.by_source.entry(self.source).or_default();
        counts.open = counts.open.saturating_sub(1);
        if counts.open == 0 {
            sources.by_source.remove(&self.source);
        }
        self.limits.metrics.connections.dec();
    }
}

fn canonical(peer: SocketAddr) -> SocketAddr {
    SocketAddr::new(peer.ip().to_canonical(), peer.port())
}

/// What counts as one source: an IPv4 address, or a /64.
pub(crate) fn source(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
    }
}
