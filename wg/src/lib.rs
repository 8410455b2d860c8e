//! A plain WireGuard device without a control plane, configured as wg(8) configures any userspace implementation.
//!
//! ```text
//! wg(8) ── /var/run/wireguard/IFACE.sock ──> uapi (bytes to changes) ──> interface (what is configured)
//!                                                                          │
//! ip(8) ── link up, down, MTU ──> link ──────────────────> device <────────┘
//!                                                             └──> mesh-dataplane (Table, Redirect, Socket)
//! ```
//!
//! [`uapi`] and [`interface`] are pure: bytes to values, values to values. [`device`] holds the engine and carries out what
//! changed; [`listen`] serves the socket; [`link`] follows the device's link; [`offloads`] tries what the kernel can.

pub mod device;
pub mod interface;
pub mod link;
pub mod listen;
pub mod offloads;
pub mod uapi;
