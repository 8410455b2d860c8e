//! The local API: what `mesh-cni` and `meshctl` ask of `meshd`, as JSON lines over a Unix socket.
//!
//! ```text
//! listen ── connection ── verbs ─┬─ status, path, ping, rotation ── Node
//!                                └─ pods
//! ```
//!
//! Root may send everything, whoever else may open the socket only what reads. Nothing here can delay a packet: lanes are
//! other threads, and each answer has a deadline.

mod connection;
mod identity;
mod listen;
mod path;
mod ping;
mod rotation;
mod status;
mod target;
mod verbs;

pub(crate) use listen::Listener;
pub(crate) use status::is_post_quantum;
