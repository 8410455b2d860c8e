//! A connection to a keyserver: QUIC first, TLS over TCP where UDP does not get through. Both carry the same frames.
//!
//! The transport that worked last starts first; the other one joins after two seconds or when the first has failed, and
//! the first that comes up wins.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mesh_protocol::key::{SigningKey, VerifyKey};
use mesh_protocol::tls::{self, ServerKeys};
use rustls::pki_types::{CertificateDer, ServerName};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpSocket;
use tokio::time::{sleep, timeout};

/// Head start of the preferred transport.
const HEAD_START: Duration = Duration::from_secs(2);
/// Longest attempt by one transport on one address: a keyserver drops a handshake after 5 s.
const ATTEMPT: Duration = Duration::from_secs(6);
/// Longest wait for the name service.
const RESOLVE: Duration = Duration::from_secs(5);
/// Addresses tried of one name.
const MOST_ADDRESSES: usize = 4;
/// A connection that is silent for this long is dead. A revocation waits for nobody, so this is how long a node may go
/// without one when a keyserver was killed; ten thousand nodes make 3,300 packets a second. A keyserver that is back sooner
/// says by a stateless reset that it knows nothing of the connection.
const IDLE: Duration = Duration::from_secs(10);
/// What is sent to find out; it keeps the state of NATs alive too.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// Memory that one QUIC stream may hold: four frames.
const QUIC_WINDOW: u32 = 256 * 1024;
/// In the certificate's place stands a raw key, and no name is sent: this one is never looked at.
const SERVER_NAME: &str = "keyserver.mesh";

/// No connection.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ConnectError {
    /// The address is not `host:port`, or its name has no address.
    #[error("cannot resolve '{address}': {reason}")]
    Resolve {
        /// What was tried.
        address: String,
        /// Why not.
        reason: String,
    },
    /// Neither transport came up.
    #[error("cannot reach {address}: {reason}")]
    Unreachable {
        /// What was tried.
        address: String,
        /// Why not, by transport.
        reason: String,
    },
    /// The own key cannot be used.
    #[error("TLS cannot be set up: {0}")]
    Setup(String),
}

/// How frames travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Transport {
    /// QUIC.
    #[default]
    Quic,
    /// TLS over TCP.
    Tls,
}

impl Transport {
    /// As status shows it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Tls => "tls",
        }
    }
}

/// How to connect.
#[derive(Debug, Clone)]
pub(crate) struct Dialer {
    /// Shown to the keyserver.
    pub(crate) key: SigningKey,
    /// Keyserver keys to go on with.
    pub(crate) servers: ServerKeys,
    /// What is spoken.
    pub(crate) alpn: &'static [u8],
    /// SO_MARK of the sockets; 0 sets none.
    pub(crate) mark: u32,
}

/// An open connection with its one stream. Dropping it closes both.
pub(crate) struct Connection {
    /// Frames from the keyserver.
    pub(crate) reader: Box<dyn AsyncRead + Send + Unpin>,
    /// Frames to it.
    pub(crate) writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// How.
    pub(crate) transport: Transport,
    /// The keyserver's key.
    pub(crate) server: VerifyKey,
    /// The exporter of this connection under [`EXPORTER_LABEL`](mesh_protocol::token::EXPORTER_LABEL).
    pub(crate) exporter: [u8; 32],
    /// QUIC connections live as long as their endpoint.
    quic: Option<(quinn::Endpoint, quinn::Connection)>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some((_, connection)) = &self.quic {
            connection.close(quinn::VarInt::from_u32(0), b"");
        }
    }
}

impl Dialer {
    /// Connects to `address` (`host:port`), by `preferred` if that comes up within its head start.
    ///
    /// # Errors
    /// [`ConnectError`].
    ///
    /// # Cancel safety
    /// Sockets are closed.
    pub(crate) async fn dial(&self, address: &str, preferred: Transport) -> Result<Connection, ConnectError> {
        let config = tls::client(&self.key, self.servers.clone(), self.alpn)
            .map_err(|error| ConnectError::Setup(error.to_string()))?;
        let mut reasons = Vec::new();
        for remote in resolve(address).await? {
            match self.race(&config, remote, preferred).await {
                Ok(connection) => return Ok(connection),
                Err(reason) => reasons.push(format!("{remote}: {reason}")),
            }
        }
        Err(ConnectError::Unreachable { address: address.to_owned(), reason: reasons.join("; ") })
    }

    async fn race(
        &self,
        config: &rustls::ClientConfig,
        remote: SocketAddr,
        preferred: Transport,
    ) -> Result<Connection, String> {
        let other = if preferred == Transport::Quic { Transport::Tls } else { Transport::Quic };
        let mut first = std::pin::pin!(self.attempt(config, remote, preferred));
        let mut second = std::pin::pin!(self.attempt(config, remote, other));
        let early = tokio::select! {
            result = &mut first => Some(result),
            () = sleep(HEAD_START) => None,
        };
        match early {
            Some(Ok(connection)) => Ok(connection),
            Some(Err(reason)) => second.await.map_err(|also| format!("{reason}, {also}")),
            None => tokio::select! {
                result = &mut first => match result {
                    Ok(connection) => Ok(connection),
                    Err(reason) => second.await.map_err(|also| format!("{reason}, {also}")),
                },
                result = &mut second => match result {
                    Ok(connection) => Ok(connection),
                    Err(reason) => first.await.map_err(|also| format!("{also}, {reason}")),
                },
            },
        }
    }

    async fn attempt(
        &self,
        config: &rustls::ClientConfig,
        remote: SocketAddr,
        transport: Transport,
    ) -> Result<Connection, String> {
        let connect = async {
            match transport {
                Transport::Quic => self.quic(config.clone(), remote).await,
                Transport::Tls => self.tls(config.clone(), remote).await,
            }
        };
        let result = timeout(ATTEMPT, connect).await.unwrap_or_else(|_| Err("no answer".into()));
        result.map_err(|error| format!("{}: {error}", transport.as_str()))
    }

    async fn quic(&self, config: rustls::ClientConfig, remote: SocketAddr) -> Result<Connection, Failure> {
        let socket = self.socket(remote, Type::DGRAM, Protocol::UDP)?;
        let any = match remote {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        socket.bind(&SocketAddr::new(any, 0).into())?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint = quinn::Endpoint::new(quinn::EndpointConfig::default(), None, socket.into(), runtime)?;
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(config)?;
        let mut client = quinn::ClientConfig::new(Arc::new(crypto));
        client.transport_config(Arc::new(transport_config()?));
        let connection = endpoint.connect_with(client, remote, SERVER_NAME)?.await?;
        // The node speaks first, whatever is spoken.
        let (send, receive) = connection.open_bi().await?;
        let mut exporter = [0; 32];
        connection
            .export_keying_material(&mut exporter, mesh_protocol::token::EXPORTER_LABEL, b"")
            .map_err(|_| "the connection has no exporter")?;
        let shown = connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        let server = server_key(shown.as_deref().map(Vec::as_slice))?;
        Ok(Connection {
            reader: Box::new(receive),
            writer: Box::new(send),
            transport: Transport::Quic,
            server,
            exporter,
            quic: Some((endpoint, connection)),
        })
    }

    async fn tls(&self, config: rustls::ClientConfig, remote: SocketAddr) -> Result<Connection, Failure> {
        let socket = self.socket(remote, Type::STREAM, Protocol::TCP)?;
        socket.set_tcp_nodelay(true)?;
        // Where a firewall drops silently, only this tells.
        let keepalive = TcpKeepalive::new().with_time(KEEP_ALIVE).with_interval(KEEP_ALIVE);
        socket.set_tcp_keepalive(&keepalive)?;
        socket.set_tcp_user_timeout(Some(IDLE))?;
        let stream = TcpSocket::from_std_stream(socket.into()).connect(remote).await?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = connector.connect(ServerName::try_from(SERVER_NAME)?, stream).await?;
        let (_, session) = stream.get_ref();
        let exporter =
            session.export_keying_material([0; 32], mesh_protocol::token::EXPORTER_LABEL, Some(b"".as_slice()))?;
        let server = server_key(session.peer_certificates())?;
        let (reader, writer) = tokio::io::split(stream);
        Ok(Connection {
            reader: Box::new(reader),
            writer: Box::new(writer),
            transport: Transport::Tls,
            server,
            exporter,
            quic: None,
        })
    }

    fn socket(&self, remote: SocketAddr, kind: Type, protocol: Protocol) -> std::io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(remote), kind, Some(protocol))?;
        socket.set_nonblocking(true)?;
        if self.mark != 0 {
            socket.set_mark(self.mark)?;
        }
        Ok(socket)
    }
}

/// Anything that stops an attempt; it becomes one line.
type Failure = Box<dyn std::error::Error + Send + Sync>;

fn transport_config() -> Result<quinn::TransportConfig, Failure> {
    let mut transport = quinn::TransportConfig::default();
    transport
        .max_idle_timeout(Some(IDLE.try_into()?))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_concurrent_uni_streams(quinn::VarInt::from_u32(0))
        .max_concurrent_bidi_streams(quinn::VarInt::from_u32(1))
        .stream_receive_window(quinn::VarInt::from_u32(QUIC_WINDOW))
        .receive_window(quinn::VarInt::from_u32(QUIC_WINDOW))
        .datagram_receive_buffer_size(None);
    Ok(transport)
}

fn server_key(shown: Option<&[CertificateDer<'_>]>) -> Result<VerifyKey, Failure> {
    let shown = shown.and_then(|shown| shown.first()).ok_or("the keyserver showed no key")?;
    Ok(tls::peer_key(shown)?)
}

async fn resolve(address: &str) -> Result<Vec<SocketAddr>, ConnectError> {
    let failed = |reason: String| ConnectError::Resolve { address: address.to_owned(), reason };
    let found = timeout(RESOLVE, tokio::net::lookup_host(address)).await;
    let found = found.map_err(|_| failed("the name service does not answer".to_owned()))?;
    let found: Vec<SocketAddr> = found.map_err(|error| failed(error.to_string()))?.take(MOST_ADDRESSES).collect();
    if found.is_empty() { Err(failed("no address".to_owned())) } else { Ok(found) }
}
