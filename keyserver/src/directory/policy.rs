//! Trust policies: the next one, signed by the root that lies here or by roots elsewhere.

use mesh_protocol::admin::AdminReply;
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::Name;
use mesh_protocol::key::SigningKey;
use mesh_protocol::offline::{InFile as _, PolicyProposal};
use mesh_protocol::record::TrustPolicy;
use mesh_protocol::trust::Change;
use tracing::{info, warn};

use super::{Directory, refusal, unix_now};

/// Names of nodes in a message.
const NAMED: usize = 8;

impl Directory {
    /// Signs the policy after the newest one, with what `amend` changes.
    pub(super) fn amend_policy(&mut self, amend: impl FnOnce(&mut TrustPolicy)) -> Result<(), Refusal> {
        let change = self.amend_policy_keeping_sessions(amend)?;
        self.close_sessions_after(&change);
        Ok(())
    }

    /// As [`Self::amend_policy`]; of nodes that it puts out the caller closes the sessions.
    pub(super) fn amend_policy_keeping_sessions(
        &mut self,
        amend: impl FnOnce(&mut TrustPolicy),
    ) -> Result<Change, Refusal> {
        let held = self.view().policy();
        let root = self.sole_root().ok_or_else(|| {
            let message = "the policy is not signed on this machine: change it with 'meshctl policy propose', have its \
                           roots sign that, and 'meshctl policy import' it";
            refusal(RefusalCode::Unavailable, message)
        })?;
        let mut policy = held.clone();
        policy.version += 1;
        policy.previous = Some(self.view().policy_hash());
        policy.issued = unix_now();
        amend(&mut policy);
        let envelope = Envelope::seal(self.mesh(), &policy, &[root]);
        if envelope.payload().len() > mesh_protocol::envelope::MAX_PAYLOAD_BYTES {
            return Err(refusal(RefusalCode::Exhausted, "the trust policy would be too large: too many clusters"));
        }
        let changed = self.change_keeping_sessions(&envelope, Vec::new(), Vec::new());
        changed.map_err(|error| error.into_refusal(RefusalCode::BadMessage))
    }

    /// The root that lies here, if it signs policies alone.
    pub(super) fn sole_root(&self) -> Option<&SigningKey> {
        let held = self.view().policy();
        self.keys.root.as_ref().filter(|root| held.threshold == 1 && held.roots.contains(&root.verify_key()))
    }

    /// Adopts a policy once enough roots have signed it. Without `drop_nodes` one that leaves nodes outside is refused.
    pub(crate) fn import_policy(&mut self, text: &str, drop_nodes: bool) -> Result<AdminReply, Refusal> {
        let bad = |message: String| refusal(RefusalCode::BadMessage, message);
        let file = PolicyProposal::from_text(text).map_err(|error| bad(format!("policy proposal: {error}")))?;
        let policy: TrustPolicy = file.proposal.unverified().map_err(|error| bad(error.to_string()))?;
        self.writable()?;
        let (signed, needed) = self.signatures(&file.proposal);
        let reply = |adopted, dropped: usize, pending: usize| AdminReply::Policy {
            version: policy.version,
            adopted,
            signed,
            needed,
            dropped: u32::try_from(dropped).unwrap_or(u32::MAX),
            pending: u32::try_from(pending).unwrap_or(u32::MAX),
        };
        if signed < needed && policy.version > self.view().policy().version {
            return Ok(reply(false, 0, 0));
        }
        if policy.version > self.view().policy().version
            && !policy.keyservers.contains(&self.keys.transport.verify_key())
        {
            return Err(bad(
                "it does not name the key of this keyserver: nodes would not believe it any more".to_owned()
            ));
        }
        let out = self.would_drop(&file.proposal)?;
        if !out.is_empty() && !drop_nodes {
            let names: Vec<String> = out.iter().take(NAMED).map(ToString::to_string).collect();
            let more = if out.len() > NAMED { ", .." } else { "" };
            let message = format!(
                "it does not cover {} nodes any more, which would be out at once ({}{more}): if that is meant, import it \
                 with --drop-nodes; nodes of a stolen key are out until its successor has granted to them anew",
                out.len(),
                names.join(", ")
            );
            return Err(refusal(RefusalCode::Taken, message));
        }
        let changed = self.change_keeping_sessions(&file.proposal, Vec::new(), Vec::new());
        let change = changed.map_err(|error| error.into_refusal(RefusalCode::BadMessage))?;
        info!(version = policy.version, dropped = out.len(), "trust policy adopted");
        self.take_issuer_key();
        self.retire_keys();
        self.follow_issuers(&change);
        let still_out = out.iter().filter(|name| self.view().member_named(name).is_none()).count();
        // The policy is adopted, whether they can be counted or not.
        let pending = self.pending_requests().map_or(0, |requests| requests.len());
        Ok(reply(true, still_out, pending))
    }

    /// Roots of the newest policy that have signed, and how many have to.
    fn signatures(&self, proposal: &Envelope) -> (u32, u32) {
        let policy = self.view().policy();
        let by_root = |id| policy.roots.iter().any(|root| root.id() == id);
        let signed = proposal.signers().filter(|id| by_root(*id)).count();
        (u32::try_from(signed).unwrap_or(u32::MAX), u32::from(policy.threshold))
    }

    /// Names of the members that a policy would leave outside.
    fn would_drop(&self, proposal: &Envelope) -> Result<Vec<Name>, Refusal> {
        let change = self.view().clone().apply(proposal);
        match change.map_err(|error| refusal(RefusalCode::BadMessage, error.to_string()))? {
            Change::Policy { dropped, .. } => {
                let members = dropped.iter().filter_map(|node| self.view().member(*node));
                Ok(members.map(|member| member.grant.object.name.clone()).collect())
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Stops using a root or an issuer key that the newest policy does not name any more.
    pub(crate) fn retire_keys(&mut self) {
        let policy = self.view().policy();
        let roots: Vec<_> = policy.roots.clone();
        let issuers: Vec<_> = policy.issuers.iter().map(|issuer| issuer.key).collect();
        let mut retired = Vec::new();
        for (name, key, named) in [("root", &mut self.keys.root, &roots), ("issuer", &mut self.keys.issuer, &issuers)] {
            if key.as_ref().is_some_and(|key| !named.contains(&key.verify_key())) {
                *key = None;
                retired.push(name);
            }
        }
        for name in retired {
            warn!(key = name, "key is not in the trust policy any more");
            self.alarm(format!("the key in keys/{name} is not in the trust policy any more: remove the file"));
        }
    }

    /// What a thief of this machine could do, as `status` says it.
    pub(super) fn trust(&self) -> &'static str {
        let policy = self.view().policy();
        let held = |key: &Option<SigningKey>| key.as_ref().map(SigningKey::verify_key);
        let root = held(&self.keys.root).is_some_and(|root| policy.threshold == 1 && policy.roots.contains(&root));
        let issuer =
            held(&self.keys.issuer).is_some_and(|issuer| policy.issuers.iter().any(|named| named.key == issuer));
        match (root, issuer) {
            (true, _) => "easy-with-root",
            (false, true) => "easy",
            (false, false) => "strict",
        }
    }
}
