//! Revocation: signed, stored and on its way to everybody at once; then who has it in force.

use std::collections::BTreeMap;

use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{KeyId, Name, NodeId, Position};
use mesh_protocol::key::VerifyKey;
use mesh_protocol::offline::{InFile as _, RevocationFile};
use mesh_protocol::record::{NodeGrant, Revocation};
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
    pub(crate) fn revoke(
        &mut self,
        text: &str,
        reason: &str,
        void_tokens: bool,
        signed: Option<&str>,
    ) -> Result<RevocationTicket, Refusal> {
        self.writable()?;
        let (envelope, revocation) = match signed {
            Some(signed) => self.signed_revocation(text, signed)?,
            None => {
                let key = self.keys.revoker.as_ref().ok_or_else(|| {
                    let message = "the revoker's key is not on this machine: 'meshctl node revoke --signer'";
                    refusal(RefusalCode::Unavailable, message)
                })?;
                let revocation = self.next_revocation(text, reason, key.verify_key().id())?;
                (Envelope::seal(self.mesh(), &revocation, &[key]), revocation)
            }
        };
        let node = revocation.node;
        let grant = self.member_grant(node)?;
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

    /// A revocation for a revoker elsewhere to sign.
    pub(crate) fn draft_revocation(&self, text: &str, reason: &str, revoker: VerifyKey) -> Result<String, Refusal> {
        if !self.view().policy().revokers.contains(&revoker) {
            let message = format!("key {} is no revoker of the trust policy", revoker.id().short());
            return Err(refusal(RefusalCode::BadMessage, message));
        }
        let revocation = Envelope::unsigned(&self.next_revocation(text, reason, revoker.id())?);
        Ok(RevocationFile { mesh: self.mesh(), revocation }.to_text())
    }

    /// What came back must be for the node that was named, or an operator's slip would cut off another.
    fn signed_revocation(&self, text: &str, signed: &str) -> Result<(Envelope, Revocation), Refusal> {
        let bad = |message: String| refusal(RefusalCode::BadMessage, message);
        let file = RevocationFile::from_text(signed).map_err(|error| bad(format!("signed revocation: {error}")))?;
        let revocation: Revocation = file.revocation.unverified().map_err(|error| bad(error.to_string()))?;
        if revocation.node != self.find_node(text)? {
            return Err(bad("the signed revocation is of another node".to_owned()));
        }
        Ok((file.revocation, revocation))
    }

    fn member_grant(&self, node: NodeId) -> Result<NodeGrant, Refusal> {
        let member = self.view().member(node).map(|member| member.grant.object.clone());
        member.ok_or_else(|| refusal(RefusalCode::Token, format!("node {} is out already", node.short())))
    }

    fn next_revocation(&self, text: &str, reason: &str, revoker: KeyId) -> Result<Revocation, Refusal> {
        let node = self.find_node(text)?;
        let grant = self.member_grant(node)?;
        let head = self.view().revocation_heads().into_iter().find(|head| head.revoker == revoker);
        Ok(Revocation {
            number: head.as_ref().map_or(1, |head| head.number + 1),
            previous: head.map(|head| head.hash),
            node,
            up_to_generation: grant.generation,
            reason: cut(reason, 256),
            time: unix_now(),
        })
    }

    pub(super) fn ticket(&self, name: Name) -> RevocationTicket {
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
