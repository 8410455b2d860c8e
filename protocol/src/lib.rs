//! What the processes of Mesh say to each other: records, signatures, trust rules, frames, local API; no I/O.
//!
//! Everything here is a plain value or a pure function. Clocks and randomness are passed in as values, so that the
//! keyserver, `meshd`, `mesh-cni` and `meshctl` judge the same bytes alike.
//!
//! ```text
//! id key cbor            names, numbers, keys; the strict CBOR all of it is written in
//! envelope               exact bytes, key ids, signatures over a domain label
//! record trust           the signed objects; who may sign what, and the checks
//! audit                  the keyserver's log of who did what, hash-chained
//! token offline          the line a person pastes to enrol a node; files for machines without a network
//! control frame          node <-> keyserver         admin   meshctl <-> keyserver
//! peer                   node <-> node, inside their tunnel
//! offer                  node <-> node, on the tunnels' ports: what makes them post-quantum
//! local                  mesh-cni, meshctl <-> meshd tls     rustls settings for raw public keys (feature `tls`)
//! ```

pub mod address;
pub mod admin;
pub mod audit;
pub mod cbor;
pub mod control;
pub mod envelope;
pub mod frame;
pub mod id;
pub mod key;
pub mod line;
pub mod local;
pub mod offer;
pub mod offline;
pub mod peer;
pub mod record;
#[cfg(feature = "tls")]
pub mod sealed;
#[cfg(feature = "tls")]
pub mod tls;
pub mod token;
pub mod trust;

/// Seconds since 1970-01-01T00:00:00Z, as every signed object carries time.
pub type UnixSeconds = u64;
