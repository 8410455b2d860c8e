//! What is configured: keys, port, mark, peers and their allowed IPs, as the kernel's module keeps them.
//!
//! An allowed IP has one holder: the peer that claimed it last. A peer with our own key does not come in, and goes when the
//! key becomes ours.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    time::Duration,
};

use ipnet::IpNet;
use mesh_dataplane::{Lanes, LocalKey, PeerId, PeerSpec, PresharedKey, PublicKey, RemoteKey, SecretKey};

use crate::uapi::{AllowedIp, DeviceChange, PeerChange};

/// See the module.
#[derive(Debug, Default)]
pub struct Interface {
    identity: Option<Identity>,
    /// Counts our secret keys.
    key_epoch: u64,
    listen_port: u16,
    fwmark: u32,
    peers: BTreeMap<PeerId, Peer>,
    by_key: HashMap<PublicKey, PeerId>,
    /// Who holds a prefix, and the number under which it is in the holder's list.
    holders: HashMap<IpNet, (PeerId, u64)>,
    /// Numbers of peers that were removed, to be used again.
    free: Vec<PeerId>,
    /// Counts claims of allowed IPs and lives of peers.
    counter: u64,
}

#[derive(Debug)]
struct Identity {
    secret: SecretKey,
    public: PublicKey,
}

/// One peer.
#[derive(Debug)]
pub struct Peer {
    /// Its key.
    pub public_key: PublicKey,
    /// The preshared key, if there is one.
    pub preshared_key: Option<PresharedKey>,
    /// Where it is as far as is known here: configured, or seen when the data plane last forgot it.
    pub endpoint: Option<SocketAddr>,
    /// Seconds between keepalives; 0 for none.
    pub keepalive: u16,
    /// What it may send from, in the order in which it claimed them.
    pub allowed_ips: BTreeMap<u64, IpNet>,
    /// Traffic and handshakes that the data plane does not know of any more.
    pub past: Past,
    /// Another number makes the data plane forget all sessions with the peer.
    life: u64,
}

/// What a peer did before the data plane forgot it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Past {
    /// Bytes of datagrams sent.
    pub tx_bytes: u64,
    /// Bytes of datagrams received.
    pub rx_bytes: u64,
    /// When the last handshake was completed, since 1970.
    pub last_handshake: Duration,
}

/// What a change asks of the data plane beyond a new table.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Peers that were there before and got an endpoint.
    pub redirects: Vec<(PeerId, SocketAddr)>,
}

impl Interface {
    /// The secret key.
    pub fn secret(&self) -> Option<&SecretKey> {
        self.identity.as_ref().map(|identity| &identity.secret)
    }

    /// True if `change` brings another secret key, or takes it away.
    pub fn changes_key(&self, change: &DeviceChange) -> bool {
        change.private_key.as_ref().is_some_and(|key| key.as_ref() != self.secret())
    }

    /// UDP port; 0 for any.
    pub fn listen_port(&self) -> u16 {
        self.listen_port
    }

    /// Sets the port: the one asked for, or the one that the system chose.
    pub fn set_listen_port(&mut self, port: u16) {
        self.listen_port = port;
    }

    /// Mark of all datagrams; 0 for none.
    pub fn fwmark(&self) -> u32 {
        self.fwmark
    }

    /// All peers by their numbers.
    pub fn peers(&self) -> impl Iterator<Item = (PeerId, &Peer)> {
        self.peers.iter().map(|(id, peer)| (*id, peer))
    }

    /// The same, to change them.
    pub fn peers_mut(&mut self) -> impl Iterator<Item = (PeerId, &mut Peer)> {
        self.peers.iter_mut().map(|(id, peer)| (*id, peer))
    }

    /// Applies `change` but for the listen port, which is [`set_listen_port`](Self::set_listen_port)'s.
    pub fn apply(&mut self, change: DeviceChange) -> Effects {
        if let Some(fwmark) = change.fwmark {
            self.fwmark = fwmark;
        }
        if change.replace_peers {
            self.remove_all();
        }
        if let Some(key) = change.private_key {
            self.set_key(key);
        }
        let mut effects = Effects::default();
        for peer in change.peers {
            self.apply_to_peer(peer, &mut effects);
        }
        effects
    }

    /// Makes the data plane forget all sessions with the next table.
    pub fn begin_new_lives(&mut self) {
        self.counter += 1;
        for peer in self.peers.values_mut() {
            peer.life = self.counter;
        }
    }

    /// Our key as the data plane takes it.
    pub fn local_key(&self) -> Option<LocalKey> {
        let identity = self.identity.as_ref()?;
        Some(LocalKey { epoch: self.key_epoch, secret: identity.secret.clone() })
    }

    /// All peers as the data plane takes them.
    pub fn peer_specs(&self) -> Vec<PeerSpec> {
        let spec = |(id, peer): (&PeerId, &Peer)| PeerSpec {
            id: *id,
            keys: vec![RemoteKey { epoch: peer.life, public: peer.public_key }],
            preshared_key: peer.preshared_key.clone(),
            allowed_ips: peer.allowed_ips.values().copied().collect(),
            endpoints: peer.endpoint.into_iter().collect(),
            keepalive: (peer.keepalive > 0).then(|| Duration::from_secs(peer.keepalive.into())),
            lanes: Lanes::Plain,
        };
        self.peers.iter().map(spec).collect()
    }

    fn set_key(&mut self, secret: Option<SecretKey>) {
        if secret.as_ref() == self.secret() {
            return;
        }
        self.key_epoch += 1;
        self.identity = secret.map(|secret| Identity { public: secret.to_public(), secret });
        if let Some(public) = self.identity.as_ref().map(|identity| identity.public) {
            self.remove(&public);
        }
        self.begin_new_lives();
    }

    fn apply_to_peer(&mut self, change: PeerChange, effects: &mut Effects) {
        if change.remove {
            return self.remove(&change.public_key);
        }
        if self.identity.as_ref().is_some_and(|identity| identity.public == change.public_key) {
            return;
        }
        let known = self.by_key.get(&change.public_key).copied();
        let id = match known {
            Some(id) => id,
            None if change.update_only => return,
            None => match self.add(change.public_key) {
                Some(id) => id,
                None => return,
            },
        };
        if change.replace_allowed_ips {
            self.disclaim_all(id);
        }
        for allowed_ip in change.allowed_ips {
            self.claim(id, allowed_ip);
        }
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if let Some(key) = change.preshared_key {
            peer.preshared_key = key;
        }
        if let Some(keepalive) = change.keepalive {
            peer.keepalive = keepalive;
        }
        if let Some(endpoint) = change.endpoint {
            peer.endpoint = Some(endpoint);
            if known.is_some() {
                effects.redirects.push((id, endpoint));
            }
        }
    }

    /// A new peer; none beyond as many as the data plane can number.
    fn add(&mut self, public_key: PublicKey) -> Option<PeerId> {
        let id = self.free.pop().unwrap_or(PeerId(self.peers.len() as u32));
        if id > PeerId::MAX {
            return None;
        }
        self.counter += 1;
        let peer = Peer {
            public_key,
            preshared_key: None,
            endpoint: None,
            keepalive: 0,
            allowed_ips: BTreeMap::new(),
            past: Past::default(),
            life: self.counter,
        };
        self.peers.insert(id, peer);
        self.by_key.insert(public_key, id);
        Some(id)
    }

    fn remove(&mut self, public_key: &PublicKey) {
        let Some(id) = self.by_key.remove(public_key) else { return };
        self.disclaim_all(id);
        self.peers.remove(&id);
        self.free.push(id);
    }

    fn remove_all(&mut self) {
        self.peers.clear();
        self.by_key.clear();
        self.holders.clear();
        self.free.clear();
    }

    fn disclaim_all(&mut self, id: PeerId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        for prefix in std::mem::take(&mut peer.allowed_ips).values() {
            self.holders.remove(prefix);
        }
    }

    /// Gives an allowed IP to a peer, whoever had it, or takes it away from this one.
    fn claim(&mut self, id: PeerId, AllowedIp { remove, prefix }: AllowedIp) {
        match self.holders.get(&prefix).copied() {
            Some((holder, number)) if (holder == id) == remove => {
                self.holders.remove(&prefix);
                if let Some(peer) = self.peers.get_mut(&holder) {
                    peer.allowed_ips.remove(&number);
                }
            }
            // The peer has it, or another has what this one is to lose.
            Some(_) => return,
            None => {}
        }
        if remove {
            return;
        }
        self.counter += 1;
        self.holders.insert(prefix, (id, self.counter));
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.allowed_ips.insert(self.counter, prefix);
        }
    }
}
