//! A network-namespace lab: real binaries, real packets.
