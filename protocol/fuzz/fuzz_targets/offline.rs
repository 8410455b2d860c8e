//! Files for machines without a network.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_protocol::cbor;
use mesh_protocol::offline::{GrantRequests, InFile, MeshFile, PolicyProposal, RevocationFile, SignedGrants};

fn back<T: InFile + PartialEq + std::fmt::Debug>(data: &[u8]) {
    // The checksum keeps a fuzzer out: it gets at the content directly, too.
    if let Ok(file) = cbor::from_slice::<T>(data) {
        assert_eq!(T::from_text(&file.to_text()).as_ref(), Ok(&file));
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = T::from_text(text);
    }
}

fuzz_target!(|data: &[u8]| {
    back::<MeshFile>(data);
    back::<GrantRequests>(data);
    back::<SignedGrants>(data);
    back::<PolicyProposal>(data);
    back::<RevocationFile>(data);
});
