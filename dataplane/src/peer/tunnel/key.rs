//! What names a tunnel among those of a peer, and which of two is newer.

/// What a tunnel is made for. Peers keep one for each key they have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TunnelKey {
    pub(crate) local_epoch: u64,
    pub(crate) remote_epoch: u64,
    /// Keyed hash of the preshared key, odd; zero without one; [`AGREED`] if control agrees on one for each tunnel.
    pub(crate) psk: u64,
}

/// In place of a preshared key's hash.
const AGREED: u64 = 2;

impl TunnelKey {
    /// Of tunnels that have preshared keys of their own.
    pub(crate) fn agreed(local_epoch: u64, remote_epoch: u64) -> Self {
        Self { local_epoch, remote_epoch, psk: AGREED }
    }

    pub(crate) fn is_agreed(&self) -> bool {
        self.psk == AGREED
    }
}

/// Which tunnel is newer: sum of the epochs, then the same choice at both ends, then age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Order {
    pub(crate) sum: u64,
    pub(crate) tie: u64,
    pub(crate) generation: u64,
}
