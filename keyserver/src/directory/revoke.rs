//! Revocation: signed, stored and on its way to everybody at once; then who has it in force.

use std::collections::BTreeMap;

use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Name, NodeId, Position};
use mesh_protocol::record::Revocation;
use tokio::sync::watch;
use tracing::warn;

use super::{Directory, refusal, unix_now};

/// A revocation that is under way.
#[derive(Debug)]
pub(crate) struct RevocationTicket {
    /// Who is cut off.
    pub(crate) name: Name,
    /// Where it stands in the history.
    pub(crate) position: Position,
    /// Who was connected, and has to confirm.
    pub(crate) online: BTreeMap<NodeId, Name>,
    /// Who was not.
    pub(crate) offline: Vec<Name>,
}

impl Directory {
    /// Cuts a node off.
    pub(crate) fn revoke(&mut self, node: &str, reason: &str, void_tokens: bool) -> Result<RevocationTicket, Refusal> {
        self.writable()?;
        let node = self.find_node(node)?;
        let member = self.view().member(node).map(|member| member.grant.object.clone());
        let grant =
            member.ok_or_else(|| refusal(RefusalCode::Token, format!("node {} is out already", node.short())))?;
        let revoker = self.keys.revoker.verify_key().id();
        let head = self.view().revocation_heads().into_iter().find(|head| head.revoker == revoker);
        let revocation = Revocation {
            number: head.as_ref().map_or(1, |head| head.number + 1),
            previous: head.map(|head| head.hash),
            node,
            up_to_generation: grant.generation,
            reason: cut(reason, 256),
            time: unix_now(),
        };
        let envelope = Envelope::seal(self.mesh(), &revocation, &[&self.keys.revoker]);
        let changed = self.change(&envelope, Vec::new(), Vec::new());
        changed.map_err(|error| error.into_refusal(RefusalCode::BadMessage))?;
        self.flush();
        self.hub.remove(node);
        self.publishers.remove(&node);
        self.metrics.revocations.inc();
        warn!(node = %grant.name, reason = %revocation.reason, "node revoked");
        if void_tokens {
            self.void_tokens_of(&grant.cluster)?;
        }
        Ok(self.ticket(grant.name))
    }

    fn ticket(&self, name: Name) -> RevocationTicket {
        let online: BTreeMap<NodeId, Name> =
            self.hub.sessions().iter().map(|(node, session)| (*node, session.name.clone())).collect();
        let others = self.view().members().filter(|(node, _)| !online.contains_key(node));
        let offline = others.map(|(_, member)| member.grant.object.name.clone()).collect();
        RevocationTicket { name, position: self.position(), online, offline }
    }

    /// Which of `nodes` have everything up to `position` in force; of the others, which are still connected.
    pub(crate) fn confirmed<'a>(
        &self,
        nodes: impl Iterator<Item = &'a NodeId>,
        position: Position,
    ) -> (Vec<NodeId>, Vec<NodeId>) {
        let (mut confirmed, mut waiting) = (Vec::new(), Vec::new());
        for node in nodes {
            let Some(session) = self.hub.sessions().get(node) else { continue };
            let list = if session.applied.is_some_and(|applied| reaches(applied, position)) {
                &mut confirmed
            } else {
                &mut waiting
            };
            list.push(*node);
        }
        (confirmed, waiting)
    }

    /// Rises whenever [`Self::confirmed`] may answer differently.
    pub(crate) fn progress(&self) -> watch::Receiver<u64> {
        self.hub.progress()
    }

    /// A node by name, id, or the start of an id.
    pub(super) fn find_node(&self, text: &str) -> Result<NodeId, Refusal> {
        let named = text.parse::<Name>().ok().and_then(|name| self.view().member_named(&name));
        if let Some((node, _)) = named {
            return Ok(node);
        }
        let start = text.to_ascii_lowercase();
        let hex = start.len() >= 8 && start.bytes().all(|byte| byte.is_ascii_hexdigit());
        let mut matching = self.view().members().filter(|(node, _)| hex && node.to_string().starts_with(&start));
        match (matching.next(), matching.next()) {
            (Some((node, _)), None) => Ok(*node),
            (Some(_), Some(_)) => {
                Err(refusal(RefusalCode::BadMessage, format!("more than one node's id starts with {text}")))
            }
            _ => Err(refusal(RefusalCode::Token, format!("no node {text}: see 'meshctl node list'"))),
        }
    }
}

/// Whether `applied` is at or after `position`, in the same history.
pub(super) fn reaches(applied: Position, position: Position) -> bool {
    applied.epoch == position.epoch && applied.revision >= position.revision
}

fn cut(text: &str, most_bytes: usize) -> String {
    let mut end = text.len().min(most_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}
