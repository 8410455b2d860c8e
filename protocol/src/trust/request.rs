//! Grants that an issuer is asked for: what has to hold before it signs. The keyserver asks the same when the issuer's key
//! lies beside it.

use super::{TrustError, View};
use crate::UnixSeconds;
use crate::envelope::{Envelope, EnvelopeError};
use crate::id::{Name, NodeId};
use crate::key::VerifyKey;
use crate::offline::{GrantReason, GrantRequest};
use crate::record::{Issuer, NodeGrant, PostQuantum};
use crate::token::{JoinClaim, TokenLimits};

/// A request must not be signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// No issuer of the newest policy has this cluster.
    #[error("cluster {0} is not in the trust policy")]
    NoCluster(Name),
    /// The token was not signed by the issuer that has the cluster.
    #[error("the token of {name} is not one of the issuer of cluster {cluster}: {source}")]
    Token {
        /// Name in the grant.
        name: Name,
        /// Its cluster.
        cluster: Name,
        /// Why.
        source: EnvelopeError,
    },
    /// The holder of the token did not ask for this.
    #[error("the request of {0} is not signed with its token")]
    Unsigned(Name),
    /// The grant is not what was asked for, or not what the token allows.
    #[error("the grant of {name} is not what was asked for: {reason}")]
    Differs {
        /// Name in the grant.
        name: Name,
        /// What differs.
        reason: String,
    },
    /// Too late.
    #[error("the request of {0} is too old: its reservation, its token or the grant itself is over")]
    Over(Name),
    /// It would push a member out.
    #[error("the grant of {name} collides with node {}", .holder.short())]
    Collides {
        /// Name in the grant.
        name: Name,
        /// Who would be out.
        holder: NodeId,
    },
    /// The trust rules refuse the grant itself.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

impl View {
    /// Judges a request at `now`, and gives the issuer that has to sign.
    ///
    /// A view that holds the policies only, as on a machine without a network, cannot see collisions with members: there
    /// [`Memory`](crate::offline::Memory) keeps the serials in order, so that the new grant loses them all.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn check_request(&self, request: &GrantRequest, now: UnixSeconds) -> Result<&Issuer, RequestError> {
        let grant = &request.grant;
        let (issuer, _) =
            self.policy().cluster(&grant.cluster).ok_or_else(|| RequestError::NoCluster(grant.cluster.clone()))?;
        match &request.reason {
            GrantReason::Join { claim, exporter, signature, limits } => {
                let limits = self.check_limits(limits, grant, issuer)?;
                claim
                    .verify(&limits.key, exporter, signature)
                    .map_err(|_| RequestError::Unsigned(grant.name.clone()))?;
                self.check_claim(claim, &limits, grant)?;
                if grant.issued >= limits.expires {
                    return Err(RequestError::Over(grant.name.clone()));
                }
            }
            GrantReason::Renewal { held } => self.check_renewal(held, grant, issuer)?,
            GrantReason::Succession { held } => self.check_succession(held, grant, issuer)?,
            GrantReason::Restoration { held } => self.check_restoration(held, grant)?,
        }
        if now >= request.until || now >= grant.expires {
            return Err(RequestError::Over(grant.name.clone()));
        }
        self.check_unsigned(grant, issuer)?;
        Ok(issuer)
    }

    /// What [`Self::apply`] would ask of the grant once it is signed by `issuer`.
    fn check_unsigned(&self, grant: &NodeGrant, issuer: &Issuer) -> Result<(), RequestError> {
        let out = |reason: String| TrustError::OutOfScope { name: grant.name.clone(), reason };
        super::issuer::check_present(grant, issuer).map_err(out)?;
        self.check_scope(grant, issuer).map_err(out)?;
        match self.judge(grant, Envelope::unsigned(grant).hash(self.mesh))?.first() {
            Some(holder) => Err(RequestError::Collides { name: grant.name.clone(), holder: *holder }),
            None => Ok(()),
        }
    }

    fn check_limits(&self, limits: &Envelope, grant: &NodeGrant, issuer: &Issuer) -> Result<TokenLimits, RequestError> {
        limits.verified(self.mesh, &[issuer.key], 1).map_err(|source| {
            let (name, cluster) = (grant.name.clone(), grant.cluster.clone());
            RequestError::Token { name, cluster, source }
        })
    }

    fn check_claim(&self, claim: &JoinClaim, limits: &TokenLimits, grant: &NodeGrant) -> Result<(), RequestError> {
        let differs = |reason: &str| Err(RequestError::Differs { name: grant.name.clone(), reason: reason.to_owned() });
        if claim.mesh != self.mesh || claim.token != limits.id() {
            return differs("it was made for another mesh or token");
        }
        if grant.identity != claim.identity || grant.node != claim.node() || grant.name != claim.name {
            return differs("it is for another node");
        }
        if grant.cluster != limits.cluster || grant.tags != limits.tags {
            return differs("cluster and tags are not the token's");
        }
        if !claim.pod_cidrs.is_empty() && grant.pod_cidrs != claim.pod_cidrs {
            return differs("its pod CIDRs are others");
        }
        let inside = |cidr: &ipnet::IpNet| limits.cidrs.is_empty() || limits.cidrs.iter().any(|one| one.contains(cidr));
        if let Some(cidr) = grant.pod_cidrs.iter().find(|cidr| !inside(cidr)) {
            return differs(&format!("{cidr} is not inside what the token allows"));
        }
        let plain = grant.route_group.is_none() && grant.lifts.is_none() && !grant.external;
        let plain = plain && grant.succession.is_empty();
        if !plain {
            return differs("it gives more than a token can");
        }
        // Post-quantum or not is no matter: the policy has the last word, and may be newer than the request.
        Ok(())
    }

    /// Whether a request is to grant anew what a stolen key of the issuer granted: a person has to know the node, because
    /// the thief may have made it up.
    #[must_use]
    pub fn is_regrant(&self, request: &GrantRequest) -> bool {
        let GrantReason::Renewal { held } = &request.reason else { return false };
        let issuer = self.policy().cluster(&request.grant.cluster).map(|(issuer, _)| issuer);
        issuer.is_some_and(|issuer| self.fallen_grant(held, issuer).is_some())
    }

    /// A renewal gives time and nothing else.
    fn check_renewal(&self, held: &Envelope, grant: &NodeGrant, issuer: &Issuer) -> Result<(), RequestError> {
        // What fell with a stolen key has no generation that counts.
        if let Some(held) = self.fallen_grant(held, issuer) {
            return self.check_renewed(NodeGrant { generation: 0, ..held }, grant, issuer);
        }
        self.check_renewed(self.check_grant_signature(held)?, grant, issuer)
    }

    /// A new identity key changes nothing else than a renewal does.
    fn check_succession(&self, held: &Envelope, grant: &NodeGrant, issuer: &Issuer) -> Result<(), RequestError> {
        let held = self.check_grant_signature(held)?;
        let follows = grant
            .succession
            .split_last()
            .is_some_and(|(handover, before)| before == held.succession.as_slice() && handover.from == held.identity);
        if !follows {
            let reason = "it does not go on from the identity key that the node has".to_owned();
            return Err(RequestError::Differs { name: grant.name.clone(), reason });
        }
        let (identity, succession) = (held.identity, held.succession.clone());
        self.check_renewed(held, &NodeGrant { identity, succession, ..grant.clone() }, issuer)
    }

    /// What a revoked node had, at a new place in the order of serials. What a stolen key granted does not come back.
    fn check_restoration(&self, held: &Envelope, grant: &NodeGrant) -> Result<(), RequestError> {
        let held = self.check_grant_signature(held)?;
        let differs = |reason: &str| Err(RequestError::Differs { name: grant.name.clone(), reason: reason.to_owned() });
        if grant.lifts.is_none() {
            return differs("it lifts no revocation");
        }
        let pq_allowed = grant.pq == held.pq || grant.pq == PostQuantum::Required;
        let is_later = grant.generation > held.generation && grant.serial > held.serial;
        let NodeGrant { generation, serial, issued, expires, lifts, pq, .. } = *grant;
        if *grant != (NodeGrant { generation, serial, issued, expires, lifts, pq, ..held }) || !pq_allowed || !is_later
        {
            return differs("a node comes back as what it was");
        }
        Ok(())
    }

    fn check_renewed(&self, held: NodeGrant, grant: &NodeGrant, issuer: &Issuer) -> Result<(), RequestError> {
        let pq_allowed = grant.pq == held.pq || grant.pq == PostQuantum::Required;
        let expected = NodeGrant {
            generation: held.generation.max(issuer.floor()).saturating_add(1),
            issued: grant.issued,
            expires: grant.expires,
            pq: grant.pq,
            ..held
        };
        if *grant == expected && pq_allowed {
            return Ok(());
        }
        let reason = "a renewal changes nothing but its time".to_owned();
        Err(RequestError::Differs { name: grant.name.clone(), reason })
    }

    /// The limits of a join token, by an issuer of the newest policy that has their cluster.
    ///
    /// # Errors
    /// [`EnvelopeError`].
    pub fn token_limits(&self, limits: &Envelope) -> Result<TokenLimits, EnvelopeError> {
        let said: TokenLimits = limits.unverified()?;
        let issuer: Vec<VerifyKey> =
            self.policy().cluster(&said.cluster).map(|(issuer, _)| issuer.key).into_iter().collect();
        limits.verified(self.mesh, &issuer, 1)
    }
}
