//! Peers, keys and allowed IPs as one immutable value.
//!
//! Control builds a [`Table`] whenever anything changed and hands it to all lanes whole. A lane compares it with what it
//! has: tunnels of peers that stay are left alone, those of peers that are gone are dropped.

pub mod prefix;

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;

use crate::{
    key::{PresharedKey, PublicKey, SecretKey},
    lane::MAX_LANES,
};
use prefix::PrefixMap;

/// Number of a peer: small, chosen by control, stable as long as the peer is the same.
///
/// Lanes index arrays by it: at most [`PeerId::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u32);

impl PeerId {
    /// Largest number a peer may have: with 8 bytes for each of 8 pairs of lanes, the lanes' arrays stay under 64 MiB.
    pub const MAX: PeerId = PeerId(1_000_000);
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One of our static keys.
#[derive(Debug, Clone)]
pub struct LocalKey {
    /// Counts our keys; the newest has the highest.
    pub epoch: u64,
    /// The secret.
    pub secret: SecretKey,
}

/// One of a peer's static keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteKey {
    /// Counts the peer's keys.
    pub epoch: u64,
    /// The key.
    pub public: PublicKey,
}

/// What a peer knows of lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lanes {
    /// Nothing: it is plain WireGuard. Our lane 0 carries all its packets.
    #[default]
    Plain,
    /// It has so many, a power of two up to 8, each on a port of its own: the endpoint's and the next ones.
    Each(u8),
}

impl Lanes {
    /// How many it has.
    pub fn count(self) -> u8 {
        match self {
            Lanes::Plain => 1,
            Lanes::Each(count) => count.max(1),
        }
    }
}

/// Where the preshared keys of a peer's tunnels come from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Preshared {
    /// There are none.
    #[default]
    None,
    /// All its tunnels have this one.
    Static(PresharedKey),
    /// Each tunnel has one of its own, by [`Command::Agree`](crate::Command::Agree); without, there is no tunnel.
    Agreed {
        /// Where both ends began at once, the tunnel that this end began is preferred: true at one end and false at the other.
        own_first: bool,
    },
}

impl From<Option<PresharedKey>> for Preshared {
    fn from(key: Option<PresharedKey>) -> Self {
        key.map_or(Preshared::None, Preshared::Static)
    }
}

/// All that the data plane knows of one peer.
#[derive(Debug, Clone)]
pub struct PeerSpec {
    /// Its number.
    pub id: PeerId,
    /// Its keys: the first is the one we initiate to; all are accepted when it initiates.
    pub keys: Vec<RemoteKey>,
    /// Secrets shared with it, mixed into each handshake.
    pub preshared: Preshared,
    /// Inner prefixes sent to it and accepted from it. Host bits are ignored.
    pub allowed_ips: Vec<IpNet>,
    /// Where its lane 0 may be reached, best first. May be empty: then only the peer can begin.
    pub endpoints: Vec<SocketAddr>,
    /// Keep a session up and send an empty packet whenever nothing was sent for so long.
    pub keepalive: Option<Duration>,
    /// Its lanes.
    pub lanes: Lanes,
}

/// What a [`Table`] is made of.
#[derive(Debug, Clone)]
pub struct TableSpec {
    /// Our keys, newest first. We initiate with the first; all answer handshakes.
    pub local_keys: Vec<LocalKey>,
    /// All peers.
    pub peers: Vec<PeerSpec>,
    /// Our own inner prefixes. Packets from outside must go to them and never come from them; packets we send must come
    /// from them. Empty: neither is checked.
    pub own_prefixes: Vec<IpNet>,
    /// Largest inner packet in bytes. Larger ones are answered with "packet too big"; TCP is clamped to it.
    pub inner_mtu: u16,
    /// Over which time tunnels on new keys are opened, at random, so that not all begin at once.
    pub rotation_spread: Duration,
    /// Be a plain WireGuard device, as the kernel's is: packets pass as they are, whatever their addresses and size, with
    /// TCP not clamped; a peer has one endpoint, which follows its traffic; an MTU may be small; a peer of low order is
    /// listed and never talked to.
    pub plain: bool,
}

impl Default for TableSpec {
    /// No keys, no peers; an inner MTU of 1420 and a spread of two minutes.
    fn default() -> Self {
        Self {
            local_keys: Vec::new(),
            peers: Vec::new(),
            own_prefixes: Vec::new(),
            inner_mtu: 1420,
            rotation_spread: Duration::from_secs(120),
            plain: false,
        }
    }
}

/// Why a table was refused. All are mistakes of control; the old table stays in use.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableError {
    /// A table needs a key to talk with.
    #[error("no local key")]
    NoLocalKey,
    /// Two local keys have one epoch, or they are not newest first.
    #[error("local keys are not in order of falling epochs at epoch {epoch}")]
    LocalKeyOrder {
        /// Where the order breaks.
        epoch: u64,
    },
    /// The number is above [`PeerId::MAX`].
    #[error("peer number {0} is too large")]
    PeerIdTooLarge(PeerId),
    /// Two peers have one number.
    #[error("peer number {0} is used twice")]
    PeerIdTwice(PeerId),
    /// A peer has no key.
    #[error("peer {0} has no key")]
    NoRemoteKey(PeerId),
    /// A key belongs to two peers, or to us and a peer, or to one peer twice.
    #[error("{key:?} of peer {peer} has another holder")]
    KeyTwice {
        /// The key.
        key: PublicKey,
        /// Its second holder.
        peer: PeerId,
    },
    /// A key with which every shared secret is zero.
    #[error("{key:?} of peer {peer} is of low order")]
    LowOrderKey {
        /// The key.
        key: PublicKey,
        /// Who has it.
        peer: PeerId,
    },
    /// Two holders of exactly one prefix.
    #[error("{prefix} of {second} is already held by {first}")]
    PrefixTwice {
        /// The prefix.
        prefix: IpNet,
        /// Who has it.
        first: Owner,
        /// Who wants it too.
        second: Owner,
    },
    /// Nothing can be sent to such an address.
    #[error("endpoint {endpoint} of peer {peer} is an unspecified, multicast or zero-port address")]
    BadEndpoint {
        /// The endpoint.
        endpoint: SocketAddr,
        /// Whose it is.
        peer: PeerId,
    },
    /// Not a power of two up to 8.
    #[error("peer {peer} has {lanes} lanes, must be 1, 2, 4 or 8")]
    BadLanes {
        /// How many.
        lanes: u8,
        /// Whose.
        peer: PeerId,
    },
    /// Below what IPv4 and IPv6 need.
    #[error("inner MTU {0} is outside 1280..=65000")]
    BadMtu(u16),
}

/// Whose an inner address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// Ours.
    Own,
    /// A peer's.
    Peer(PeerId),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Own => f.write_str("ourselves"),
            Owner::Peer(id) => write!(f, "peer {id}"),
        }
    }
}

/// Peers, keys and allowed IPs: checked, immutable, shared by all lanes.
#[derive(Debug)]
pub struct Table {
    spec: TableSpec,
    by_id: HashMap<PeerId, usize>,
    by_key: HashMap<PublicKey, (PeerId, u64)>,
    local_publics: Vec<PublicKey>,
    prefixes: PrefixMap,
    /// Of the first lanes of peers, in order.
    endpoints: Vec<(SocketAddr, PeerId)>,
}

impl Table {
    /// Checks `spec` and builds the look-ups.
    ///
    /// # Errors
    ///
    /// See [`TableError`]; nothing is half applied.
    pub fn new(mut spec: TableSpec) -> Result<Self, TableError> {
        if !spec.plain && !(1280..=65_000).contains(&spec.inner_mtu) {
            return Err(TableError::BadMtu(spec.inner_mtu));
        }
        let local_publics = check_local_keys(&spec.local_keys)?;
        let mut by_id = HashMap::with_capacity(spec.peers.len());
        let mut by_key = HashMap::with_capacity(spec.peers.len() * 3);
        for (position, peer) in spec.peers.iter().enumerate() {
            if peer.id > PeerId::MAX {
                return Err(TableError::PeerIdTooLarge(peer.id));
            }
            if !spec.plain {
                check_peer(peer)?;
            }
            if by_id.insert(peer.id, position).is_some() {
                return Err(TableError::PeerIdTwice(peer.id));
            }
            for remote in &peer.keys {
                let key = remote.public;
                if spec.plain && crate::peer::curve::is_low_order(&key) {
                    // Whoever speaks for such a key proves nothing.
                    continue;
                }
                let taken = by_key.insert(key, (peer.id, remote.epoch)).is_some();
                if taken || local_publics.contains(&key) {
                    return Err(TableError::KeyTwice { key, peer: peer.id });
                }
            }
        }
        for prefix in &mut spec.own_prefixes {
            *prefix = prefix.trunc();
        }
        for prefix in spec.peers.iter_mut().flat_map(|peer| &mut peer.allowed_ips) {
            *prefix = prefix.trunc();
        }
        let own = spec.own_prefixes.iter().map(|prefix| (*prefix, Owner::Own));
        let peers =
            spec.peers.iter().flat_map(|peer| peer.allowed_ips.iter().map(|prefix| (*prefix, Owner::Peer(peer.id))));
        let prefixes = PrefixMap::new(own.chain(peers))?;
        let of_peers = spec.peers.iter().flat_map(|peer| peer.endpoints.iter().map(|at| (*at, peer.id)));
        let mut endpoints: Vec<_> = of_peers.collect();
        endpoints.sort_unstable();
        Ok(Self { spec, by_id, by_key, local_publics, prefixes, endpoints })
    }

    /// Whose `address` is, by the longest prefix over all peers and our own.
    pub fn owner(&self, address: IpAddr) -> Option<Owner> {
        self.prefixes.lookup(address)
    }

    /// True if a peer may be reached at this address.
    pub fn is_endpoint(&self, address: IpAddr) -> bool {
        let first = self.endpoints.partition_point(|(at, _)| at.ip() < address);
        self.endpoints.get(first).is_some_and(|(at, _)| at.ip() == address)
    }

    /// A peer that may be reached at this address on its first lane; one of them if there are more.
    pub fn peer_at(&self, address: SocketAddr) -> Option<&PeerSpec> {
        let first = self.endpoints.partition_point(|(at, _)| *at < address);
        self.endpoints.get(first).filter(|(at, _)| *at == address).and_then(|(_, id)| self.peer(*id))
    }

    /// A peer by its number.
    pub fn peer(&self, id: PeerId) -> Option<&PeerSpec> {
        self.by_id.get(&id).map(|&position| &self.spec.peers[position])
    }

    /// All peers, in the order given.
    pub fn peers(&self) -> &[PeerSpec] {
        &self.spec.peers
    }

    /// Whose static key this is, and its epoch.
    pub fn peer_of_key(&self, key: &PublicKey) -> Option<(PeerId, u64)> {
        self.by_key.get(key).copied()
    }

    /// Our keys, newest first.
    pub fn local_keys(&self) -> &[LocalKey] {
        &self.spec.local_keys
    }

    /// The public keys of [`local_keys`](Self::local_keys), in the same order.
    pub fn local_publics(&self) -> &[PublicKey] {
        &self.local_publics
    }

    /// Our key of this epoch.
    pub fn local_key(&self, epoch: u64) -> Option<&LocalKey> {
        self.spec.local_keys.iter().find(|key| key.epoch == epoch)
    }

    /// True if sources and destinations are to be checked against our own prefixes.
    pub fn checks_own(&self) -> bool {
        !self.spec.own_prefixes.is_empty()
    }

    /// Largest inner packet, in bytes.
    pub fn inner_mtu(&self) -> u16 {
        self.spec.inner_mtu
    }

    /// True if it is a plain WireGuard device's: see [`TableSpec::plain`].
    pub fn is_plain(&self) -> bool {
        self.spec.plain
    }

    /// Over which time tunnels on new keys are opened.
    pub fn rotation_spread(&self) -> Duration {
        self.spec.rotation_spread
    }
}

/// Checks the order of our keys and computes their public halves.
fn check_local_keys(keys: &[LocalKey]) -> Result<Vec<PublicKey>, TableError> {
    if keys.is_empty() {
        return Err(TableError::NoLocalKey);
    }
    for pair in keys.windows(2) {
        if pair[0].epoch <= pair[1].epoch {
            return Err(TableError::LocalKeyOrder { epoch: pair[1].epoch });
        }
    }
    Ok(keys.iter().map(|key| key.secret.to_public()).collect())
}

/// Checks one peer by itself.
fn check_peer(peer: &PeerSpec) -> Result<(), TableError> {
    if peer.keys.is_empty() {
        return Err(TableError::NoRemoteKey(peer.id));
    }
    if let Lanes::Each(lanes) = peer.lanes
        && !(lanes.is_power_of_two() && usize::from(lanes) <= MAX_LANES)
    {
        return Err(TableError::BadLanes { lanes, peer: peer.id });
    }
    for remote in &peer.keys {
        if crate::peer::curve::is_low_order(&remote.public) {
            return Err(TableError::LowOrderKey { key: remote.public, peer: peer.id });
        }
    }
    for endpoint in &peer.endpoints {
        let ip = endpoint.ip();
        if ip.is_unspecified() || ip.is_multicast() || endpoint.port() == 0 {
            return Err(TableError::BadEndpoint { endpoint: *endpoint, peer: peer.id });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn secret(n: u8) -> SecretKey {
        SecretKey::new([n; 32])
    }

    fn peer(id: u32, prefix: &str) -> PeerSpec {
        PeerSpec {
            id: PeerId(id),
            keys: vec![RemoteKey { epoch: 1, public: secret(id as u8 + 100).to_public() }],
            preshared: Preshared::None,
            allowed_ips: vec![prefix.parse().unwrap()],
            endpoints: Vec::new(),
            keepalive: None,
            lanes: Lanes::Plain,
        }
    }

    fn spec() -> TableSpec {
        TableSpec {
            local_keys: vec![LocalKey { epoch: 2, secret: secret(2) }, LocalKey { epoch: 1, secret: secret(1) }],
            peers: vec![peer(1, "10.1.0.0/16"), peer(2, "10.2.0.0/16")],
            own_prefixes: vec!["10.9.0.0/16".parse().unwrap()],
            ..TableSpec::default()
        }
    }

    fn refusal(change: impl FnOnce(&mut TableSpec)) -> String {
        let mut spec = spec();
        change(&mut spec);
        Table::new(spec).unwrap_err().to_string()
    }

    #[test]
    fn mistakes_are_named() {
        type Case = (&'static str, fn(&mut TableSpec));
        let cases: [Case; 12] = [
            ("no local key", |s| s.local_keys.clear()),
            ("local keys are not in order", |s| s.local_keys.reverse()),
            ("peer number 1 is used twice", |s| {
                s.peers[1] = PeerSpec { keys: peer(9, "::/0").keys, ..peer(1, "::/0") }
            }),
            ("peer number 1000001 is too large", |s| s.peers[0].id = PeerId(1_000_001)),
            ("peer 1 has 3 lanes", |s| s.peers[0].lanes = Lanes::Each(3)),
            ("peer 1 has 16 lanes", |s| s.peers[0].lanes = Lanes::Each(16)),
            ("peer 2 has no key", |s| s.peers[1].keys.clear()),
            ("of peer 2 has another holder", |s| s.peers[1].keys = s.peers[0].keys.clone()),
            ("of peer 1 has another holder", |s| s.peers[0].keys[0].public = secret(1).to_public()),
            ("of peer 1 is of low order", |s| s.peers[0].keys[0].public = PublicKey::new([0; 32])),
            ("10.1.0.0/16 of peer 2 is already held by peer 1", |s| {
                s.peers[1].allowed_ips = vec!["10.1.3.4/16".parse().unwrap()];
            }),
            ("inner MTU 1279", |s| s.inner_mtu = 1279),
        ];
        for (message, change) in cases {
            let refusal = refusal(change);
            assert!(refusal.contains(message), "{refusal}");
        }
        assert!(refusal(|s| s.peers[0].endpoints = vec![([0, 0, 0, 0], 9).into()]).contains("endpoint"));
    }

    #[test]
    fn the_longest_prefix_of_all_peers_owns() {
        let mut spec = spec();
        spec.peers[1].allowed_ips.push("10.1.7.0/24".parse().unwrap());
        let table = Table::new(spec).unwrap();
        let owner = |text: &str| table.owner(text.parse().unwrap());
        assert_eq!(owner("10.1.6.1"), Some(Owner::Peer(PeerId(1))));
        assert_eq!(owner("10.1.7.1"), Some(Owner::Peer(PeerId(2))));
        assert_eq!(owner("10.9.0.1"), Some(Owner::Own));
        assert_eq!(owner("10.3.0.1"), None);
    }
}
