//! Enrols nodes and tells each who its peers are.

fn main() {}
