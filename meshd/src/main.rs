//! The node daemon of Mesh.

fn main() {}
