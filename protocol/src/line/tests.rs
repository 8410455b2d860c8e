#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::*;
use crate::admin::{AdminReply, AdminRequest};
use crate::local::{LocalReply, LocalRequest};

#[test]
fn lines_come_out_as_they_went_in_however_they_are_cut() {
    let mut buffer = LineBuffer::default();
    for byte in b"one\n\ntwo\nthr" {
        buffer.push(&[*byte]);
    }
    assert_eq!(buffer.next_line().unwrap().unwrap(), b"one");
    buffer.push(b"ee");
    assert_eq!(buffer.next_line().unwrap().unwrap(), b"");
    assert_eq!(buffer.next_line().unwrap().unwrap(), b"two");
    assert_eq!(buffer.next_line().unwrap(), None);
    buffer.push(b"\n");
    assert_eq!(buffer.next_line().unwrap().unwrap(), b"three");
    assert_eq!(format!("{buffer:?}"), "LineBuffer(0 bytes)");
}

#[test]
fn a_line_is_at_most_one_mebibyte() {
    let mut buffer = LineBuffer::default();
    buffer.push(&vec![b'x'; MAX_LINE_BYTES]);
    assert_eq!(buffer.next_line().unwrap(), None);
    buffer.push(b"\n");
    assert_eq!(buffer.next_line().unwrap().unwrap().len(), MAX_LINE_BYTES);
    buffer.push(&vec![b'x'; MAX_LINE_BYTES + 1]);
    assert!(matches!(buffer.next_line(), Err(LineError::TooLong)));
    buffer.push(b"\n{}\n");
    assert!(matches!(buffer.next_line(), Err(LineError::TooLong)), "there is no way on");
    assert!(matches!(encode(&"x".repeat(MAX_LINE_BYTES)), Err(LineError::TooLong)));
    assert!(matches!(decode::<String>(&vec![b'x'; MAX_LINE_BYTES + 2]), Err(LineError::TooLong)));
}

/// Moving the rest for each line would copy 2^39 bytes here, and never end.
#[test]
fn a_million_empty_lines_cost_a_million_steps() {
    let mut buffer = LineBuffer::default();
    buffer.push(&vec![b'\n'; MAX_LINE_BYTES]);
    let lines = std::iter::from_fn(|| buffer.next_line().unwrap()).count();
    assert_eq!(lines, MAX_LINE_BYTES);
}

#[test]
fn hostile_json_is_an_error() {
    let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
    for line in [&b""[..], b"\0", b"{", b"{}", b"null", br#"{"request":"nothing"}"#, &deep, b"\xff\xfe"] {
        assert!(matches!(decode::<LocalRequest>(line), Err(LineError::Json(_))));
        assert!(matches!(decode::<AdminRequest>(line), Err(LineError::Json(_))));
    }
    let later = br#"{"request":"status","later":[1,{"a":null}]}"#;
    assert_eq!(decode::<LocalRequest>(later).unwrap(), LocalRequest::Status, "unknown fields are ignored");
}

proptest! {
    #[test]
    fn decoding_never_panics(line in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode::<LocalRequest>(&line);
        let _ = decode::<LocalReply>(&line);
        let _ = decode::<AdminRequest>(&line);
        let _ = decode::<AdminReply>(&line);
    }

    #[test]
    fn a_buffer_splits_as_split_does(pieces in proptest::collection::vec("[a\\n]{0,12}", 0..12)) {
        let mut buffer = LineBuffer::default();
        let mut lines = Vec::new();
        for piece in &pieces {
            buffer.push(piece.as_bytes());
            while lines.len() % 3 != 2 {
                let Some(line) = buffer.next_line().unwrap() else { break };
                lines.push(String::from_utf8(line).unwrap());
            }
        }
        while let Some(line) = buffer.next_line().unwrap() {
            lines.push(String::from_utf8(line).unwrap());
        }
        let all = pieces.concat();
        let mut expected: Vec<&str> = all.split('\n').collect();
        expected.pop();
        prop_assert_eq!(lines, expected);
    }
}
