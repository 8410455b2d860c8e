//! The counter of datagrams at its limit. Alone in its binary: the flood fills queues that other tests share.
#![allow(clippy::unwrap_used, reason = "tests")]

use mesh_e2e::Lab;
use mesh_e2e::capture::new_marker;
use mesh_e2e::traffic::Stream;

#[test]
fn a_million_datagrams_are_counted() {
    let mut lab = Lab::new("million").unwrap();
    let (a, b) = (lab.node("a").unwrap(), lab.node("b").unwrap());
    let (from, to) = (a.netns().unwrap(), b.netns().unwrap());
    let stream = Stream::start(&from, &to, b.v4().into(), 100_000, 1_000_000, 64, new_marker()).unwrap();
    let counts = stream.finish().unwrap();
    assert_eq!((counts.sent, counts.lost(), counts.duplicated), (1_000_000, 0, 0), "{counts:?}");
}
