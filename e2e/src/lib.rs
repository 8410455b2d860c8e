//! A network-namespace lab: real binaries, real packets, looked at from outside.
//!
//! ```text
//! lab netns link      namespaces for nodes and pods on one underlay, removed with the lab
//! daemon              keyserver and meshd as child processes: start, wait until ready, kill, read their logs
//! machine             a systemd of its own on a node, in a control_group
//! mesh pod            a whole mesh by the commands a user types; pods by the CNI binary
//! traffic capture     counted packets, verified bytes; what is on the underlay while they pass
//! wait report         polling with a deadline; the demo's lines and what a failure prints
//! rotation            packets counted while keys rotate
//! bench               the data plane against its rivals and the bare link
//! ```
//!
//! Needs root. Namespaces and directories carry this process's id in their names, so that labs run side by side; a
//! guardian process removes them when this one dies, however it dies.

pub mod bench;
pub mod capture;
mod control_group;
pub mod daemon;
pub mod lab;
pub mod machine;
pub mod mesh;
pub mod pod;
pub mod report;
pub mod rotation;
pub mod traffic;
pub mod wait;

pub use capture::{Capture, Seen};
pub use daemon::Daemon;
pub use lab::{Lab, Node};
pub use mesh::{Mesh, MeshNode};
pub use pod::Pod;
