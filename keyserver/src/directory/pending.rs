//! Grants that an issuer elsewhere has to sign: listed for it, and taken when they come back.

use mesh_protocol::UnixSeconds;
use mesh_protocol::admin::{ImportedGrant, PendingStatus};
use mesh_protocol::cbor;
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Name, NodeId};
use mesh_protocol::key::VerifyKey;
use mesh_protocol::offline::{GrantReason, GrantRequest, GrantRequests, InFile as _, MeshFile, Reached, SignedGrants};
use mesh_protocol::record::NodeGrant;
use mesh_protocol::trust::Accepted;
use tracing::info;

use super::reserve::{RESERVED_FOR, token_of};
use super::token::StoredToken;
use super::{Directory, layout, refusal, unix_now};
use crate::store::Operation;

/// Requests in one file, and their bytes: it goes over the socket as one line of 1 MiB at most, in base64. The others come
/// when these are signed.
const MAX_IN_FILE: usize = 256;
/// See [`MAX_IN_FILE`].
const MAX_IN_FILE_BYTES: usize = 448 * 1024;

impl Directory {
    /// The mesh as a machine without a network has to know it.
    pub(crate) fn mesh_file(&mut self) -> MeshFile {
        MeshFile {
            mesh: self.mesh(),
            policies: self.view().policies().iter().map(|policy| policy.envelope.clone()).collect(),
            checkpoint: Some(self.checkpoint()),
            keyservers: self.settings.addresses.clone(),
            reached: Some(Reached { generation: self.view().highest_generation(), serial: self.history.serial }),
        }
    }

    /// What waits for an issuer elsewhere, and the file for it.
    pub(crate) fn pending_grants(&mut self) -> Result<(Vec<PendingStatus>, String), Refusal> {
        let requests = self.pending_requests()?;
        let pending = requests.iter().filter_map(|request| self.pending_status(request)).collect();
        let file = GrantRequests { mesh: self.mesh_file(), requests };
        Ok((pending, file.to_text()))
    }

    /// What waits for an issuer elsewhere, as much as one file takes.
    pub(super) fn pending_requests(&self) -> Result<Vec<GrantRequest>, Refusal> {
        let mut requests = Vec::new();
        for request in self.reservations.by_serial() {
            if !self.is_voided(request)? {
                requests.push(request.clone());
            }
        }
        let now = unix_now();
        let due = self.view().members().filter(|(_, member)| self.is_due(&member.grant.object, now));
        // Which is a renewal, too.
        let due = due.filter(|(node, _)| !self.awaits_identity(**node));
        let due = due.chain(self.view().fallen());
        let due = due.filter(|(_, member)| !self.signs_for(&member.grant.object.cluster));
        requests.extend(due.map(|(_, member)| self.renewal_request(&member.grant, now)));
        requests.extend(self.successions());
        Ok(fit_one_file(requests.into_iter()))
    }

    /// What an issuer elsewhere has to sign to renew a grant.
    pub(super) fn renewal_request(&self, held: &Accepted<NodeGrant>, now: UnixSeconds) -> GrantRequest {
        GrantRequest {
            grant: self.renewed(&held.object, now),
            reason: GrantReason::Renewal { held: held.envelope.clone() },
            until: now.saturating_add(RESERVED_FOR),
        }
    }

    pub(super) fn pending_status(&self, request: &GrantRequest) -> Option<PendingStatus> {
        let grant = &request.grant;
        Some(PendingStatus {
            node: grant.node,
            name: grant.name.clone(),
            cluster: grant.cluster.clone(),
            issuer: self.issuer_of(&grant.cluster)?,
            renewal: matches!(request.reason, GrantReason::Renewal { .. }),
            regrant: self.view().is_regrant(request),
            identity: matches!(request.reason, GrantReason::Succession { .. }).then(|| grant.identity.id()),
            restoration: matches!(request.reason, GrantReason::Restoration { .. }),
            prefixes: grant.prefixes().collect(),
            serial: grant.serial,
            until: request.until,
        })
    }

    fn issuer_of(&self, cluster: &Name) -> Option<VerifyKey> {
        self.view().policy().cluster(cluster).map(|(issuer, _)| issuer.key)
    }

    /// Whether the key of the issuer that has this cluster lies here.
    pub(super) fn signs_for(&self, cluster: &Name) -> bool {
        let held = self.keys.issuer.as_ref().map(mesh_protocol::key::SigningKey::verify_key);
        held.is_some() && held == self.issuer_of(cluster)
    }

    fn is_voided(&self, request: &GrantRequest) -> Result<bool, Refusal> {
        let Some(token) = token_of(request) else { return Ok(false) };
        let entry = self.get(&layout::token(token))?;
        Ok(entry
            .and_then(|entry| cbor::from_slice::<StoredToken>(&entry.value).ok())
            .is_some_and(|token| token.revoked))
    }

    /// Takes signed grants, each by itself: what is wrong with one does not hold up the others.
    pub(crate) fn import_grants(&mut self, text: &str) -> Result<Vec<ImportedGrant>, Refusal> {
        let file = SignedGrants::from_text(text);
        let file = file.map_err(|error| refusal(RefusalCode::BadMessage, format!("file of signed grants: {error}")))?;
        if file.mesh != self.mesh() {
            let message = format!("the grants are of mesh {}, this is mesh {}", file.mesh, self.mesh());
            return Err(refusal(RefusalCode::BadMessage, message));
        }
        self.writable()?;
        let some_fell = self.view().fallen().next().is_some();
        let mut imported = Vec::new();
        for envelope in &file.grants {
            let grant: NodeGrant = envelope.unverified().map_err(|error| {
                refusal(RefusalCode::BadMessage, format!("the file holds something that is no grant: {error}"))
            })?;
            let error = self.import_grant(envelope, &grant).err().map(|refusal| refusal.message);
            imported.push(ImportedGrant { name: grant.name, error });
        }
        if some_fell && self.view().fallen().next().is_none() {
            self.forget_alarm(super::NODES_OUT);
        }
        Ok(imported)
    }

    fn import_grant(&mut self, envelope: &Envelope, grant: &NodeGrant) -> Result<(), Refusal> {
        let hash = envelope.hash(self.mesh());
        let member = self.view().member(grant.node);
        if member.is_some_and(|member| member.grant.hash == hash) {
            return Ok(());
        }
        if self.view().is_former(grant) {
            let message = "its issuer has another key since it was signed: have that one sign, from a new 'meshctl grant \
                           list-pending'";
            return Err(refusal(RefusalCode::OutOfScope, message));
        }
        let fallen = self.view().fallen().find(|(node, _)| **node == grant.node).map(|(_, member)| member);
        let renews = member.is_some_and(|member| is_renewal(&member.grant.object, grant))
            || fallen.is_some_and(|member| has_its_place(&member.grant.object, grant));
        let mut operations = Vec::new();
        if let Some(request) = self.reservations.get(grant.node).cloned() {
            if request.grant != *grant {
                return Err(refusal(RefusalCode::BadMessage, "it is not what is reserved for this node"));
            }
            if self.is_voided(&request)? {
                return Err(refusal(RefusalCode::Token, "its join token was voided"));
            }
            operations.push(Operation::Delete(layout::reservation(grant.node)));
        } else if !renews {
            let message = "nothing is reserved for it: it waited too long, or was rejected";
            return Err(refusal(RefusalCode::Token, message));
        }
        let succeeds = self.successors.get(grant.node).is_some_and(|one| one.identity == grant.identity);
        if succeeds {
            operations.push(Operation::Delete(layout::successor(grant.node)));
        }
        let changed = self.change(envelope, Vec::new(), operations);
        changed.map_err(|error| error.into_refusal(RefusalCode::OutOfScope))?;
        if succeeds {
            self.successors.forget(grant.node);
        }
        self.forget_reservation(grant.node);
        self.metrics.joins.inc();
        info!(node = %grant.name, id = %grant.node.short(), cluster = %grant.cluster, serial = grant.serial, "signed grant taken");
        Ok(())
    }

    /// Refuses a node that waits.
    pub(crate) fn reject_grant(&mut self, text: &str) -> Result<PendingStatus, Refusal> {
        let node = self.find_waiting(text)?;
        let status = self.reservations.get(node).and_then(|request| self.pending_status(request));
        self.reject(node)?;
        status.ok_or_else(|| refusal(RefusalCode::Token, "its cluster is not in the mesh any more"))
    }

    fn find_waiting(&self, text: &str) -> Result<NodeId, Refusal> {
        let start = text.to_ascii_lowercase();
        let hex = start.len() >= 8 && start.bytes().all(|byte| byte.is_ascii_hexdigit());
        let waiting = self.reservations.by_serial().into_iter().map(|request| &request.grant);
        let matching =
            waiting.filter(|grant| grant.name.as_str() == text || (hex && grant.node.to_string().starts_with(&start)));
        let found: Vec<NodeId> = matching.map(|grant| grant.node).collect();
        match found.as_slice() {
            [node] => Ok(*node),
            [] => Err(refusal(RefusalCode::Token, format!("no node {text} waits: see 'meshctl grant list-pending'"))),
            _ => Err(refusal(RefusalCode::BadMessage, format!("more than one node that waits is called {text}"))),
        }
    }
}

/// The first of these requests, as many as one file takes.
pub(super) fn fit_one_file(requests: impl Iterator<Item = GrantRequest>) -> Vec<GrantRequest> {
    let mut bytes = 0;
    let fits = |request: &GrantRequest| {
        bytes += cbor::to_vec(request).len();
        bytes <= MAX_IN_FILE_BYTES
    };
    requests.take(MAX_IN_FILE).take_while(fits).collect()
}

fn is_renewal(held: &NodeGrant, grant: &NodeGrant) -> bool {
    grant.generation > held.generation && has_its_place(held, grant)
}

fn has_its_place(held: &NodeGrant, grant: &NodeGrant) -> bool {
    grant.name == held.name && grant.prefixes().eq(held.prefixes())
}
