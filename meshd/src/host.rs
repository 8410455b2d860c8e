//! What of the kernel `meshd` watches and applies.
//!
//! ```text
//! watch thread ── something changed ──┐
//! app ── apply(HostState) ────────────┼─> host thread: read, diff, apply ─> kernel
//!        every few seconds ───────────┘        │
//!                                               ├─ HostFacts ─> app
//!                                               └─ new TUN queues, when the device had to be made again ─> app
//! ```
//!
//! One thread owns the netlink handle and does all that is done to the host, so that steps never interleave.

mod clear;
mod look;
mod saved;
mod settings;
mod thread;

pub(crate) use look::has_ipv6;
pub(crate) use saved::load;
pub(crate) use thread::{Host, HostError, HostHandle, HostReport};
