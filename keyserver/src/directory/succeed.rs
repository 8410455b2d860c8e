//! Identity keys that nodes replace: granted at once where the issuer's key lies here, else kept until it has signed
//! elsewhere. And who a key speaks for.

use std::collections::BTreeMap;

use mesh_protocol::cbor;
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::NodeId;
use mesh_protocol::key::VerifyKey;
use mesh_protocol::offline::{GrantReason, GrantRequest};
use mesh_protocol::record::{Handover, NodeGrant};
use minicbor::{Decode, Encode};
use tracing::{info, warn};

use super::reserve::RESERVED_FOR;
use super::{Directory, enrol, layout, refusal, unix_now};
use crate::store::{Operation, Range, Store, StoreError, Txn};

/// The identity key that a node wants, and its right to it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Successor {
    #[n(0)]
    pub(super) identity: VerifyKey,
    #[n(1)]
    pub(super) handover: Handover,
}

/// Those that wait for an issuer elsewhere: at most one for each member, about 300 bytes.
#[derive(Debug, Default)]
pub(super) struct Successors(BTreeMap<NodeId, Successor>);

impl Successors {
    /// Reads them from the store. What does not decode was written by no version of this program.
    pub(super) fn load(store: &dyn Store) -> Result<Self, StoreError> {
        let entries = store.range(&Range::prefix(layout::SUCCESSORS), None, usize::MAX)?;
        let read = |entry: &crate::store::Entry| {
            let node = entry.key.strip_prefix(layout::SUCCESSORS)?.try_into().ok()?;
            Some((NodeId(node), cbor::from_slice(&entry.value).ok()?))
        };
        Ok(Self(entries.iter().filter_map(read).collect()))
    }

    pub(super) fn get(&self, node: NodeId) -> Option<&Successor> {
        self.0.get(&node)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Forgets one in memory, after the store has.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.0.remove(&node);
    }
}

impl Directory {
    /// The node that may have a session with this identity key. `shown` is its own grant, if the node sent it: a store that
    /// is older than that learns of the key by it.
    pub(crate) fn admit(&mut self, key: &VerifyKey, shown: Option<&Envelope>) -> Option<NodeId> {
        let Some((node, member)) = self.view().member_with(key) else { return self.learn_identity(key, shown?) };
        // Once the newest key is at work, the one before is not the node's any more.
        let newest = member.grant.object.identity;
        let at_work = self.hub.sessions().get(&node).map(|session| session.identity);
        (newest == *key || at_work != Some(newest)).then_some(node)
    }

    /// Takes the grant of a member that has replaced its identity key, where this store does not know of it. Nothing is
    /// believed but what an issuer and the key before have signed.
    fn learn_identity(&mut self, key: &VerifyKey, shown: &Envelope) -> Option<NodeId> {
        let grant: NodeGrant = shown.unverified().ok()?;
        if grant.identity != *key || self.view().member(grant.node).is_none() {
            return None;
        }
        self.view().check_grant(shown).ok()?;
        warn!(node = %grant.name, "node knows of an identity key that this store does not: was it restored from a copy?");
        if let Err(error) = self.change(shown, Vec::new(), Vec::new()) {
            // It may talk all the same: all that it needs is in its grant.
            warn!(node = %grant.name, ?error, "its grant is not stored");
        }
        Some(grant.node)
    }

    /// A node hands its place to another identity key. Tells whether that is granted; else it waits for the issuer.
    pub(crate) fn succeed(&mut self, node: NodeId, successor: VerifyKey, handover: Handover) -> Result<bool, Refusal> {
        self.pace(node)?;
        self.writable()?;
        let member = self.view().member(node).ok_or_else(|| refusal(RefusalCode::Revoked, "not a member"))?;
        let held = member.grant.clone();
        if held.object.identity == successor {
            return Ok(true);
        }
        if member.speaks_with() != Some(held.object.identity) {
            let message = "the node has to publish a record with the identity key that it has before it takes another";
            return Err(refusal(RefusalCode::Record, message));
        }
        let successor = Successor { identity: successor, handover };
        let grant = self.succeeded(&held.object, &successor);
        let reason = GrantReason::Succession { held: held.envelope };
        let request = GrantRequest { grant, reason, until: unix_now().saturating_add(RESERVED_FOR) };
        self.view().check_request(&request, unix_now()).map_err(enrol::refused)?;
        if !self.signs_for(&held.object.cluster) {
            return self.await_issuer(&request.grant, successor).map(|()| false);
        }
        let envelope = self.seal_grant(&request.grant)?;
        let changed = self.change(&envelope, Vec::new(), Vec::new());
        changed.map_err(|error| error.into_refusal(RefusalCode::OutOfScope))?;
        self.flush();
        info!(node = %request.grant.name, key = %request.grant.identity.id().short(), "identity key replaced");
        Ok(true)
    }

    /// The grant after `held` with the next identity key; all else as in a renewal.
    pub(super) fn succeeded(&self, held: &NodeGrant, successor: &Successor) -> NodeGrant {
        let mut grant = self.renewed(held, unix_now());
        grant.identity = successor.identity;
        grant.succession.push(successor.handover.clone());
        grant
    }

    /// Keeps what a node asks for until its issuer has signed.
    fn await_issuer(&mut self, grant: &NodeGrant, successor: Successor) -> Result<(), Refusal> {
        let node = grant.node;
        match self.successors.get(node) {
            Some(held) if *held == successor => return Ok(()),
            Some(_) => self.alarm(format!(
                "node {} asks for another new identity key than before: was it restored from a backup, or are there two \
                 machines with one identity?",
                grant.name
            )),
            None => {}
        }
        let put = Operation::Put(layout::successor(node), cbor::to_vec(&successor));
        self.commit(&Txn { then: vec![put], ..Txn::default() })?;
        info!(node = %grant.name, key = %successor.identity.id().short(), "new identity key waits for its issuer");
        self.successors.0.insert(node, successor);
        Ok(())
    }

    /// Identity keys that members want, as their issuers have to sign them.
    pub(super) fn successions(&self) -> impl Iterator<Item = GrantRequest> + '_ {
        let until = unix_now().saturating_add(RESERVED_FOR);
        self.successors.0.iter().filter_map(move |(node, successor)| {
            let held = &self.view().member(*node)?.grant;
            let goes_on = held.object.identity == successor.handover.from;
            goes_on.then(|| GrantRequest {
                grant: self.succeeded(&held.object, successor),
                reason: GrantReason::Succession { held: held.envelope.clone() },
                until,
            })
        })
    }

    /// Whether this member waits for its issuer to sign another identity key.
    pub(super) fn awaits_identity(&self, node: NodeId) -> bool {
        self.successors.get(node).is_some()
    }

    /// Forgets what nodes wait for that are out, or have got a key meanwhile.
    pub(super) fn forget_successors(&mut self) {
        let waits = |node: NodeId, successor: &Successor| {
            let member = self.view().member(node);
            member.is_some_and(|member| member.grant.object.identity == successor.handover.from)
        };
        let over: Vec<NodeId> =
            self.successors.0.iter().filter(|(node, one)| !waits(**node, one)).map(|(node, _)| *node).collect();
        for node in over {
            let then = vec![Operation::Delete(layout::successor(node))];
            let forgotten = self.writable().and_then(|()| self.commit(&Txn { then, ..Txn::default() }));
            if let Err(error) = forgotten {
                warn!(%error, "an identity key that nobody waits for is not forgotten");
                return;
            }
            self.successors.forget(node);
        }
    }

    /// Ends a session whose identity key does not speak for its node any more.
    pub(super) fn close_retired(&mut self, node: NodeId) {
        let Some(identity) = self.hub.sessions().get(&node).map(|session| session.identity) else { return };
        if self.view().member(node).is_some_and(|member| !member.admits(&identity)) {
            warn!(node = %node.short(), "session with an identity key that was replaced closed");
            self.hub.remove(node);
        }
    }

    /// Refuses to enrol an identity key that was ever another one's, or that its node has given up.
    pub(super) fn check_unused(&self, key: &VerifyKey, node: NodeId) -> Result<(), Refusal> {
        let Some(holder) = self.view().identity_holder(key) else { return Ok(()) };
        let member = self.view().member(holder).map(|member| &member.grant.object);
        let whose = member.map_or_else(|| holder.short(), |grant| format!("{} ({})", grant.name, holder.short()));
        if holder == node && member.is_none_or(|grant| grant.identity == *key) {
            return Ok(());
        }
        let message = match self.view().revoked_up_to(holder).filter(|_| member.is_none()) {
            Some(up_to) => {
                format!("this identity key is one of node {whose}, which is revoked up to generation {up_to}")
            }
            None if holder == node => format!("this identity key of node {whose} was replaced by another one"),
            None => format!("this identity key is one of node {whose}"),
        };
        Err(refusal(RefusalCode::Revoked, format!("{message}: join with a new identity")))
    }
}
