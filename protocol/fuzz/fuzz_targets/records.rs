//! Payloads of signed objects.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_protocol::cbor;
use mesh_protocol::envelope::Signed;
use mesh_protocol::record::{Checkpoint, Endpoints, NodeGrant, NodeRecord, Revocation, TrustPolicy};
use mesh_protocol::token::TokenLimits;

fn back<T: Signed + PartialEq + std::fmt::Debug>(data: &[u8]) {
    if let Ok(object) = cbor::from_signed::<T>(data) {
        assert_eq!(cbor::from_signed::<T>(&cbor::to_vec(&object)).as_ref(), Ok(&object));
    }
}

fuzz_target!(|data: &[u8]| {
    back::<TrustPolicy>(data);
    back::<NodeGrant>(data);
    back::<NodeRecord>(data);
    back::<Endpoints>(data);
    back::<Revocation>(data);
    back::<Checkpoint>(data);
    back::<TokenLimits>(data);
});
