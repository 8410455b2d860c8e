//! Datagrams between nodes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_protocol::cbor;
use mesh_protocol::peer::{MembersPage, PeerMessage};

fuzz_target!(|data: &[u8]| {
    if let Ok(message) = PeerMessage::from_datagram(data) {
        assert_eq!(PeerMessage::from_datagram(&message.to_datagram()).as_ref(), Ok(&message));
    }
    if let Ok(page) = cbor::from_slice::<MembersPage>(data) {
        assert_eq!(cbor::from_slice::<MembersPage>(&cbor::to_vec(&page)), Ok(page));
    }
});
