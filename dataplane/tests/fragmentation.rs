//! What becomes of datagrams that are too large for a link, on real links. Needs root.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "tests")]

mod lab;

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use lab::Pair;
use mesh_dataplane::udp::{
    Arrivals, Datagrams, Outer, Socket,
    system::{SystemConfig, SystemSocket},
};

/// Two nodes whose link carries 1500 bytes.
struct Link {
    _pair: Pair,
    a: SystemSocket,
    b: SystemSocket,
    to: SocketAddr,
}

impl Link {
    fn new(v6: bool) -> Self {
        let pair = Pair::new();
        for (side, address) in [(&pair.a, "2001:db8::1/64"), (&pair.b, "2001:db8::2/64")] {
            side.ip(&format!("address add {address} dev u0 nodad"));
        }
        let to: SocketAddr = if v6 { "[2001:db8::2]:7100" } else { "192.0.2.2:7100" }.parse().unwrap();
        pair.a.ping(&to.ip().to_string());
        let bind = || SystemSocket::bind(&SystemConfig { port: 7_100, ..Default::default() }).unwrap();
        let (a, b) = (pair.a.enter(bind), pair.b.enter(bind));
        Self { _pair: pair, a, b, to }
    }

    /// Sends datagrams of these lengths, some not to be fragmented, and one of a single byte after them; the lengths of those that arrived before it.
    fn pass(&mut self, datagrams: &[(usize, bool)]) -> BTreeSet<usize> {
        let mut batch = Datagrams::new(100_000, 64);
        for (len, dont_fragment) in datagrams {
            batch.room().unwrap()[..*len].fill(9);
            batch.push_tight(*len, Outer { dont_fragment: *dont_fragment, ..self.to.into() });
        }
        batch.push_tight(1, self.to.into());
        self.a.send(&batch);
        let (mut arrivals, mut got) = (Arrivals::new(16), BTreeSet::new());
        let deadline = Instant::now() + Duration::from_secs(5);
        while !got.remove(&1) {
            assert!(Instant::now() < deadline, "the last one did not arrive, others did: {got:?}");
            self.b.receive(&mut arrivals, 16).unwrap();
            for n in 0..arrivals.len() {
                let (_, datagrams) = arrivals.get(n).unwrap().unwrap();
                got.extend(datagrams.map(<[u8]>::len));
            }
        }
        got
    }
}

#[test]
fn what_must_not_be_fragmented_passes_whole_or_not_at_all() {
    for (v6, header) in [(false, 28), (true, 48)] {
        let mut link = Link::new(v6);
        let fits = 1_500 - header;
        let sent = [(fits, true), (fits + 1, true), (fits + 2, false)];
        assert_eq!(link.pass(&sent), BTreeSet::from([fits, fits + 2]), "and the next one is fragmented again");
    }
}
