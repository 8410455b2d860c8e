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
mod device;
mod look;
mod saved;
mod settings;
#[cfg(test)]
mod tests;
mod thread;

pub(crate) use device::DevicePlan;
pub(crate) use saved::load;
pub(crate) use thread::{Host, HostError, HostHandle};

use crate::desired::HostState;

/// Removes everything of ours from the calling thread's network namespace, known by its names alone.
///
/// # Errors
/// [`HostError::Kernel`] if nothing could be done.
pub(crate) fn clear_by_name(state: &HostState) -> Result<Vec<String>, HostError> {
    let opened = mesh_hostnet::Handle::open();
    let mut handle = opened.map_err(|cause| HostError::Kernel { doing: "open netlink sockets", cause })?;
    Ok(clear::clear(&mut handle, &state.names, &state.device.name))
}
