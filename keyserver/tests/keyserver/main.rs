//! The keyserver from outside: the real binary on loopback, and a small node built on `mesh-protocol`.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "tests")]

mod client;
mod command;
mod crash;
mod enrol;
mod hostile;
mod issuer;
mod revoke;
mod rotate;
mod server;
mod session;
