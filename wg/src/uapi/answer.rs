//! The state of a device as lines.

use std::{
    fmt::{self, Display, Write as _},
    net::SocketAddr,
    time::Duration,
};

use ipnet::IpNet;
use mesh_dataplane::{PresharedKey, PublicKey, SecretKey};
use zeroize::Zeroizing;

use super::UapiError;

/// All that `get=1` tells of a device but its peers.
#[derive(Debug)]
pub struct State<'a> {
    /// The secret key, if there is one.
    pub private_key: Option<&'a SecretKey>,
    /// UDP port; 0 while it never had one.
    pub listen_port: u16,
    /// Mark of all datagrams; 0 for none.
    pub fwmark: u32,
}

/// All that it tells of a peer.
#[derive(Debug)]
pub struct PeerState<'a, P> {
    /// Its key.
    pub public_key: PublicKey,
    /// The preshared key, if there is one.
    pub preshared_key: Option<&'a PresharedKey>,
    /// Where it is, if known.
    pub endpoint: Option<SocketAddr>,
    /// When the last handshake was completed, since 1970; zero without one.
    pub last_handshake: Duration,
    /// Bytes of datagrams sent and received.
    pub tx_bytes: u64,
    /// See `tx_bytes`.
    pub rx_bytes: u64,
    /// Seconds between keepalives; 0 for none.
    pub keepalive: u16,
    /// What it may send from.
    pub allowed_ips: P,
}

/// An answer under way.
#[derive(Debug)]
pub struct Answer(Zeroizing<String>);

impl State<'_> {
    /// Begins the answer.
    pub fn begin(&self) -> Answer {
        let mut answer = Answer(Zeroizing::new(String::new()));
        if let Some(key) = self.private_key {
            answer.add("private_key", Hex(key.expose()));
        }
        answer.add("listen_port", self.listen_port);
        if self.fwmark != 0 {
            answer.add("fwmark", self.fwmark);
        }
        answer
    }
}

impl Answer {
    /// Adds a peer.
    pub fn peer<'p>(&mut self, peer: PeerState<'_, impl IntoIterator<Item = &'p IpNet>>) {
        self.add("public_key", Hex(peer.public_key.as_bytes()));
        self.add("preshared_key", Hex(peer.preshared_key.map_or(&[0; 32], PresharedKey::expose)));
        self.add("protocol_version", 1);
        if let Some(endpoint) = peer.endpoint {
            self.add("endpoint", endpoint);
        }
        self.add("last_handshake_time_sec", peer.last_handshake.as_secs());
        self.add("last_handshake_time_nsec", peer.last_handshake.subsec_nanos());
        self.add("tx_bytes", peer.tx_bytes);
        self.add("rx_bytes", peer.rx_bytes);
        self.add("persistent_keepalive_interval", peer.keepalive);
        for prefix in peer.allowed_ips {
            self.add("allowed_ip", prefix);
        }
    }

    /// The whole text.
    pub fn end(mut self) -> Zeroizing<String> {
        self.0.push_str(end(Ok(())).as_str());
        self.0
    }

    fn add(&mut self, key: &str, value: impl Display) {
        // A String takes everything.
        let _ = writeln!(self.0, "{key}={value}");
    }
}

/// How every answer ends.
pub(crate) fn end(result: Result<(), UapiError>) -> String {
    let errno = result.err().map_or(0, UapiError::errno);
    format!("errno={errno}\n\n")
}

/// Bytes in hex, without a copy that somebody has to wipe.
struct Hex<'a>(&'a [u8; 32]);

impl Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
