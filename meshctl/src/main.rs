//! The operator's command line for Mesh.

fn main() {}
