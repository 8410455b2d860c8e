//! Which node a person means: by name, id, the start of an id, or an address.

use std::net::IpAddr;

use crate::facts::{DirectoryFacts, PeerFacts};

/// A node: this one, or a peer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// Its addresses in the mesh.
    pub(super) addresses: &'a [IpAddr],
    /// What the directory says of it; `None` for this node.
    pub(super) peer: Option<&'a PeerFacts>,
}

/// The node of that name, or whose id begins so.
///
/// # Errors
/// None is, or several are: a sentence that says so.
pub(super) fn node<'a>(directory: &'a DirectoryFacts, target: &str) -> Result<Target<'a>, String> {
    let own = &directory.own;
    let own = (own.node, Target { name: own.name.as_str(), addresses: &own.addresses, peer: None });
    let peers = directory
        .peers
        .iter()
        .map(|peer| (peer.node, Target { name: peer.name.as_str(), addresses: &peer.addresses, peer: Some(peer) }));
    let all: Vec<_> = std::iter::once(own).chain(peers).collect();
    if let Some((_, found)) = all.iter().find(|(_, node)| node.name == target) {
        return Ok(*found);
    }
    let by_id: Vec<_> = all.iter().filter(|(id, _)| target.len() >= 4 && id.to_string().starts_with(target)).collect();
    match by_id.as_slice() {
        [(_, found)] => Ok(*found),
        [] => Err(format!("no node {target}: see meshctl peers")),
        several => Err(format!("{target} is the start of {} ids: give more of it", several.len())),
    }
}

/// The peer of that name or id, or that has this address or the pod with it.
///
/// # Errors
/// There is none, or it is this node itself: a sentence that says so.
pub(super) fn peer<'a>(directory: &'a DirectoryFacts, target: &str) -> Result<&'a PeerFacts, String> {
    if let Ok(ip) = target.parse::<IpAddr>() {
        let has =
            |peer: &&PeerFacts| peer.addresses.contains(&ip) || peer.pod_cidrs.iter().any(|cidr| cidr.contains(&ip));
        return directory.peers.iter().find(has).ok_or_else(|| format!("{ip} is no peer's: see meshctl routes"));
    }
    let found = node(directory, target)?;
    found.peer.ok_or_else(|| format!("{} is this node itself: give a peer's name", found.name))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::desired::tests::facts;

    #[test]
    fn peers_are_found_by_name_id_and_address() {
        let directory = facts().directory;
        let number = |target: &str| peer(&directory, target).map(|peer| peer.number);
        let id = directory.peers[0].node.to_string();
        for target in ["w7", &id, &id[..8], "100.100.1.7", "fd00:1::1:7", "10.2.7.9"] {
            assert_eq!(number(target), Ok(7), "{target}");
        }
        for target in ["w8", "", "n1", "100.100.0.1", "10.2.8.1", &id[..3]] {
            assert!(number(target).is_err(), "{target}");
        }
    }
}
