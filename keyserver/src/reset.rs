//! How nodes learn at once that a keyserver was restarted.
//!
//! A restarted keyserver knows the connection ids that it gave before, and answers them with a stateless reset (RFC 9000,
//! section 10.3) that their owners believe: they come back within seconds instead of after their idle timeout.
//!
//! ```text
//! connection id = nonce (8 random bytes) ‖ first 8 bytes of HMAC-SHA-256(ids key, nonce)
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::{constant_time, hmac};
use mesh_protocol::id::sha256;
use mesh_protocol::key::SigningKey;
use quinn::{ConnectionId, ConnectionIdGenerator, EndpointConfig};
use quinn_proto::InvalidCid;
use zeroize::Zeroizing;

use crate::keys;

const NONCE_BYTES: usize = 8;
const ID_BYTES: usize = 16;
/// Pause between two resets: a thousand a second, each smaller than what it answers, bring ten thousand nodes back within
/// their idle timeout.
const RESET_EVERY: Duration = Duration::from_millis(1);

/// Keys for one address, the same after every start. Two endpoints with one reset key would tell anybody the reset tokens
/// of each other's living connections (RFC 9000, section 21.11), so the address goes into it.
pub(crate) fn endpoint_config(key: &SigningKey, address: SocketAddr) -> EndpointConfig {
    let ids = derive(b"mesh keyserver connection ids\0", key, address);
    let mut config = EndpointConfig::new(Arc::new(derive(b"mesh keyserver stateless reset\0", key, address)));
    config.cid_generator(move || Box::new(Ids(ids.clone()))).min_reset_interval(RESET_EVERY);
    config
}

fn derive(label: &[u8], key: &SigningKey, address: SocketAddr) -> hmac::Key {
    let derived = Zeroizing::new(sha256(&[label, key.seed().as_slice(), address.to_string().as_bytes()]));
    hmac::Key::new(hmac::HMAC_SHA256, derived.as_slice())
}

/// Gives connection ids and knows them again: packets with others get no answer.
struct Ids(hmac::Key);

impl Ids {
    fn id(&self, nonce: [u8; NONCE_BYTES]) -> [u8; ID_BYTES] {
        let mut id = [0; ID_BYTES];
        id[..NONCE_BYTES].copy_from_slice(&nonce);
        id[NONCE_BYTES..].copy_from_slice(&hmac::sign(&self.0, &nonce).as_ref()[..ID_BYTES - NONCE_BYTES]);
        id
    }
}

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        // Without random numbers TLS does not get this far either.
        ConnectionId::new(&self.id(keys::random().expect("the system gives random numbers")))
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        let nonce = id.first_chunk().ok_or(InvalidCid)?;
        constant_time::verify_slices_are_equal(&self.id(*nonce), id).map_err(|_| InvalidCid)
    }

    fn cid_len(&self) -> usize {
        ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn ids_are_known_after_a_restart_and_others_are_not() {
        let ids =
            |byte, address: &str| Ids(derive(b"ids", &SigningKey::from_seed([byte; 32]), address.parse().unwrap()));
        let given = ids(1, "[::]:7443").generate_cid();
        assert!(ids(1, "[::]:7443").validate(&given).is_ok());
        assert!(ids(1, "[::]:7444").validate(&given).is_err() && ids(2, "[::]:7443").validate(&given).is_err());
        for wrong in [&given[..8], &[], &[0; 16], &[0; 17]] {
            assert!(ids(1, "[::]:7443").validate(&ConnectionId::new(wrong)).is_err());
        }
    }
}
