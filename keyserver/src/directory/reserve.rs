//! What is kept for nodes that wait for an issuer elsewhere: name, addresses, serial and the use of a token, for seven
//! days.

use std::collections::BTreeMap;

use ipnet::IpNet;
use mesh_protocol::cbor;
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::id::{Name, NodeId, TokenId};
use mesh_protocol::offline::{GrantReason, GrantRequest};
use mesh_protocol::token::JoinClaim;
use tracing::{info, warn};

use super::enrol::{Enrolment, TokenUse};
use super::token::StoredToken;
use super::{Directory, layout, refusal, unix_now};
use crate::store::{Operation, Range, Store, StoreError, Txn};

/// How long a node may wait, in seconds: a week, so that no issuer has to work on a weekend.
pub(super) const RESERVED_FOR: u64 = 7 * 86_400;
/// Nodes that may wait at once; about a KiB each. A token is needed for every one.
const MAX_WAITING: usize = 1_024;

/// Nodes that wait, by id.
#[derive(Debug, Default)]
pub(super) struct Reservations(BTreeMap<NodeId, GrantRequest>);

impl Reservations {
    /// Reads them from the store. What does not decode was written by no version of this program.
    pub(super) fn load(store: &dyn Store) -> Result<Self, StoreError> {
        let entries = store.range(&Range::prefix(layout::RESERVATIONS), None, usize::MAX)?;
        let requests = entries.iter().filter_map(|entry| cbor::from_slice::<GrantRequest>(&entry.value).ok());
        Ok(Self(requests.map(|request| (request.grant.node, request)).collect()))
    }

    pub(super) fn get(&self, node: NodeId) -> Option<&GrantRequest> {
        self.0.get(&node)
    }

    /// As if a week had passed for one node.
    #[cfg(test)]
    pub(super) fn expire(&mut self, node: NodeId) {
        self.0.entry(node).and_modify(|request| request.until = 0);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// In the order of serials: so they are signed.
    pub(super) fn by_serial(&self) -> Vec<&GrantRequest> {
        let mut requests: Vec<&GrantRequest> = self.0.values().collect();
        requests.sort_by_key(|request| request.grant.serial);
        requests
    }

    /// Until when this very claim waits. The connection may be another one.
    pub(super) fn waits_as(&self, claim: &JoinClaim) -> Option<u64> {
        let request = self.0.get(&claim.node())?;
        let same = matches!(&request.reason, GrantReason::Join { claim: held, .. } if held == claim);
        same.then_some(request.until)
    }

    /// Who else than `node` waits under that name.
    pub(super) fn named(&self, name: &Name, node: NodeId) -> Option<NodeId> {
        let others = self.0.values().map(|request| &request.grant).filter(|grant| grant.node != node);
        others.into_iter().find(|grant| grant.name == *name).map(|grant| grant.node)
    }

    /// A prefix kept for another node than `node` that overlaps `prefix`, and that node's name.
    pub(super) fn overlapping(&self, prefix: IpNet, node: NodeId) -> Option<(IpNet, &Name)> {
        let others = self.0.values().map(|request| &request.grant).filter(|grant| grant.node != node);
        let mut prefixes = others.flat_map(|grant| grant.prefixes().map(move |held| (held, &grant.name)));
        prefixes.find(|(held, _)| held.contains(&prefix) || prefix.contains(held))
    }
}

/// The token that a node used.
pub(super) fn token_of(request: &GrantRequest) -> Option<TokenId> {
    match &request.reason {
        GrantReason::Join { claim, .. } => Some(claim.token),
        GrantReason::Renewal { .. } | GrantReason::Succession { .. } | GrantReason::Restoration { .. } => None,
    }
}

impl Directory {
    /// Keeps everything that `request` asks for, in one transaction with the use of its token.
    pub(super) fn reserve(&mut self, request: GrantRequest, count: TokenUse) -> Result<Enrolment, Refusal> {
        let node = request.grant.node;
        if self.reservations.len() >= MAX_WAITING && self.reservations.get(node).is_none() {
            let message = format!("{MAX_WAITING} nodes wait for their grants already: have the issuer sign them");
            return Err(refusal(RefusalCode::Exhausted, message));
        }
        let TokenUse { compare, mut operations } = count;
        let serial = self.history.serial.max(request.grant.serial);
        operations.push(Operation::Put(layout::reservation(node), cbor::to_vec(&request)));
        operations.push(Operation::Put(layout::SERIAL_FLOOR.to_vec(), serial.to_be_bytes().to_vec()));
        // A claim with another token before this one gives that use back.
        let before =
            self.reservations.get(node).and_then(token_of).filter(|before| Some(*before) != token_of(&request));
        if let Some(before) = before {
            operations.extend(self.give_back(before, node)?);
        }
        self.commit(&Txn { compare, then: operations, otherwise: Vec::new() })?;
        self.history.serial = serial;
        self.keep_watermark();
        let (name, until) = (request.grant.name.clone(), request.until);
        info!(node = %name, id = %node.short(), cluster = %request.grant.cluster, serial = request.grant.serial, "node waits for its issuer");
        self.reservations.0.insert(node, request);
        self.count_waiting();
        Ok(Enrolment::Pending { until })
    }

    /// The operations that take back a use of a token.
    fn give_back(&self, token: TokenId, node: NodeId) -> Result<Vec<Operation>, Refusal> {
        let mut operations = vec![Operation::Delete(layout::token_use(token, node))];
        if let Some(entry) = self.get(&layout::token(token))?
            && let Ok(stored) = cbor::from_slice::<StoredToken>(&entry.value)
        {
            let stored = StoredToken { used: stored.used.saturating_sub(1), ..stored };
            operations.push(Operation::Put(entry.key, cbor::to_vec(&stored)));
        }
        Ok(operations)
    }

    /// Forgets a reservation in memory, after the store has.
    pub(super) fn forget_reservation(&mut self, node: NodeId) {
        self.reservations.0.remove(&node);
        self.count_waiting();
    }

    /// Frees what was kept for nodes whose time is over.
    pub(super) fn release_reservations(&mut self) {
        let now = unix_now();
        let over: Vec<GrantRequest> =
            self.reservations.0.values().filter(|request| request.until <= now).cloned().collect();
        for request in over {
            let node = request.grant.node;
            let released = self.writable().and_then(|()| {
                let mut then = vec![Operation::Delete(layout::reservation(node))];
                if let Some(token) = token_of(&request) {
                    then.extend(self.give_back(token, node)?);
                }
                self.commit(&Txn { then, ..Txn::default() })
            });
            if let Err(error) = released {
                warn!(%error, "reservation not released");
                return;
            }
            warn!(node = %request.grant.name, "nobody signed its grant in time, what was reserved is free");
            self.forget_reservation(node);
        }
    }

    /// Frees what was kept for nodes whose token a key signed that their issuer had before; gives their names.
    pub(super) fn release_tokens_of_former_keys(&mut self) -> Vec<Name> {
        let is_former = |request: &GrantRequest| {
            let issuer = self.view().policy().cluster(&request.grant.cluster).map(|(issuer, _)| issuer);
            let GrantReason::Join { limits, .. } = &request.reason else { return false };
            issuer.is_some_and(|issuer| limits.signers().any(|id| issuer.former_key(id).is_some()))
        };
        let waiting = self.reservations.0.values().filter(|request| is_former(request)).map(|request| &request.grant);
        let over: Vec<(NodeId, Name)> = waiting.map(|grant| (grant.node, grant.name.clone())).collect();
        let mut released = Vec::new();
        for (node, name) in over {
            match self.reject(node) {
                Ok(_) => released.push(name),
                Err(error) => warn!(node = %name, %error, "reservation not released"),
            }
        }
        released
    }

    /// Ends a node's waiting: it is told so when it asks again, and its use of the token counts.
    pub(super) fn reject(&mut self, node: NodeId) -> Result<GrantRequest, Refusal> {
        self.writable()?;
        let request = self.reservations.get(node).cloned();
        let request = request.ok_or_else(|| refusal(RefusalCode::Token, "this node does not wait"))?;
        let mut then = vec![Operation::Delete(layout::reservation(node))];
        if let Some(token) = token_of(&request) {
            then.push(Operation::Put(layout::token_use(token, node), layout::REJECTED.to_vec()));
        }
        self.commit(&Txn { then, ..Txn::default() })?;
        self.forget_reservation(node);
        warn!(node = %request.grant.name, "waits no more for its grant");
        Ok(request)
    }

    fn count_waiting(&self) {
        self.metrics.waiting.set(i64::try_from(self.reservations.len()).unwrap_or(i64::MAX));
    }
}
