//! A userspace WireGuard data plane: packets between TUN queues and UDP sockets.
//!
//! An [`engine::Engine`] runs one *lane* per OS thread. A lane owns one TUN queue, one UDP socket and all tunnels that
//! were made on it, so no lock is taken and no other thread is woken per packet:
//!
//! ```text
//! packet out   tun -> lane/outbound -> table/prefix -> peer -> packet/segment -> peer/tunnel -> udp
//! packet in    udp -> lane/inbound -> peer/index -> peer/tunnel -> table (is the source this peer's?)
//!              -> packet/coalesce -> tun
//! ```
//!
//! Whoever controls it hands over a whole immutable [`table::Table`] (peers, keys, allowed IPs, endpoints) at each
//! change, sends [`command::Command`]s and reads [`command::Event`]s and a [`command::Snapshot`]. Peers keep their
//! tunnels over a change of table; a peer that is no longer in it loses them at once.
//!
//! Every tunnel is plain WireGuard. A peer may have several at a time, one for each pair of key epochs: that is what
//! lets keys rotate without losing a packet.

pub mod buffer;
pub mod clock;
pub mod command;
pub mod drop_reason;
pub mod engine;
pub mod key;
pub mod lane;
pub mod packet;
mod peer;
mod random;
pub mod selfcheck;
pub mod table;
pub mod tun;
pub mod udp;

pub use command::{
    AgreedPair, Agreement, Command, Event, Origin, PathSnapshot, PeerSnapshot, Snapshot, TunnelSnapshot,
};
pub use drop_reason::{DropCounters, DropReason};
pub use engine::{Engine, EngineConfig, EngineError, Events, LaneParts};
pub use key::{PresharedKey, PublicKey, SecretKey};
pub use table::{Lanes, LocalKey, PeerId, PeerSpec, Preshared, RemoteKey, Table, TableError, TableSpec};
