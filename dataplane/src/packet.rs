//! Inner packets: what their headers say, and the few that the data plane changes or makes itself.

pub mod checksum;
pub mod flow;
pub mod fragment;
pub mod header;
pub mod icmp;
pub mod mss;
