//! Bodies of control frames.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_protocol::cbor;
use mesh_protocol::control::{JoinReply, JoinRequest, NodeMessage, ServerMessage};
use mesh_protocol::frame::{self, Message};

fn back<T: Message + PartialEq + std::fmt::Debug>(body: &[u8]) {
    if let Ok(message) = frame::decode::<T>(body) {
        assert_eq!(frame::decode::<T>(&cbor::to_vec(&message)).as_ref(), Ok(&message));
    }
}

fuzz_target!(|data: &[u8]| {
    back::<JoinRequest>(data);
    back::<JoinReply>(data);
    back::<NodeMessage>(data);
    back::<ServerMessage>(data);
});
