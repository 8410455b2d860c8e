//! Join tokens: made, listed, voided, forgotten.

use mesh_protocol::admin::TokenStatus;
use mesh_protocol::cbor;
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Name, TokenId};
use mesh_protocol::key::SigningKey;
use mesh_protocol::record::TrustPolicy;
use mesh_protocol::token::{JoinToken, TokenLimits};
use minicbor::{Decode, Encode};
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::{Directory, layout, refusal, unix_now};
use crate::keys;
use crate::store::{Compare, Entry, Operation, Range, Txn};

/// Tokens that may be open or remembered at once; about 400 bytes each.
const MAX_TOKENS: usize = 10_000;
/// Longest life of a token, in seconds: 30 days.
const LONGEST_LIFE: u64 = 30 * 86_400;
/// Most characters of a join token: 8 KiB are read, the rest is for numbers that grow meanwhile.
const LONGEST_LINE: usize = 8 * 1024 - 64;
/// Expired tokens are remembered for so long, in seconds, so that `token list` can tell what became of them, and longer
/// than any node may wait that used one.
const REMEMBERED: u64 = super::reserve::RESERVED_FOR + 86_400;

/// A token as it lies in the store.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(super) struct StoredToken {
    /// Signed by the issuer.
    #[n(0)]
    pub(super) limits: Envelope,
    /// Nodes that enrolled with it.
    #[n(1)]
    pub(super) used: u32,
    /// An operator voided it.
    #[n(2)]
    pub(super) revoked: bool,
    /// Seconds since 1970.
    #[n(3)]
    pub(super) created: u64,
}

/// What an operator asks for.
#[derive(Debug)]
pub(crate) struct TokenRequest {
    pub(crate) cluster: Name,
    pub(crate) uses: u32,
    pub(crate) ttl: u64,
    pub(crate) cidrs: Vec<ipnet::IpNet>,
    pub(crate) tags: Vec<Name>,
}

struct Found {
    id: TokenId,
    token: StoredToken,
    limits: TokenLimits,
    revision: u64,
}

/// A token that counts here, whoever made it.
pub(super) struct KnownToken {
    /// As it lies in the store, or would.
    pub(super) token: StoredToken,
    /// What it allows, verified.
    pub(super) limits: TokenLimits,
    /// Revision of the store that wrote it; 0: nobody has used it yet.
    pub(super) revision: u64,
}

pub(super) fn token_refused(reason: &str) -> Refusal {
    refusal(RefusalCode::Token, format!("join token refused: {reason}; make a new one with 'meshctl token create'"))
}

impl Directory {
    /// The token of that id: one of the store, or one that an issuer elsewhere made and whose `limits` a node shows.
    pub(super) fn find_token(&self, id: TokenId, limits: Option<&Envelope>) -> Result<Option<KnownToken>, Refusal> {
        let known = match self.get(&layout::token(id))? {
            Some(entry) => {
                let token: StoredToken = cbor::from_slice(&entry.value)
                    .map_err(|error| refusal(RefusalCode::Unavailable, error.to_string()))?;
                let limits = self
                    .view()
                    .token_limits(&token.limits)
                    .map_err(|error| token_refused(&format!("no issuer of today stands for it ({error})")))?;
                KnownToken { token, limits, revision: entry.mod_revision }
            }
            None => match limits.map(|limits| (limits, self.view().token_limits(limits))) {
                Some((envelope, Ok(limits))) if limits.id() == id && !self.signs_for(&limits.cluster) => {
                    let created = limits.issued.unwrap_or(0);
                    let revoked = self.get(&layout::voided(id))?.is_some();
                    let token = StoredToken { limits: envelope.clone(), used: 0, revoked, created };
                    KnownToken { token, limits, revision: 0 }
                }
                _ => return Ok(None),
            },
        };
        if self.tokens_since()?.is_some_and(|since| known.token.created <= since) {
            return Err(token_refused("it was made before this keyserver's store was restored from a copy"));
        }
        let longest = known.token.created.saturating_add(LONGEST_LIFE);
        if known.limits.expires > longest {
            return Err(token_refused("it lives longer than a token may"));
        }
        Ok(Some(known))
    }

    /// When the store was restored from a copy last, if ever: tokens up to then are void.
    fn tokens_since(&self) -> Result<Option<u64>, Refusal> {
        let since = super::history::number(self.store.as_ref(), layout::TOKENS_SINCE);
        since.map_err(|error| super::unavailable(&error))
    }

    /// Makes a token; gives the line to paste, and what it allows.
    pub(crate) fn create_token(&mut self, request: TokenRequest) -> Result<(Zeroizing<String>, TokenStatus), Refusal> {
        self.writable()?;
        self.check_token_request(&request)?;
        if self.tokens()?.len() >= MAX_TOKENS {
            return Err(refusal(RefusalCode::Exhausted, format!("there are {MAX_TOKENS} tokens already")));
        }
        let secret = keys::generate().map_err(|error| refusal(RefusalCode::Unavailable, error.to_string()))?;
        // Times are whole seconds: one made right after a restore is not one from before.
        let created = unix_now().max(self.tokens_since()?.map_or(0, |since| since + 1));
        let limits = TokenLimits {
            key: secret.verify_key(),
            uses: request.uses,
            expires: created + request.ttl,
            cluster: request.cluster.clone(),
            cidrs: request.cidrs.clone(),
            tags: request.tags.clone(),
            issued: Some(created),
        };
        let envelope = Envelope::seal(self.mesh(), &limits, &[self.issuer_for(&request.cluster)?]);
        // Before anything changes: what follows makes it longer by a few bytes at most.
        let length = self.line(&envelope, &secret).len();
        if length > LONGEST_LINE {
            let message = format!(
                "the token would have {length} characters, {LONGEST_LINE} at most: give fewer or shorter tags, CIDRs, \
                 or 'addresses' in keyserver.toml"
            );
            return Err(refusal(RefusalCode::BadMessage, message));
        }
        self.allow_tags(&request)?;
        let token = StoredToken { limits: envelope.clone(), used: 0, revoked: false, created };
        let key = layout::token(limits.id());
        let compare = vec![Compare::ModRevision(key.clone(), 0)];
        let then = vec![Operation::Put(key, cbor::to_vec(&token))];
        self.commit(&Txn { compare, then, otherwise: Vec::new() })?;
        let line = self.line(&envelope, &secret);
        info!(token = %limits.id().short(), cluster = %limits.cluster, uses = limits.uses, "token made");
        Ok((line, status(&limits, &token)))
    }

    fn line(&mut self, limits: &Envelope, secret: &SigningKey) -> Zeroizing<String> {
        let token = JoinToken {
            mesh: self.mesh(),
            policy_version: self.view().policy().version,
            policy: self.view().policy_hash(),
            keyservers: self.settings.addresses.clone(),
            checkpoint: self.checkpoint(),
            limits: limits.clone(),
            secret: secret.clone(),
        };
        token.to_line()
    }

    fn check_token_request(&self, request: &TokenRequest) -> Result<(), Refusal> {
        let bad = |message: String| Err(refusal(RefusalCode::BadMessage, message));
        if self.settings.addresses.is_empty() {
            return bad("no address would be in the token: set 'addresses' in keyserver.toml and restart".to_owned());
        }
        if request.uses == 0 {
            return bad("a token is for one node at least".to_owned());
        }
        if request.ttl == 0 || request.ttl > LONGEST_LIFE {
            return bad(format!("a token lives for 1 to {LONGEST_LIFE} seconds"));
        }
        if request.cidrs.len() > 64 || request.tags.len() > 64 {
            return bad("at most 64 CIDRs and 64 tags".to_owned());
        }
        let Some((_, scope)) = self.view().policy().cluster(&request.cluster) else {
            return Err(self.no_such_cluster(&request.cluster));
        };
        match request.cidrs.iter().find(|cidr| !scope.pools.iter().any(|pool| pool.contains(*cidr))) {
            Some(cidr) => bad(format!("{cidr} is not inside the pools of cluster {}", scope.cluster)),
            None => Ok(()),
        }
    }

    /// Tags that no token had yet become the issuer's to give.
    fn allow_tags(&mut self, request: &TokenRequest) -> Result<(), Refusal> {
        let cluster = &request.cluster;
        let gives = |policy: &TrustPolicy, tag: &Name| {
            policy.cluster(cluster).is_some_and(|(issuer, _)| issuer.tags.contains(tag))
        };
        let policy = self.view().policy();
        let new: Vec<Name> = request.tags.iter().filter(|tag| !gives(policy, tag)).cloned().collect();
        if new.is_empty() {
            return Ok(());
        }
        self.amend_policy(|policy| {
            let has = |issuer: &&mut mesh_protocol::record::Issuer| {
                issuer.clusters.iter().any(|scope| scope.cluster == *cluster)
            };
            if let Some(issuer) = policy.issuers.iter_mut().find(has) {
                issuer.tags.extend(new);
                issuer.tags.sort();
                issuer.tags.dedup();
            }
        })
    }

    /// Tokens that are not forgotten, newest first.
    pub(crate) fn list_tokens(&self) -> Result<Vec<TokenStatus>, Refusal> {
        let mut found = self.tokens()?;
        found.sort_by_key(|found| std::cmp::Reverse(found.token.created));
        Ok(found.iter().map(|found| status(&found.limits, &found.token)).collect())
    }

    /// Voids the token whose id starts with `start`.
    pub(crate) fn revoke_token(&mut self, start: &str) -> Result<TokenStatus, Refusal> {
        self.writable()?;
        let start = start.to_ascii_lowercase();
        if start.len() < 8 || !start.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(refusal(RefusalCode::BadMessage, "name a token by at least eight hexadecimal digits"));
        }
        let mut matching = self.tokens()?.into_iter().filter(|found| found.id.to_string().starts_with(&start));
        let (Some(found), None) = (matching.next(), matching.next()) else {
            if let Ok(id) = start.parse::<TokenId>() {
                return self.void_unseen(id);
            }
            return Err(refusal(RefusalCode::Token, format!("no token, or more than one, starts with {start}")));
        };
        self.void(found)
    }

    /// Voids a token that an issuer elsewhere made and nobody has used: only its whole id names it.
    fn void_unseen(&mut self, id: TokenId) -> Result<TokenStatus, Refusal> {
        let now = unix_now();
        let then = vec![Operation::Put(layout::voided(id), now.to_be_bytes().to_vec())];
        self.commit(&Txn { then, ..Txn::default() })?;
        info!(token = %id.short(), "token voided before anybody used it");
        let (cidrs, tags) = (Vec::new(), Vec::new());
        let cluster = self.view().policy().name.clone();
        Ok(TokenStatus { id, cluster, uses: 0, used: 0, expires: now, revoked: true, cidrs, tags })
    }

    /// Voids every open token of a cluster.
    pub(super) fn void_tokens_of(&mut self, cluster: &Name) -> Result<(), Refusal> {
        let open = self.tokens()?.into_iter().filter(|found| !found.token.revoked && found.limits.cluster == *cluster);
        open.collect::<Vec<_>>().into_iter().try_for_each(|found| self.void(found).map(|_| ()))
    }

    /// Voids the tokens that a former key of an issuer signed and that could still be used; gives how many. The trust rules
    /// refuse them in any case: this is for who lists them.
    pub(super) fn void_tokens_of_former_keys(&mut self) -> Result<u32, Refusal> {
        let now = unix_now();
        let is_former = |found: &Found| {
            let issuer = self.view().policy().cluster(&found.limits.cluster).map(|(issuer, _)| issuer);
            issuer.is_some_and(|issuer| found.token.limits.signers().any(|id| issuer.former_key(id).is_some()))
        };
        let usable =
            |found: &Found| !found.token.revoked && found.limits.expires > now && found.token.used < found.limits.uses;
        let open: Vec<Found> = self.tokens()?.into_iter().filter(|found| usable(found) && is_former(found)).collect();
        let count = u32::try_from(open.len()).unwrap_or(u32::MAX);
        open.into_iter().try_for_each(|found| self.void(found).map(|_| ()))?;
        Ok(count)
    }

    fn void(&mut self, found: Found) -> Result<TokenStatus, Refusal> {
        let token = StoredToken { revoked: true, ..found.token };
        let key = layout::token(found.id);
        let compare = vec![Compare::ModRevision(key.clone(), found.revision)];
        self.commit(&Txn { compare, then: vec![Operation::Put(key, cbor::to_vec(&token))], otherwise: Vec::new() })?;
        info!(token = %found.id.short(), "token voided");
        Ok(status(&found.limits, &token))
    }

    /// Removes tokens that expired long ago.
    pub(super) fn forget_tokens(&mut self) {
        if self.writable().is_err() {
            return;
        }
        let Ok(tokens) = self.tokens() else { return };
        let now = unix_now();
        self.forget_voided(now);
        for old in tokens.into_iter().filter(|found| found.limits.expires.saturating_add(REMEMBERED) < now) {
            let uses = self.store.range(&Range::prefix(&layout::uses(old.id)), None, usize::MAX).unwrap_or_default();
            let mut then: Vec<Operation> = uses.into_iter().map(|entry| Operation::Delete(entry.key)).collect();
            then.push(Operation::Delete(layout::token(old.id)));
            if let Err(error) = self.commit(&Txn { then, ..Txn::default() }) {
                warn!(%error, "expired token not forgotten");
                return;
            }
        }
    }

    /// Removes marks of tokens that nobody has used and that cannot live any more.
    fn forget_voided(&mut self, now: u64) {
        let Ok(marks) = self.store.range(&Range::prefix(layout::VOIDED), None, usize::MAX) else { return };
        let at = |entry: &Entry| entry.value.as_slice().try_into().map_or(0, u64::from_be_bytes);
        let old = marks.into_iter().filter(|entry| at(entry).saturating_add(LONGEST_LIFE) < now);
        let then: Vec<Operation> = old.map(|entry| Operation::Delete(entry.key)).collect();
        if then.is_empty() {
            return;
        }
        if let Err(error) = self.commit(&Txn { then, ..Txn::default() }) {
            warn!(%error, "mark of a voided token not forgotten");
        }
    }

    fn tokens(&self) -> Result<Vec<Found>, Refusal> {
        let entries = self.store.range(&Range::prefix(layout::TOKENS), None, usize::MAX);
        let entries = entries.map_err(|error| super::unavailable(&error))?;
        Ok(entries.iter().filter_map(found).collect())
    }
}

/// `None` for what no version of this program wrote.
fn found(entry: &Entry) -> Option<Found> {
    let token: StoredToken = cbor::from_slice(&entry.value).ok()?;
    let limits: TokenLimits = token.limits.unverified().ok()?;
    Some(Found { id: limits.id(), token, limits, revision: entry.mod_revision })
}

fn status(limits: &TokenLimits, token: &StoredToken) -> TokenStatus {
    TokenStatus {
        id: limits.id(),
        cluster: limits.cluster.clone(),
        uses: limits.uses,
        used: token.used,
        expires: limits.expires,
        revoked: token.revoked,
        cidrs: limits.cidrs.clone(),
        tags: limits.tags.clone(),
    }
}
