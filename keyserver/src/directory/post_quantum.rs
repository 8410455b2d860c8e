//! A mesh, or some of its clusters, comes to require post-quantum tunnels, and goes back.
//!
//! ```text
//! all nodes         the policy says so: every node hears of it, grants stand as they are
//! some clusters     their nodes are granted anew: here, or by an issuer elsewhere from a file
//! ```
//!
//! Nothing is remembered between requests: grants and policy say how far it is, so a request that ended at any moment is
//! made again. A grant goes one way only: what one requires, no renewal takes back.

use mesh_protocol::admin::PostQuantumState;
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::id::Name;
use mesh_protocol::offline::{GrantRequests, InFile as _};
use mesh_protocol::record::{NodeGrant, PostQuantum};
use mesh_protocol::trust::Accepted;
use tracing::info;

use super::pending::fit_one_file;
use super::{Directory, refusal, unix_now};

/// Nodes granted anew in one go: each is a transaction, and nobody else is served meanwhile.
const AT_ONCE: usize = 64;

impl Directory {
    /// Signs a policy that says so, or grants some nodes of `clusters` anew.
    pub(crate) fn set_post_quantum(&mut self, pq: PostQuantum, clusters: &[Name]) -> Result<PostQuantumState, Refusal> {
        self.writable()?;
        if let Some(unknown) = clusters.iter().find(|name| self.view().policy().cluster(name).is_none()) {
            return Err(refusal(RefusalCode::Token, format!("there is no cluster {unknown}")));
        }
        match (clusters, pq) {
            ([], _) if self.view().policy().pq == pq => {}
            ([], _) => {
                self.amend_policy(|policy| policy.pq = pq).map_err(|error| self.signed_elsewhere(error, pq))?;
                info!(?pq, "policy says whether tunnels are post-quantum");
            }
            (_, PostQuantum::Required) => self.require_by_grants(clusters)?,
            (_, PostQuantum::Off) => {
                let message =
                    "a grant that requires post-quantum tunnels goes on doing so: only the policy of all can be off";
                return Err(refusal(RefusalCode::BadMessage, message));
            }
        }
        self.flush();
        Ok(self.post_quantum_state(clusters))
    }

    /// Where a root is needed that is not here, the command to type is part of the refusal.
    fn signed_elsewhere(&self, error: Refusal, pq: PostQuantum) -> Refusal {
        if self.sole_root().is_some() {
            return error;
        }
        let word = if pq == PostQuantum::Required { "required" } else { "off" };
        Refusal { message: format!("{}: meshctl policy propose --pq {word} --out next.txt", error.message), ..error }
    }

    fn require_by_grants(&mut self, clusters: &[Name]) -> Result<(), Refusal> {
        let here = self.not_required(clusters).map(|grant| &grant.object);
        let here = here.filter(|grant| self.signs_for(&grant.cluster));
        let due: Vec<NodeGrant> = here.take(AT_ONCE).cloned().collect();
        for held in &due {
            let next = NodeGrant { pq: PostQuantum::Required, ..self.renewed(held, unix_now()) };
            self.store_grant(&next)?;
        }
        Ok(())
    }

    /// Grants of members of these clusters, or of all, that do not require it by themselves.
    fn not_required<'a>(&'a self, clusters: &'a [Name]) -> impl Iterator<Item = &'a Accepted<NodeGrant>> + 'a {
        self.grants_in(clusters).filter(|grant| grant.object.pq != PostQuantum::Required)
    }

    fn grants_in<'a>(&'a self, clusters: &'a [Name]) -> impl Iterator<Item = &'a Accepted<NodeGrant>> + 'a {
        let grants = self.view().members().map(|(_, member)| &member.grant);
        // Plain WireGuard peers agree on nothing.
        grants
            .filter(|grant| !grant.object.external && (clusters.is_empty() || clusters.contains(&grant.object.cluster)))
    }

    fn post_quantum_state(&mut self, clusters: &[Name]) -> PostQuantumState {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let (total, open) = (self.grants_in(clusters).count(), self.not_required(clusters).count());
        let here = self.not_required(clusters).filter(|grant| self.signs_for(&grant.object.cluster)).count();
        // The policy needs no grants.
        let (left, pending) = if clusters.is_empty() { (0, 0) } else { (count(here), count(open - here)) };
        PostQuantumState {
            policy_version: self.view().policy().version,
            policy: self.view().policy().pq,
            total: count(total),
            required: count(total - open),
            left,
            pending,
            file: (pending > 0).then(|| self.requiring_file(clusters)),
        }
    }

    /// What an issuer elsewhere has to sign so that these clusters require it: renewals, and the identity keys that wait.
    fn requiring_file(&mut self, clusters: &[Name]) -> String {
        let now = unix_now();
        let due = self.not_required(clusters).filter(|grant| !self.signs_for(&grant.object.cluster));
        let due = due.filter(|grant| !self.awaits_identity(grant.object.node));
        let renewals = due.map(|grant| self.renewal_request(grant, now));
        let successions = self.successions().filter(|request| clusters.contains(&request.grant.cluster));
        let requests = renewals.chain(successions).map(|mut request| {
            request.grant.pq = PostQuantum::Required;
            request
        });
        let requests = fit_one_file(requests);
        GrantRequests { mesh: self.mesh_file(), requests }.to_text()
    }
}
