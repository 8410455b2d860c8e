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
            preshared: peer.preshared_key.clone().into(),
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use mesh_dataplane::{Table, TableSpec};
    use proptest::prelude::*;

    use super::*;

    fn secret(n: u8) -> SecretKey {
        SecretKey::new([n; 32])
    }

    /// Few keys and prefixes, so that they meet.
    fn peer_change() -> impl Strategy<Value = PeerChange> {
        let prefixes = ["10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0", "::/0", "fd00::/8", "10.1.2.3/32"];
        let prefix = proptest::sample::select(prefixes.to_vec());
        let allowed =
            (any::<bool>(), prefix).prop_map(|(remove, text)| AllowedIp { remove, prefix: text.parse().unwrap() });
        let allowed = proptest::collection::vec(allowed, 0..4);
        let flags = (0..6u8, any::<bool>(), any::<bool>(), any::<bool>(), any::<Option<u16>>());
        (1..6u8, flags, allowed).prop_map(|(key, (remove, update_only, replace, endpoint, keepalive), allowed_ips)| {
            PeerChange {
                remove: remove == 0,
                update_only,
                endpoint: endpoint.then(|| ([192, 0, 2, key], 7).into()),
                keepalive,
                replace_allowed_ips: replace,
                allowed_ips,
                ..PeerChange::new(secret(key).to_public())
            }
        })
    }

    fn change() -> impl Strategy<Value = DeviceChange> {
        let key = proptest::option::weighted(0.2, (0..6u8).prop_map(|n| (n > 0).then(|| secret(n))));
        (key, 0..8u8, proptest::collection::vec(peer_change(), 0..5)).prop_map(|(private_key, replace, peers)| {
            DeviceChange { private_key, replace_peers: replace == 0, peers, ..DeviceChange::default() }
        })
    }

    /// The same in the simplest way: who has what, in the order of claims.
    #[derive(Debug, Default, PartialEq)]
    struct Model {
        own: Option<PublicKey>,
        peers: BTreeMap<PublicKey, Vec<IpNet>>,
    }

    impl Model {
        fn apply(&mut self, change: &DeviceChange) {
            if change.replace_peers {
                self.peers.clear();
            }
            if let Some(key) = &change.private_key {
                self.own = key.as_ref().map(SecretKey::to_public);
                self.own.map(|own| self.peers.remove(&own));
            }
            for peer in &change.peers {
                let key = peer.public_key;
                if peer.remove {
                    self.peers.remove(&key);
                    continue;
                }
                if self.own == Some(key) || peer.update_only && !self.peers.contains_key(&key) {
                    continue;
                }
                let list = self.peers.entry(key).or_default();
                if peer.replace_allowed_ips {
                    list.clear();
                }
                for allowed in &peer.allowed_ips {
                    if allowed.remove {
                        self.peers.get_mut(&key).unwrap().retain(|prefix| *prefix != allowed.prefix);
                    } else if !self.peers[&key].contains(&allowed.prefix) {
                        self.peers.values_mut().for_each(|list| list.retain(|prefix| *prefix != allowed.prefix));
                        self.peers.get_mut(&key).unwrap().push(allowed.prefix);
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_changes_do_what_the_model_does(changes in proptest::collection::vec(change(), 1..20)) {
            let (mut interface, mut model) = (Interface::default(), Model::default());
            for change in changes {
                model.apply(&change);
                interface.apply(change);
                let list = |peer: &Peer| (peer.public_key, peer.allowed_ips.values().copied().collect());
                let peers: BTreeMap<PublicKey, Vec<IpNet>> = interface.peers().map(|(_, peer)| list(peer)).collect();
                prop_assert_eq!(&peers, &model.peers);
                prop_assert_eq!(interface.secret().map(SecretKey::to_public), model.own);
                // What the data plane gets is a table that it takes.
                let local_keys = vec![interface.local_key().unwrap_or(LocalKey { epoch: 0, secret: secret(99) })];
                let spec = TableSpec { local_keys, peers: interface.peer_specs(), plain: true, ..TableSpec::default() };
                prop_assert!(Table::new(spec).is_ok());
            }
        }
    }

    #[test]
    fn only_endpoints_of_known_peers_are_redirected() {
        let mut interface = Interface::default();
        let mut change = PeerChange::new(secret(1).to_public());
        change.endpoint = Some(([192, 0, 2, 1], 7).into());
        let change = DeviceChange { peers: vec![change], ..DeviceChange::default() };
        assert_eq!(interface.apply(change.clone()).redirects, []);
        assert_eq!(interface.apply(change).redirects, [(PeerId(0), ([192, 0, 2, 1], 7).into())]);
    }
}
