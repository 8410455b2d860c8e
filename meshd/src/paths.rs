//! Ways to reach a node: which addresses are worth telling others, and which told ones are worth trying.

mod candidates;

pub(crate) use candidates::{own_candidates, usable};
