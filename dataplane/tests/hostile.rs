//! Hostile bytes: random ones, and all that the fuzz targets ever found.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

#[path = "../fuzz/src/harness.rs"]
mod harness;

use std::{fs, path::Path};

use proptest::prelude::*;

fn replay(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut count = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        run(&fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 0, "no corpus in {}", folder.display());
}

#[test]
fn corpus_is_survived() {
    replay("inbound", harness::inbound);
    replay("header", harness::header);
    replay("outbound", harness::outbound);
    replay("segment", harness::segment);
    replay("coalesce", harness::coalesce);
    replay("reassembly", harness::reassembly);
}

/// Bytes that look like something: a likely first byte, lengths that matter.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let first = prop_oneof![Just(1u8), Just(2), Just(3), Just(4), Just(0x45), Just(0x60), any::<u8>()];
    let len = prop_oneof![Just(148usize), Just(92), Just(64), Just(32), 0..200usize];
    (first, len, proptest::collection::vec(any::<u8>(), 200), any::<bool>()).prop_map(|(first, len, mut all, zeros)| {
        all.truncate(len);
        if zeros {
            all.iter_mut().take(4).for_each(|byte| *byte = 0);
        }
        if let Some(byte) = all.first_mut() {
            *byte = first;
        }
        if first >> 4 == 4 && all.len() >= 20 {
            all[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            all[12..20].copy_from_slice(&[10, 1, 0, 1, 10, 2, 0, 1]);
        }
        all
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn inbound_never_panics(input in bytes()) {
        harness::inbound(&input);
    }

    #[test]
    fn header_never_panics(input in bytes()) {
        harness::header(&input);
    }

    #[test]
    fn segment_never_panics(input in bytes(), how in any::<[u8; 5]>()) {
        harness::segment(&[&how[..], &input].concat());
    }

    #[test]
    fn coalesce_never_panics(inputs in proptest::collection::vec(bytes(), 0..8)) {
        let packet = |input: &Vec<u8>| [&(input.len() as u16).to_be_bytes()[..], input].concat();
        harness::coalesce(&inputs.iter().flat_map(packet).collect::<Vec<_>>());
    }

    #[test]
    fn reassembly_never_panics(inputs in proptest::collection::vec(bytes(), 0..8)) {
        let packet = |input: &Vec<u8>| [&(input.len() as u16).to_be_bytes()[..], input].concat();
        harness::reassembly(&inputs.iter().flat_map(packet).collect::<Vec<_>>());
    }

    #[test]
    fn outbound_never_panics(input in bytes()) {
        harness::outbound(&input);
    }
}
