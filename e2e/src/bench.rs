//! The bench: Mesh's data plane, its rivals and the bare link in one interleaved run.
//!
//! ```text
//! args ─> run ─> link                     two namespaces, a veth pair with or without segmentation offload
//!          │ └─> candidate ─> tunnel      daemons of one candidate, up and configured
//!          └──> measure ─> load, search   generators in the namespaces; what it took: cpu
//!                  └─> results ─> report  samples as JSON; medians, spread, ratios, Markdown
//! ```
//!
//! Both ends and the load share the machine's cores, so figures compare candidates of one run and nothing else. Rounds
//! are interleaved, and a sample carries what others used of the machine meanwhile.

pub mod args;
pub mod candidate;
pub mod child;
pub mod cpu;
pub mod link;
pub mod load;
pub mod measure;
pub mod priority;
pub mod probe;
pub mod report;
pub mod results;
pub mod run;
pub mod search;
pub mod tunnel;
