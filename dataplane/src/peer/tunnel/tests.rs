//! What a tunnel does about boringtun that needs no hours to show; the rest is in the simulator.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::{
    buffer::ROOM,
    key::SecretKey,
    peer::{curve::public_of, handshake::Gate},
    table::{LocalKey, Table, TableSpec},
};

fn at(millis: u64) -> Instant {
    Instant::from_start(Duration::from_secs(1_000) + Duration::from_millis(millis))
}

fn gate(secret: u8) -> Gate {
    let keys = vec![LocalKey { epoch: 1, secret: SecretKey::new([secret; 32]) }];
    Gate::new(500, 1, &Table::new(TableSpec { local_keys: keys, ..TableSpec::default() }).unwrap())
}

fn tunnel(own: u8, other: u8) -> Tunnel {
    let key = TunnelKey { local_epoch: 1, remote_epoch: 1, psk: 0 };
    let order = Order { sum: 2, tie: 1, generation: 1 };
    let remote = public_of(&SecretKey::new([other; 32]));
    let gate = gate(own);
    Tunnel::new((key, order), gate.identity(1).unwrap(), &remote, None, u32::from(own), at(0))
}

fn pair() -> (Tunnel, Tunnel) {
    let (mut a, mut b) = (tunnel(1, 2), tunnel(2, 1));
    assert!(!a.take_confirmation());
    handshake(&mut a, &mut b);
    for end in [&mut a, &mut b] {
        assert!(end.take_confirmation() && !end.take_confirmation(), "once");
    }
    (a, b)
}

fn handshake(a: &mut Tunnel, b: &mut Tunnel) {
    let could_send = b.can_send(at(0));
    let mut buffers = [(); 4].map(|()| vec![0; ROOM]);
    let [initiation, response, keepalive, scratch] = &mut buffers;
    assert_eq!(a.initiate(at(0), initiation), Due::Initiation(148));
    assert_eq!(b.answer(&initiation[..148], at(0), response), Ok(92));
    assert_eq!(b.can_send(at(0)), could_send, "an answer confirms nothing");
    assert_eq!(a.finish(&response[..92], at(0), keepalive), Ok(32));
    assert!(a.can_send(at(0)));
    assert_eq!(b.open(&keepalive[..32], at(0), scratch), Ok(Opened::Keepalive));
    assert!(b.can_send(at(0)));
}

#[test]
fn a_session_is_over_after_so_many_messages() {
    let (mut a, _b) = pair();
    a.set_limits(3, 5);
    let mut out = vec![0; ROOM];
    let mut sent = 1;
    while a.can_send(at(10)) {
        assert_eq!(a.wants_rekey(), sent >= 3, "{sent}");
        assert!(matches!(a.seal(&[0; 16], at(10), &mut out), Sealed::Data(48)));
        sent += 1;
    }
    assert_eq!(sent, 5, "the keepalive counts");
}

#[test]
fn a_new_session_counts_anew() {
    let (mut a, mut b) = pair();
    a.set_limits(3, 5);
    let mut out = vec![0; ROOM];
    for _ in 0..4 {
        a.seal(&[0; 16], at(10), &mut out);
    }
    assert!(!a.can_send(at(10)));
    handshake(&mut a, &mut b);
    assert!(a.can_send(at(10)) && !a.wants_rekey());
}

#[test]
fn sessions_end_by_age_although_no_timer_runs() {
    let (mut a, mut b) = pair();
    let mut out = vec![0; ROOM];
    let Sealed::Data(len) = a.seal(&[0; 16], at(0), &mut out) else { panic!("no session") };
    let mut opened = vec![0; ROOM];
    assert!(!a.can_send(at(180_000)));
    assert_eq!(b.open(&out[..len], at(180_000), &mut opened), Err(DropReason::ExpiredSession));
    assert_eq!(b.open(&out[..len], at(179_999), &mut opened), Ok(Opened::Malformed), "sixteen zeros are no packet");
    assert_eq!(b.open(&out[..len], at(179_999), &mut opened), Err(DropReason::Replay));
}

#[test]
fn a_full_size_packet_fits_the_buffers() {
    let (mut a, mut b) = pair();
    let mut packet = vec![7; 65_520];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&65_520u16.to_be_bytes());
    let (mut out, mut opened) = (vec![0; ROOM], vec![0; ROOM]);
    assert_eq!(a.seal(&packet, at(0), &mut out), Sealed::Data(65_552));
    assert_eq!(b.open(&out[..65_552], at(0), &mut opened), Ok(Opened::Packet(65_520)));
}

#[test]
fn newer_means_larger_sum_then_the_same_choice_at_both_ends() {
    let order = |sum, tie, generation| Order { sum, tie, generation };
    assert!(order(3, 1, 1) > order(2, 9, 9));
    assert!(order(3, 2, 1) > order(3, 1, 9));
    assert!(order(3, 2, 2) > order(3, 2, 1));
}
