//! Who may cost us a handshake: checks before any curve operation, in order of price.
//!
//! ```text
//! first MAC under one of our keys?  no: drop                              0.5 us
//! a flood, and this one of the crowd?  yes: drop (flood)                  0.1 us
//! bucket of the source empty, or lane under load?                         0.1 us
//!     second MAC right (a cookie we gave to this address)?  no: cookie     3 us
//!     bucket of proved sources empty?  yes: drop
//! static key of the initiator (one curve operation) known?  no: drop       60 us
//! ```
//!
//! boringtun's `RateLimiter` has one counter for everybody, counts each handshake twice if a tunnel checks it again, and
//! lets whoever answers cookies through without limit. So it is used for its MACs and cookies alone: one with no
//! limit, which only checks the first MAC (the tunnels share it), and one with limit zero, which always wants a cookie.
//! Counting is done here. A spoofed flood in the name of a peer thus makes that peer answer a cookie, once; it cannot
//! lock it out.

mod flood;

use std::{
    net::{IpAddr, SocketAddr},
    ops::{Not, Range},
    sync::Arc,
    time::Duration,
};

use boringtun::{
    noise::{Packet, TunnResult, handshake::parse_handshake_anon, rate_limiter::RateLimiter},
    x25519,
};

use crate::{clock::Instant, drop_reason::DropReason, key::PublicKey, random::Random, table::Table};
use flood::{FloodLimit, Seen};

/// Handshakes a source may begin in a second.
const PER_SECOND: u32 = 20;
/// What it may save up, for each lane of the engine.
const BURST_PER_LANE: u32 = 5;
/// Cookies an address where no peer is known to be may be given in a second: several handshakes each.
const COOKIES_PER_SECOND: u32 = 100;
/// Sources remembered: sets times ways, 40 bytes each, 320 KiB in all.
const SETS: usize = 2_048;
const WAYS: usize = 4;
/// Tokens are counted in thousandths.
const TOKEN: u32 = 1_000;
/// Length of each of the two MACs, which end a handshake message.
const MAC_LEN: usize = 16;

/// One of our static keys with what handshakes to it need.
pub(crate) struct Identity {
    pub(crate) epoch: u64,
    pub(crate) secret: x25519::StaticSecret,
    pub(crate) public: x25519::PublicKey,
    /// Checks the first MAC and nothing else; tunnels with this key share it.
    pub(crate) unlimited: Arc<RateLimiter>,
    /// Wants a cookie of everybody.
    strict: RateLimiter,
}

/// What becomes of an initiation.
#[derive(Debug)]
pub(crate) enum Admission {
    /// It is from the holder of this key, as far as one curve operation tells, to our key of this epoch.
    Admitted { local_epoch: u64, remote: PublicKey },
    /// The reply, in the buffer, is to be sent to where it came from.
    Cookie(usize),
    /// Nothing.
    Refused(DropReason),
}

/// Where an initiation came from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin {
    /// Its source, which may be made up.
    pub(crate) from: SocketAddr,
    /// True if the table says that a peer may be there.
    pub(crate) listed: bool,
}

/// Admits handshakes of one lane.
pub(crate) struct Gate {
    identities: Vec<Identity>,
    buckets: Buckets,
    flood: FloodLimit,
    per_second: u32,
    second: u64,
    count: u32,
}

impl Gate {
    pub(crate) fn new(per_second: u32, lanes: usize, table: &Table) -> Self {
        let burst = BURST_PER_LANE * TOKEN * lanes as u32;
        let (buckets, flood) = (Buckets::new(burst), FloodLimit::new(per_second));
        let mut gate = Self { identities: Vec::new(), buckets, flood, per_second, second: 0, count: 0 };
        gate.set_keys(table);
        gate
    }

    /// Takes our keys of a new table; those that stay keep their cookies.
    pub(crate) fn set_keys(&mut self, table: &Table) {
        let mut before = std::mem::take(&mut self.identities);
        for (key, public) in table.local_keys().iter().zip(table.local_publics()) {
            let same = |old: &Identity| old.epoch == key.epoch && old.public.as_bytes() == public.as_bytes();
            if let Some(n) = before.iter().position(same) {
                self.identities.push(before.swap_remove(n));
                continue;
            }
            let public = x25519::PublicKey::from(*public.as_bytes());
            self.identities.push(Identity {
                epoch: key.epoch,
                secret: x25519::StaticSecret::from(*key.secret.expose()),
                public,
                unlimited: Arc::new(RateLimiter::new(&public, u64::MAX)),
                strict: RateLimiter::new(&public, 0),
            });
        }
    }

    /// Our key of this epoch.
    pub(crate) fn identity(&self, epoch: u64) -> Option<&Identity> {
        self.identities.iter().find(|identity| identity.epoch == epoch)
    }

    /// A peer proved to be at this address: its handshakes are looked at in a flood too.
    pub(crate) fn remember(&mut self, address: IpAddr, random: &Random) {
        self.flood.remember(address, random);
    }

    /// Checks an initiation of the right type and length. A cookie reply is written into `reply`, 64 bytes.
    pub(crate) fn admit(
        &mut self,
        origin: Origin,
        initiation: &[u8],
        now: Instant,
        random: &Random,
        reply: &mut [u8],
    ) -> Admission {
        let right_mac = |identity: &&Identity| identity.unlimited.verify_packet(None, initiation, &mut [0; 64]).is_ok();
        let Some(identity) = self.identities.iter().find(right_mac) else {
            return Admission::Refused(DropReason::WrongMac);
        };
        let second = now.since_start().as_secs();
        if second != self.second {
            (self.second, self.count) = (second, 0);
        }
        self.count = self.count.saturating_add(1);
        let from = origin.from.ip();
        let seen = Seen {
            known: origin.listed || self.flood.heard_from(from, random),
            claims_cookie: initiation.ends_with(&[0; MAC_LEN]).not(),
        };
        // One source alone must not use up what is for all of them.
        let is_noisy = !seen.known && !seen.claims_cookie && self.buckets.is_out_of_cookies(from, now, random);
        if self.count > self.per_second && (is_noisy || !self.flood.admits(seen, now)) {
            return Admission::Refused(DropReason::HandshakeFlood);
        }
        let bucket = self.buckets.bucket(from, now, random);
        if self.count > self.per_second || !take(&mut bucket.unproved) {
            if !seen.claims_cookie && !take(&mut bucket.cookies) && !seen.known {
                return Admission::Refused(DropReason::HandshakeFlood);
            }
            match identity.strict.verify_packet(Some(from), initiation, reply) {
                Ok(_) if take(&mut bucket.proved) => {}
                Ok(_) => return Admission::Refused(DropReason::HandshakeRate),
                Err(TunnResult::WriteToNetwork(cookie)) => return Admission::Cookie(cookie.len()),
                Err(_) => return Admission::Refused(DropReason::BadHandshake),
            }
        }
        let Ok(Packet::HandshakeInit(message)) = boringtun::noise::Tunn::parse_incoming_packet(initiation) else {
            return Admission::Refused(DropReason::MalformedDatagram);
        };
        match parse_handshake_anon(&identity.secret, &identity.public, &message) {
            Ok(half) => {
                Admission::Admitted { local_epoch: identity.epoch, remote: PublicKey::new(half.peer_static_public) }
            }
            Err(_) => Admission::Refused(DropReason::UnknownPeer),
        }
    }
}

/// What one source may still do.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    source: u64,
    refilled: Instant,
    /// Without a cookie.
    unproved: u32,
    /// With one.
    proved: u32,
    /// Cookies it may be given.
    cookies: u32,
}

impl Bucket {
    fn full(source: u64, now: Instant, burst: u32) -> Self {
        Self { source, refilled: now, unproved: burst, proved: burst, cookies: COOKIES_PER_SECOND * TOKEN }
    }
}

/// Takes one token if there is one.
fn take(tokens: &mut u32) -> bool {
    let enough = *tokens >= TOKEN;
    *tokens = tokens.saturating_sub(if enough { TOKEN } else { 0 });
    enough
}

/// Buckets of the sources seen lately. Where four share a place, the one that was quiet longest makes room.
struct Buckets {
    all: Box<[Bucket]>,
    burst: u32,
}

impl Buckets {
    fn new(burst: u32) -> Self {
        let full = Bucket::full(0, Instant::default(), burst);
        Self { all: vec![full; SETS * WAYS].into_boxed_slice(), burst }
    }

    /// True for a source that lately asked for more cookies than it may have. One that is not remembered did not.
    fn is_out_of_cookies(&self, address: IpAddr, now: Instant, random: &Random) -> bool {
        let source = source_of(address);
        let known = self.all[set(source, random)].iter().find(|bucket| bucket.source == source);
        known.is_some_and(|bucket| bucket.cookies < TOKEN && now.since(bucket.refilled) < Duration::from_millis(10))
    }

    fn bucket(&mut self, address: IpAddr, now: Instant, random: &Random) -> &mut Bucket {
        let source = source_of(address);
        let ways = &mut self.all[set(source, random)];
        let known = ways.iter().position(|bucket| bucket.source == source);
        let quietest = || (0..WAYS).min_by_key(|way| ways[*way].refilled).unwrap_or_default();
        let bucket = &mut ways[known.unwrap_or_else(quietest)];
        if known.is_none() {
            *bucket = Bucket::full(source, now, self.burst);
        }
        let millis = now.since(bucket.refilled).min(Duration::from_secs(60)).as_millis() as u32;
        if millis > 0 {
            // PER_SECOND tokens a second are as many thousandths a millisecond.
            let more = millis * PER_SECOND;
            bucket.unproved = (bucket.unproved + more).min(self.burst);
            bucket.proved = (bucket.proved + more).min(self.burst);
            bucket.cookies = (bucket.cookies + millis * COOKIES_PER_SECOND).min(COOKIES_PER_SECOND * TOKEN);
            bucket.refilled = now;
        }
        bucket
    }
}

/// Where a source may be remembered.
fn set(source: u64, random: &Random) -> Range<usize> {
    let set = random.hash(&source.to_le_bytes()) as usize % SETS;
    set * WAYS..(set + 1) * WAYS
}

/// What counts as one source: an IPv4 address, the /64 of an IPv6 address.
fn source_of(address: IpAddr) -> u64 {
    match address {
        IpAddr::V4(v4) => u64::from(v4.to_bits()),
        IpAddr::V6(v6) => (v6.to_bits() >> 64) as u64,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use boringtun::noise::Tunn;

    use super::*;
    use crate::{
        key::SecretKey,
        table::{LocalKey, TableSpec},
    };

    const NOW: Instant = Instant::from_start(Duration::from_secs(77));

    fn gate(per_second: u32) -> Gate {
        let local_keys = vec![LocalKey { epoch: 3, secret: SecretKey::new([9; 32]) }];
        Gate::new(per_second, 1, &Table::new(TableSpec { local_keys, ..TableSpec::default() }).unwrap())
    }

    fn initiator(secret: u8) -> Tunn {
        let gate_key = SecretKey::new([9; 32]).to_public();
        let remote = x25519::PublicKey::from(*gate_key.as_bytes());
        Tunn::new(x25519::StaticSecret::from([secret; 32]), remote, None, None, 7, None)
    }

    fn initiation(tunn: &mut Tunn) -> Vec<u8> {
        match tunn.format_handshake_initiation(&mut [0; 148], true) {
            TunnResult::WriteToNetwork(bytes) => bytes.to_vec(),
            other => panic!("{other:?}"),
        }
    }

    fn from(host: u8) -> Origin {
        Origin { from: ([192, 0, 2, host], 7100).into(), listed: false }
    }

    #[test]
    fn each_handshake_counts_once() {
        // boringtun's own limiter would let five of twenty through at a limit of ten.
        let (mut gate, random) = (gate(10), Random::new(&[1; 32]));
        let (mut admitted, mut cookies) = (0, 0);
        for n in 1..=20 {
            let message = initiation(&mut initiator(n));
            match gate.admit(from(n), &message, NOW, &random, &mut [0; 200]) {
                Admission::Admitted { local_epoch: 3, .. } => admitted += 1,
                Admission::Cookie(64) => cookies += 1,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((admitted, cookies), (10, 10));
    }

    #[test]
    fn a_source_that_answers_cookies_is_still_limited() {
        let (mut gate, random) = (gate(500), Random::new(&[1; 32]));
        let mut tunn = initiator(1);
        let (mut admitted, mut refused) = (0, 0);
        for _ in 0..100 {
            let mut reply = [0; 200];
            match gate.admit(from(1), &initiation(&mut tunn), NOW, &random, &mut reply) {
                Admission::Admitted { .. } => admitted += 1,
                Admission::Cookie(len) => {
                    assert!(matches!(tunn.decapsulate(None, &reply[..len], &mut [0; 200]), TunnResult::Done));
                }
                Admission::Refused(DropReason::HandshakeRate) => refused += 1,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(admitted, 10, "five without a cookie, five with one");
        assert_eq!(refused, 89);
    }

    #[test]
    fn wrong_keys_cost_no_curve_operation_and_strangers_are_told_apart_later() {
        let (mut gate, random) = (gate(500), Random::new(&[1; 32]));
        let mut message = initiation(&mut initiator(1));
        message[120] ^= 1;
        let refused = gate.admit(from(1), &message, NOW, &random, &mut [0; 200]);
        assert!(matches!(refused, Admission::Refused(DropReason::WrongMac)));
        let fine = initiation(&mut initiator(4));
        match gate.admit(from(1), &fine, NOW, &random, &mut [0; 200]) {
            Admission::Admitted { remote, .. } => assert_eq!(remote, SecretKey::new([4; 32]).to_public()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_bucket_gives_its_burst_and_then_twenty_a_second() {
        let random = Random::new(&[1; 32]);
        let mut buckets = Buckets::new(BURST_PER_LANE * TOKEN);
        let start = Instant::from_start(Duration::from_secs(1_000));
        let source = IpAddr::from([192, 0, 2, 7]);
        let mut taken = |at: Instant| {
            let mut count = 0;
            while take(&mut buckets.bucket(source, at, &random).unproved) {
                count += 1;
            }
            count
        };
        assert_eq!(taken(start), 5);
        assert_eq!(taken(start), 0);
        let mut sum = 0;
        for n in 1..=100u32 {
            sum += taken(start + Duration::from_millis(10) * n);
        }
        assert_eq!(sum, 20);
        assert_eq!(taken(start + Duration::from_secs(600)), 5);
    }

    #[test]
    fn many_sources_do_not_grow_it_and_share_a_v6_network() {
        let random = Random::new(&[1; 32]);
        let mut buckets = Buckets::new(BURST_PER_LANE * TOKEN);
        let now = Instant::from_start(Duration::from_secs(5));
        for n in 0..100_000u32 {
            assert!(take(&mut buckets.bucket(IpAddr::from(n.to_be_bytes()), now, &random).unproved));
        }
        let [a, b] = ["2001:db8::1", "2001:db8::ffff:2"].map(|text: &str| text.parse::<IpAddr>());
        assert_eq!(a.map(source_of), b.map(source_of));
    }
}
