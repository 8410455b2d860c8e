//! A passive recorder with a quantum computer: it has the whole capture and every X25519 private key of both nodes, the
//! ephemeral ones too. Without a preshared key it reads everything; with one from an offer, nothing.
//!
//! The initiator is written here from the WireGuard whitepaper (section 5.4), so that its ephemeral key is known; with it and
//! both static keys every Diffie-Hellman result of the handshake can be computed by an onlooker. The responder is the data plane.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use blake2::digest::{FixedOutput as _, KeyInit as _, Update as _};
use blake2::{Blake2s256, Blake2sMac, Digest, digest::consts::U16};
use mesh_dataplane::clock::Instant;
use mesh_dataplane::lane::{Lane, LaneConfig, Output};
use mesh_dataplane::packet::dscp::Dscp;
use mesh_dataplane::{
    Agreement, Lanes, LocalKey, PeerId, PeerSpec, Preshared, PublicKey, RemoteKey, SecretKey, Table, TableSpec,
};
use mesh_protocol::key::{TunnelKey, TunnelSecret};
use x25519_dalek::{PublicKey as Point, StaticSecret};

use super::book::tests::{at, ends, made, secret};

const MARKER: &[u8] = b"what nobody else may read";
const NO_KEY: [u8; 32] = [0; 32];

fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Blake2s256::default();
    parts.iter().for_each(|part| Digest::update(&mut hasher, part));
    Digest::finalize(hasher).into()
}

/// HMAC-BLAKE2s (RFC 2104).
fn hmac(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let (mut inner, mut outer) = ([0x36; 64], [0x5c; 64]);
    for (n, byte) in key.iter().enumerate() {
        inner[n] ^= byte;
        outer[n] ^= byte;
    }
    let input: Vec<&[u8]> = std::iter::once(&inner[..]).chain(parts.iter().copied()).collect();
    hash(&[&outer, &hash(&input)])
}

fn kdf<const N: usize>(chain: &[u8; 32], input: &[u8]) -> [[u8; 32]; N] {
    let secret = hmac(chain, &[input]);
    let mut keys = [[0; 32]; N];
    let mut before: Vec<u8> = Vec::new();
    for (n, key) in keys.iter_mut().enumerate() {
        *key = hmac(&secret, &[&before, &[n as u8 + 1]]);
        before = key.to_vec();
    }
    keys
}

fn aead(key: &[u8; 32], counter: u64) -> (LessSafeKey, Nonce) {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).unwrap());
    (key, Nonce::assume_unique_for_key(nonce))
}

fn seal(key: &[u8; 32], counter: u64, plain: &[u8], with: &[u8]) -> Vec<u8> {
    let (key, nonce) = aead(key, counter);
    let mut bytes = plain.to_vec();
    key.seal_in_place_append_tag(nonce, Aad::from(with), &mut bytes).unwrap();
    bytes
}

fn open(key: &[u8; 32], counter: u64, sealed: &[u8], with: &[u8]) -> Option<Vec<u8>> {
    let (key, nonce) = aead(key, counter);
    let mut bytes = sealed.to_vec();
    key.open_in_place(nonce, Aad::from(with), &mut bytes).ok().map(|plain| plain.to_vec())
}

/// The private keys that a quantum computer gets out of the capture.
struct Broken {
    initiator: StaticSecret,
    ephemeral: StaticSecret,
    responder: Point,
}

/// Chaining key and hash, after the initiation.
struct Noise {
    chain: [u8; 32],
    hash: [u8; 32],
}

impl Broken {
    fn begin(&self) -> Noise {
        let chain = hash(&[b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"]);
        let start = hash(&[&hash(&[&chain, b"WireGuard v1 zx2c4 Jason@zx2c4.com"]), self.responder.as_bytes()]);
        let ephemeral = Point::from(&self.ephemeral);
        let [chain] = kdf(&chain, ephemeral.as_bytes());
        Noise { chain, hash: hash(&[&start, ephemeral.as_bytes()]) }
    }

    /// The initiation that the holder of these keys sends.
    fn initiation(&self, sender: u32) -> (Vec<u8>, Noise) {
        let mut noise = self.begin();
        let mut message = vec![1, 0, 0, 0];
        message.extend(sender.to_le_bytes());
        message.extend(Point::from(&self.ephemeral).as_bytes());
        let [chain, key] = kdf(&noise.chain, self.ephemeral.diffie_hellman(&self.responder).as_bytes());
        let sealed = seal(&key, 0, Point::from(&self.initiator).as_bytes(), &noise.hash);
        noise = Noise { chain, hash: hash(&[&noise.hash, &sealed]) };
        message.extend(&sealed);
        let [chain, key] = kdf(&noise.chain, self.initiator.diffie_hellman(&self.responder).as_bytes());
        let sealed = seal(&key, 0, &[0x40, 0, 0, 0, 0x65, 0, 0, 0, 0, 0, 0, 1], &noise.hash);
        noise = Noise { chain, hash: hash(&[&noise.hash, &sealed]) };
        message.extend(&sealed);
        let mac_key = hash(&[b"mac1----", self.responder.as_bytes()]);
        let mut mac = Blake2sMac::<U16>::new_from_slice(&mac_key).unwrap();
        mac.update(&message);
        message.extend(mac.finalize_fixed());
        message.resize(148, 0);
        (message, noise)
    }

    /// Session keys (to and from the responder) after its response; `None` if the preshared key is another.
    fn finish(&self, noise: &Noise, response: &[u8], psk: &[u8; 32]) -> Option<[[u8; 32]; 2]> {
        let ephemeral = Point::from(<[u8; 32]>::try_from(&response[12..44]).unwrap());
        let [chain] = kdf(&noise.chain, ephemeral.as_bytes());
        let digest = hash(&[&noise.hash, ephemeral.as_bytes()]);
        let [chain] = kdf(&chain, self.ephemeral.diffie_hellman(&ephemeral).as_bytes());
        let [chain] = kdf(&chain, self.initiator.diffie_hellman(&ephemeral).as_bytes());
        let [chain, mix, key] = kdf(&chain, psk);
        open(&key, 0, &response[44..60], &hash(&[&digest, &mix]))?;
        Some(kdf(&chain, &[]))
    }
}

/// Everything that crossed the wire, in order.
#[derive(Default)]
struct Capture {
    offer: Option<Vec<u8>>,
    initiation: Vec<u8>,
    response: Vec<u8>,
    data: Vec<u8>,
}

impl Capture {
    /// Reads the data with all private keys and a guess at the preshared key.
    fn read(&self, broken: &Broken, psk: &[u8; 32]) -> Option<Vec<u8>> {
        let sender = u32::from_le_bytes(self.initiation[4..8].try_into().unwrap());
        let (same, noise) = broken.initiation(sender);
        assert_eq!(same, self.initiation, "the recorder follows the handshake with the keys it broke");
        let [to, _] = broken.finish(&noise, &self.response, psk)?;
        let counter = u64::from_le_bytes(self.data[8..16].try_into().unwrap());
        open(&to, counter, &self.data[16..], &[])
    }
}

fn packet() -> Vec<u8> {
    let mut packet = vec![0; 64];
    packet[0] = 0x45;
    packet[3] = 64;
    packet[8..10].copy_from_slice(&[64, 17]);
    packet[12..16].copy_from_slice(&[10, 1, 0, 1]);
    packet[16..20].copy_from_slice(&[10, 2, 0, 1]);
    packet[28..28 + MARKER.len()].copy_from_slice(MARKER);
    packet
}

/// The responder: one lane of the data plane.
struct Responder {
    lane: Lane,
    out: Output,
    now: Instant,
}

impl Responder {
    fn new(secret: &TunnelSecret, peer: TunnelKey, preshared: Preshared) -> Self {
        let spec = PeerSpec {
            id: PeerId(1),
            keys: vec![RemoteKey { epoch: 2, public: PublicKey::new(*peer.as_bytes()) }],
            preshared,
            allowed_ips: vec!["10.1.0.0/16".parse().unwrap()],
            endpoints: Vec::new(),
            keepalive: None,
            lanes: Lanes::Each(1),
        };
        let table = TableSpec {
            local_keys: vec![LocalKey { epoch: 2, secret: SecretKey::new(*secret.bytes()) }],
            peers: vec![spec],
            own_prefixes: vec!["10.2.0.0/16".parse().unwrap()],
            ..TableSpec::default()
        };
        let config = LaneConfig {
            lane: 0,
            lanes: 1,
            flow_key: [0; 16],
            handshakes_per_second: 500,
            seed: [1; 32],
            dscp: Dscp::default(),
        };
        let now = Instant::from_start(Duration::from_secs(1_000));
        Self { lane: Lane::new(config, Arc::new(Table::new(table).unwrap()), now), out: Output::new(), now }
    }

    fn agree(&mut self, agreement: &Agreement) {
        self.lane.agree(agreement, self.now, &mut self.out);
    }

    /// Hands it a datagram; what it sends.
    fn take(&mut self, datagram: &[u8]) -> Vec<Vec<u8>> {
        let from: std::net::SocketAddr = ([192, 0, 2, 1], 7100).into();
        self.lane.handle_datagram(mesh_dataplane::udp::Ends::from(from), datagram, self.now, &mut self.out);
        let sent = self.out.datagrams.iter().map(|(_, bytes)| bytes.to_vec()).collect();
        self.out.datagrams.clear();
        sent
    }

    fn received(&self) -> Vec<Vec<u8>> {
        self.out.packets.iter().map(|(_, packet)| packet.to_vec()).collect()
    }
}

/// One session in which the marker crosses: what was captured, and the private keys of the recorder.
fn session(responder: &mut Responder, sender: u32, psk: &[u8; 32], offer: Option<Vec<u8>>) -> (Capture, Broken) {
    let broken = Broken {
        initiator: StaticSecret::from(*secret(1, 2).bytes()),
        ephemeral: StaticSecret::from([0x42; 32]),
        responder: Point::from(*secret(2, 2).public().as_bytes()),
    };
    let (initiation, noise) = broken.initiation(sender);
    let response = responder.take(&initiation).remove(0);
    assert_eq!(response.len(), 92);
    let [to, _] = broken.finish(&noise, &response, psk).expect("both ends have the same preshared key");
    let mut data = vec![4, 0, 0, 0];
    data.extend(&response[4..8]);
    data.extend(0u64.to_le_bytes());
    data.extend(seal(&to, 0, &packet(), &[]));
    responder.take(&data);
    assert_eq!(responder.received(), [packet()], "the session works");
    (Capture { offer, initiation, response, data }, broken)
}

fn holds_marker(plain: &[u8]) -> bool {
    plain.windows(MARKER.len()).any(|window| window == MARKER)
}

#[test]
fn without_a_preshared_key_a_recorder_with_all_x25519_keys_reads_everything() {
    let mut responder = Responder::new(&secret(2, 2), secret(1, 2).public(), Preshared::None);
    let (capture, broken) = session(&mut responder, 0x100, &NO_KEY, None);
    assert!(holds_marker(&capture.read(&broken, &NO_KEY).unwrap()));
}

#[test]
fn with_an_offer_a_recorder_with_all_x25519_keys_reads_nothing() {
    let mut ends = ends([1, 1]);
    let (own, offer) = made(&mut ends, at(0));
    let theirs = ends[1].book.open(&offer, at(1)).unwrap();
    let preshared = Preshared::Agreed { own_first: false };
    let mut responder = Responder::new(&secret(2, 2), secret(1, 2).public(), preshared);
    responder.agree(&theirs);
    let psk = *own.pairs[0].psk.expose();
    let (capture, broken) = session(&mut responder, own.pairs[0].index << 8, &psk, Some(offer));
    // With the key it would read: the recorder makes no mistake.
    assert!(holds_marker(&capture.read(&broken, &psk).unwrap()));
    for guess in guesses(&ends, capture.offer.as_ref().unwrap()) {
        assert_eq!(capture.read(&broken, &guess), None);
    }
    let Capture { offer, initiation, response, data } = &capture;
    for bytes in [offer.as_ref().unwrap(), initiation, response, data] {
        assert!(!holds_marker(bytes) && !bytes.windows(16).any(|window| psk.windows(16).any(|part| part == window)));
    }
}

/// What the recorder can make of the capture: no key, everything the offer shows, and the derivation with whatever it has in
/// place of the KEM's secret.
fn guesses(ends: &[super::book::tests::End; 2], offer: &[u8]) -> Vec<[u8; 32]> {
    use mesh_protocol::id::NodeId;
    use mesh_protocol::offer::{Agreement, CIPHERTEXT_BYTES, Direction, PresharedSecret};

    let direction = Direction {
        mesh: ends[0].facts.mesh,
        initiator: (NodeId([1; 32]), secret(1, 2).public()),
        responder: (NodeId([2; 32]), secret(2, 2).public()),
    };
    let ciphertext: [u8; CIPHERTEXT_BYTES] = offer[68..68 + CIPHERTEXT_BYTES].try_into().unwrap();
    let agreement = Agreement { direction, kem: ends[1].keys.kem[0].1.public(), ciphertext: &ciphertext };
    let shared = StaticSecret::from(*secret(1, 2).bytes());
    let shared = shared.diffie_hellman(&Point::from(*secret(2, 2).public().as_bytes())).to_bytes();
    let mut guesses: Vec<[u8; 32]> = offer.windows(32).map(|window| window.try_into().unwrap()).collect();
    for secret in guesses.clone().into_iter().chain([NO_KEY, shared]) {
        guesses.push(*agreement.preshared_key(&PresharedSecret::new(secret), (0, 0)));
    }
    guesses.extend([NO_KEY, shared]);
    guesses
}
