//! The short form of `make bench-rotation`.
#![allow(clippy::unwrap_used, reason = "tests")]

use mesh_e2e::rotation::{Rate, Ring, table};

fn nothing_is_lost(pq: &str) {
    let mut ring = Ring::new(2, pq).unwrap_or_else(|error| panic!("make the ring: {error:#}"));
    let lines: Vec<_> = [Rate::OnePerSecond, Rate::Full]
        .into_iter()
        .map(|rate| ring.measure(rate, 2).unwrap_or_else(|error| panic!("{error:#}\n{}", ring.logs())))
        .collect();
    println!("{}", table(&lines));
    for line in lines {
        assert_eq!((line.lost, line.duplicated, line.rotations), (0, 0, 2), "{line:?}");
        assert!(line.handshakes > 0 && line.sent > 0, "{line:?}");
    }
}

#[test]
fn two_nodes_lose_nothing_at_one_packet_a_second_and_at_full_load() {
    for pq in ["off", "required"] {
        nothing_is_lost(pq);
    }
}
