//! Bytes from strangers: no decoder panics, and what a fuzzer found once stays found.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use mesh_protocol::admin::AdminRequest;
use mesh_protocol::cbor::{self, CborError};
use mesh_protocol::control::{ITEMS_BYTES_PER_FRAME, JoinReply, JoinRequest, NodeMessage, ServerMessage, runs};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::frame::{self, FrameError, MAX_MESSAGE_BYTES};
use mesh_protocol::line::{self, LineBuffer};
use mesh_protocol::local::LocalRequest;
use mesh_protocol::offer;
use mesh_protocol::peer::{MembersPage, PeerMessage};
use mesh_protocol::record::{Checkpoint, Endpoints, NodeGrant, NodeRecord, Revocation, TrustPolicy};
use mesh_protocol::token::{JoinClaim, JoinToken, TokenLimits};
use proptest::prelude::*;
use support::*;

/// Every decoder there is, on the same bytes.
fn decode_as_everything(bytes: &[u8]) {
    let _ = frame::decode::<JoinRequest>(bytes);
    let _ = frame::decode::<JoinReply>(bytes);
    let _ = frame::decode::<NodeMessage>(bytes);
    let _ = frame::decode::<ServerMessage>(bytes);
    let _ = PeerMessage::from_datagram(bytes);
    assert!(offer::Sealed::parse(bytes).is_err() || offer::is_offer(bytes));
    let _ = cbor::from_slice::<MembersPage>(bytes);
    let _ = cbor::from_slice::<JoinClaim>(bytes);
    let _ = cbor::from_signed::<TrustPolicy>(bytes);
    let _ = cbor::from_signed::<NodeGrant>(bytes);
    let _ = cbor::from_signed::<NodeRecord>(bytes);
    let _ = cbor::from_signed::<Endpoints>(bytes);
    let _ = cbor::from_signed::<Revocation>(bytes);
    let _ = cbor::from_signed::<Checkpoint>(bytes);
    let _ = cbor::from_signed::<TokenLimits>(bytes);
    if let Ok(envelope) = cbor::from_slice::<Envelope>(bytes) {
        let _ = view().apply(&envelope);
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = text.parse::<JoinToken>();
    }
    let _ = line::decode::<LocalRequest>(bytes);
    let _ = line::decode::<AdminRequest>(bytes);
    let mut buffer = LineBuffer::default();
    buffer.push(bytes);
    while let Ok(Some(_)) = buffer.next_line() {}
}

/// Well-formed encodings, to be damaged.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = messages::node_messages().iter().map(|(_, m)| cbor::to_vec(m)).collect();
    seeds.extend(messages::server_messages().iter().map(|(_, m)| cbor::to_vec(m)));
    seeds.extend(messages::join_replies().iter().map(|(_, m)| cbor::to_vec(m)));
    seeds.extend(messages::peer_messages().iter().map(|(_, m)| cbor::to_vec(m)));
    seeds.extend(messages::join_requests().iter().map(|(_, m)| cbor::to_vec(m)));
    for envelope in [sealed_policy_1(), seal_grant(&grant(1)), seal_record(1, &record(1))] {
        seeds.push(envelope.payload().to_vec());
        seeds.push(cbor::to_vec(&envelope));
    }
    seeds.push(cbor::to_vec(&policy_2()));
    seeds
}

proptest! {
    #[test]
    fn nothing_panics_on_arbitrary_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        decode_as_everything(&bytes);
    }

    #[test]
    fn nothing_panics_on_damaged_messages(
        which: usize, changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..6), cut: usize,
    ) {
        let seeds = seeds();
        let mut bytes = seeds[which % seeds.len()].clone();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        decode_as_everything(&bytes);
        decode_as_everything(&bytes[..cut % bytes.len()]);
    }

    #[test]
    fn nothing_panics_on_any_token_text(text in "mesh-join-[A-Za-z0-9_-]{0,80}|\\PC{0,40}") {
        let _ = text.parse::<JoinToken>();
    }
}

#[test]
fn the_corpus_is_harmless() {
    let corpus = format!("{}/fuzz/corpus", env!("CARGO_MANIFEST_DIR"));
    let mut inputs = 0;
    for target in std::fs::read_dir(corpus).unwrap() {
        for input in std::fs::read_dir(target.unwrap().path()).unwrap() {
            decode_as_everything(&std::fs::read(input.unwrap().path()).unwrap());
            inputs += 1;
        }
    }
    assert!(inputs >= 5, "{inputs} inputs");
}

#[test]
fn frame_lengths_are_bounded() {
    for (length, good) in [(0, false), (1, true), (65_536, true), (65_537, false), (u32::MAX, false)] {
        let got = frame::message_length(length.to_be_bytes());
        assert_eq!(got, if good { Ok(length as usize) } else { Err(FrameError::Length(length)) });
    }
    let items = vec![seal_record(1, &record(1)); 60];
    assert!(matches!(frame::encode(&ServerMessage::Live { items }), Err(FrameError::Length(_))));
}

#[test]
fn later_messages_are_unknown_and_broken_ones_an_error() {
    let unknown = |bytes: &[u8]| frame::decode::<NodeMessage>(bytes).unwrap_err();
    assert_eq!(unknown(&[0x82, 0x07, 0xa0]), CborError::UnknownMessage(7));
    assert_eq!(unknown(&[0x82, 0x18, 200, 0x83, 1, 2, 3]), CborError::UnknownMessage(200));
    assert_eq!(unknown(&[0x81, 0x20]), CborError::UnknownMessage(-1));
    for broken in [&[0xa0][..], &[0x80], &[0x82, 0x60, 0xa0], &[0x81, 0x04], &[0x82, 0x04, 0xa0], &[0x83, 4, 0xa0, 0]] {
        assert!(matches!(unknown(broken), CborError::Meaning(_)), "{broken:?}");
    }
    let extended = frame::decode::<NodeMessage>(&[0x82, 0x04, 0xa2, 0x00, 0x07, 0x18, 200, 0x80]);
    assert_eq!(extended, Ok(NodeMessage::Pong { nonce: 7 }), "unknown fields are ignored");
}

#[test]
fn a_long_list_of_envelopes_is_cut_to_frames() {
    assert!(runs(vec![]).is_empty());
    let all = vec![seal_record(1, &record(1)); 200];
    let cut = runs(all.clone());
    assert!(cut.len() > 4 && cut.iter().all(|run| !run.is_empty()));
    for items in &cut {
        let frame = frame::encode(&JoinReply::Offer { policies: items.clone() }).unwrap();
        assert!(frame.len() <= ITEMS_BYTES_PER_FRAME + 16 && frame.len() < MAX_MESSAGE_BYTES);
    }
    assert_eq!(cut.concat(), all);
}
