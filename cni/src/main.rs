//! The CNI plugin of Mesh: attaches pods.

fn main() {}
