//! Inner packets: what their headers say, and the few that the data plane changes, cuts, joins or makes itself.

pub mod checksum;
pub mod coalesce;
pub mod dscp;
pub mod ecn;
pub mod flow;
pub mod fragment;
pub mod header;
pub mod icmp;
pub(crate) mod model;
pub mod mss;
pub mod offload;
pub mod own;
pub mod pieces;
pub mod reassembly;
pub mod segment;
mod source_route;
pub(crate) mod turns;
