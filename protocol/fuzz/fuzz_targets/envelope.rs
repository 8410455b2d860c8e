//! An envelope that decodes encodes to what decodes to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_protocol::cbor;
use mesh_protocol::envelope::Envelope;

fuzz_target!(|data: &[u8]| {
    if let Ok(envelope) = cbor::from_slice::<Envelope>(data) {
        let again = cbor::from_slice::<Envelope>(&cbor::to_vec(&envelope));
        assert_eq!(again.as_ref(), Ok(&envelope));
    }
});
