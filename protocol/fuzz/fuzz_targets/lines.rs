//! Lines of the local and the admin socket, and how they are cut out of a stream.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_protocol::admin::{AdminReply, AdminRequest};
use mesh_protocol::line::{self, LineBuffer};
use mesh_protocol::local::{LocalReply, LocalRequest};

fuzz_target!(|data: &[u8]| {
    let mut buffer = LineBuffer::default();
    let mut lines = Vec::new();
    for piece in data.chunks(7) {
        buffer.push(piece);
        while let Ok(Some(line)) = buffer.next_line() {
            lines.push(line);
        }
    }
    let whole: Vec<&[u8]> = data.split(|byte| *byte == b'\n').collect();
    assert_eq!(lines, whole[..whole.len() - 1]);
    for line in whole {
        let _ = line::decode::<LocalRequest>(line);
        let _ = line::decode::<LocalReply>(line);
        let _ = line::decode::<AdminRequest>(line);
        let _ = line::decode::<AdminReply>(line);
    }
});
