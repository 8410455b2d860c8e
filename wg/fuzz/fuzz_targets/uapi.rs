//! Lines of the control socket, and what they do to a device's configuration.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_wg::interface::Interface;
use mesh_wg::uapi::{Parser, Request};

fuzz_target!(|data: &[u8]| {
    let (mut parser, mut interface) = (Parser::default(), Interface::default());
    for line in data.split(|byte| *byte == b'\n') {
        if let Ok(Some(Request::Set(change))) = parser.line(line) {
            interface.apply(change);
            let listed: usize = interface.peers().map(|(_, peer)| peer.allowed_ips.len()).sum();
            let given: usize = interface.peer_specs().iter().map(|peer| peer.allowed_ips.len()).sum();
            assert_eq!(listed, given);
        }
    }
});
