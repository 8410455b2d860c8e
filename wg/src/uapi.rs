//! WireGuard's cross-platform configuration protocol: lines of `key=value`, an operation ends with an empty line.
//!
//! Source: <https://www.wireguard.com/xplatform/>; where it is silent, what wireguard-go does. One thing is stricter here:
//! an operation is read whole before anything of it is done, so one that fails changes nothing.

mod answer;
mod parse;

use std::net::SocketAddr;

use ipnet::IpNet;
use mesh_dataplane::{PresharedKey, PublicKey, SecretKey};

pub(crate) use answer::end;
pub use answer::{Answer, PeerState, State};
pub use parse::{MAX_LINE, Parser};

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Everything there is to know.
    Get,
    /// Changes.
    Set(DeviceChange),
}

/// Changes to the device, then to its peers in order. What is `None` stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceChange {
    /// The secret key; `Some(None)` takes it away.
    pub private_key: Option<Option<SecretKey>>,
    /// UDP port; 0 for any.
    pub listen_port: Option<u16>,
    /// Mark of all datagrams; 0 for none.
    pub fwmark: Option<u32>,
    /// Remove all peers first.
    pub replace_peers: bool,
    /// Changes to peers.
    pub peers: Vec<PeerChange>,
}

/// Changes to one peer, which is made if it is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerChange {
    /// Which.
    pub public_key: PublicKey,
    /// Remove it; nothing else matters then.
    pub remove: bool,
    /// Do nothing if it is not there.
    pub update_only: bool,
    /// The preshared key; `Some(None)` takes it away.
    pub preshared_key: Option<Option<PresharedKey>>,
    /// Where it is.
    pub endpoint: Option<SocketAddr>,
    /// Seconds between keepalives; 0 for none.
    pub keepalive: Option<u16>,
    /// Take away all its allowed IPs first.
    pub replace_allowed_ips: bool,
    /// Allowed IPs to add or take away, in order.
    pub allowed_ips: Vec<AllowedIp>,
}

impl PeerChange {
    /// No change to this peer but that it is to be there.
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            keepalive: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
        }
    }
}

/// One allowed IP to add to a peer, or to take away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllowedIp {
    /// Take it away, if the peer has it.
    pub remove: bool,
    /// The prefix, without host bits.
    pub prefix: IpNet,
}

/// Why an operation failed. Clients see the number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UapiError {
    /// The line is no `key=value`, is too long, or no such operation exists.
    #[error("protocol error")]
    Protocol,
    /// No such key, or no such value.
    #[error("invalid key or value")]
    Invalid,
    /// Another process has the port.
    #[error("port in use")]
    PortInUse,
    /// The system refused.
    #[error("input/output error")]
    Io,
}

impl UapiError {
    /// The number on the wire: a negated errno of Linux.
    pub const fn errno(self) -> i32 {
        match self {
            UapiError::Protocol => -71,
            UapiError::Invalid => -22,
            UapiError::PortInUse => -98,
            UapiError::Io => -5,
        }
    }
}
