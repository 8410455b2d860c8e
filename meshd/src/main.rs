//! The node daemon of Mesh.

mod config;
mod control;
mod desired;
mod directory;
mod facts;
mod host;
mod identity;
mod join;
mod paths;
mod pods;
mod reconcile;
mod state_dir;

fn main() {}
