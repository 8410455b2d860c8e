#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::{super::model::Model, *};

/// Cuts a super-packet and pads each piece as a lane does, which must not reach the next one.
fn cut(bytes: &[u8], cut: Cut, mtu: u16) -> Option<Vec<Vec<u8>>> {
    let mut buffer = bytes.to_vec();
    buffer.extend([0xee; SPARE]);
    let mut segments = Segments::new(&mut buffer, bytes.len(), cut)?;
    if !segments.limit(mtu) {
        return None;
    }
    let longest = segments.longest();
    let mut pieces = Vec::new();
    while let Some((packet, len)) = segments.next() {
        assert!(len <= longest);
        pieces.push(packet[..len].to_vec());
        packet[len..].fill(0);
    }
    assert!(segments.is_done());
    Some(pieces)
}

fn by(transport: Transport, size: u16) -> Cut {
    Cut { transport, size }
}

fn models() -> impl Strategy<Value = (Model, Cut)> {
    let ends = (any::<bool>(), any::<bool>(), any::<bool>(), any::<u8>());
    let numbers = (any::<u16>(), any::<u32>(), any::<u8>());
    (ends, numbers, 1..9_000usize, 1..2_000u16, 0..3usize).prop_map(
        |((tcp, v6, df, tos), (id, sequence, flags), len, size, extra)| {
            let payload = (0..len).map(|n| (n * 7 + n / 256) as u8).collect();
            let base = if tcp { Model::tcp(payload) } else { Model::udp(payload) };
            let flags = if tcp { flags & !SYN_RST_URG } else { 0 };
            let ip_options = match (v6, extra) {
                (_, 0) => Vec::new(),
                (true, n) => [vec![0, n as u8 - 1, 1, (n * 8 - 4) as u8], vec![0; n * 8 - 4]].concat(),
                (false, n) => vec![1; n * 4],
            };
            let model = Model { v6, dont_fragment: df, tos, id, flags, ip_options, ..base };
            let model = Model { sequence: if tcp { sequence } else { 0 }, ..model };
            (model, by(if tcp { Transport::Tcp } else { Transport::Udp }, size))
        },
    )
}

/// A routing header of this kind with two stops left; the next header is filled in by the model.
fn routing(kind: u8) -> Vec<u8> {
    let stop = |last: u8| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xab, last];
    [&[0, 4, kind, 2, 0, 0, 0, 0][..], &stop(8), &stop(9)].concat()
}

#[test]
fn behind_a_routing_header_the_checksum_covers_the_last_stop() {
    for kind in [0, 2, 4] {
        for base in [Model::tcp(vec![7; 5_001]), Model::udp(vec![7; 5_001])] {
            let transport = if base.protocol == TCP { Transport::Tcp } else { Transport::Udp };
            let model = Model { v6: true, ip_options: routing(kind), routing: Some(kind), ..base };
            let expected: Vec<_> = model.cut(1_200).iter().map(Model::bytes).collect();
            assert_eq!(cut(&model.bytes(), by(transport, 1_200), 65_000).unwrap(), expected, "{kind}");
        }
    }
    let unknown = Model { v6: true, ip_options: routing(9), routing: Some(9), ..Model::tcp(vec![7; 5_000]) };
    assert_eq!(cut(&unknown.bytes(), by(Transport::Tcp, 1_200), 65_000), None, "what it covers cannot be told");
}

proptest! {
    #[test]
    fn pieces_are_those_of_the_model((model, how) in models()) {
        let expected: Vec<_> = model.cut(usize::from(how.size)).iter().map(Model::bytes).collect();
        prop_assert_eq!(cut(&model.bytes(), how, 65_000).unwrap(), expected);
    }

    #[test]
    fn tcp_is_cut_to_the_path((model, how) in models(), mtu in 600..1_500u16) {
        let headers = model.bytes().len() - model.payload.len();
        let size = usize::from(how.size).min(usize::from(mtu) - headers);
        let fits = usize::from(how.size).min(model.payload.len()) + headers <= usize::from(mtu);
        let pieces = cut(&model.bytes(), how, mtu);
        if how.transport == Transport::Tcp || fits {
            let expected: Vec<_> = model.cut(size).iter().map(Model::bytes).collect();
            prop_assert_eq!(pieces.unwrap(), expected);
        } else {
            prop_assert_eq!(pieces, None, "datagrams keep their length");
        }
    }

    #[test]
    fn hostile_bytes_do_no_harm(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..300),
        (model, how) in models(),
        flips in proptest::collection::vec((0..200usize, any::<u8>()), 0..6),
    ) {
        if let Some(first) = bytes.first_mut() {
            *first = if *first & 1 == 0 { 0x45 } else { 0x60 };
        }
        cut(&bytes, how, 1_400);
        let mut altered = model.bytes();
        for (at, value) in flips {
            let at = at % altered.len();
            altered[at] ^= value;
        }
        cut(&altered, how, 1_400);
    }
}

#[test]
fn what_is_no_super_packet_is_refused() {
    let tcp = Model::tcp(vec![1; 3_000]);
    let refused = |model: &Model, how: Cut| cut(&model.bytes(), how, 65_000).is_none();
    assert!(!refused(&tcp, by(Transport::Tcp, 1_000)));
    assert!(refused(&tcp, by(Transport::Udp, 1_000)), "another protocol");
    assert!(refused(&tcp, by(Transport::Tcp, 0)), "no size");
    for flags in [0x12, 0x14, 0x30] {
        assert!(refused(&Model { flags, ..tcp.clone() }, by(Transport::Tcp, 1_000)), "SYN, RST or URG");
    }
    assert!(refused(&Model::tcp(Vec::new()), by(Transport::Tcp, 1_000)), "nothing to cut");
    let mut fragment = tcp.bytes();
    fragment[6] |= 0x20;
    assert!(cut(&fragment, by(Transport::Tcp, 1_000), 65_000).is_none());
}
