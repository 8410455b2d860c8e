//! A userspace WireGuard data plane: packets between TUN queues and UDP sockets.
