//! The audit log: each change of the directory and its line in one transaction, hash-chained; the oldest lines move to
//! files beside the store.
//!
//! ```text
//! change, commit ── what it means (entries) ──> the same transaction ──> export
//!                                    more than 20,000 in the store: the oldest 10,000 ──> audit/FIRST-LAST.jsonl
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use mesh_protocol::audit::{AuditEntry, AuditHead, cut, line_hash};
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::envelope::{Envelope, Kind};
use mesh_protocol::id::{Hash, NodeId};
use mesh_protocol::offline::{GrantReason, GrantRequest};
use mesh_protocol::record::{NodeGrant, NodeRecord, Revocation, TrustPolicy};
use mesh_protocol::{cbor, token::TokenLimits};
use tracing::{info, warn};

use super::succeed::Successor;
use super::token::StoredToken;
use super::{Directory, layout, refusal, unavailable, unix_now};
use crate::store::{Compare, Operation, Range, Store, StoreError, Txn};

/// Lines kept in the store: about 8 MiB.
const MOST_IN_STORE: u64 = if cfg!(test) { 40 } else { 20_000 };
/// Lines moved to a file at once, and removed in as many transactions as their number allows.
const MOVED: u64 = if cfg!(test) { 20 } else { 10_000 };
/// Lines in one page of an export: below the limit of a line on the admin socket, 1 MiB.
const PAGE: usize = 400;

/// Where the log stands.
#[derive(Debug, Default)]
pub(super) struct AuditLog {
    /// Number of the first line in the store, and of the next one.
    first: u64,
    next: u64,
    last: Option<Hash>,
    /// Who asked for what is being done; nobody: the keyserver itself, or a node.
    actor: Option<String>,
    /// Where old lines go; unset: they stay in the store.
    folder: Option<PathBuf>,
}

/// An entry before it has its place.
#[derive(Debug)]
pub(super) struct Deed {
    actor: String,
    action: &'static str,
    subject: String,
    detail: String,
}

impl AuditLog {
    /// Reads where the log in `store` stands.
    pub(super) fn load(store: &dyn Store) -> Result<Self, StoreError> {
        let first = store.range(&Range::prefix(layout::AUDIT), None, 1)?.pop();
        let Some(first) = first else { return Ok(Self { first: 1, next: 1, ..Self::default() }) };
        let first = number_of(&first.key);
        let is_there = |number| Ok::<bool, StoreError>(!store.range(&from(number), None, 1)?.is_empty());
        // Numbers have no gaps: the last is found by doubling, then halving, not by reading all.
        let mut step = 1;
        while is_there(first + step)? {
            step *= 2;
        }
        let (mut there, mut beyond) = (first + step / 2, first + step);
        while there + 1 < beyond {
            let middle = there + (beyond - there) / 2;
            if is_there(middle)? {
                there = middle;
            } else {
                beyond = middle;
            }
        }
        let last = store.range(&Range::key(&layout::audit(there)), None, 1)?.pop();
        let last = last.map(|entry| line_hash(&String::from_utf8_lossy(&entry.value)));
        Ok(Self { first, next: there + 1, last, ..Self::default() })
    }

    /// As `self`, with what only this process knows kept from `before`.
    pub(super) fn reloaded(self, before: Self) -> Self {
        Self { actor: before.actor, folder: before.folder, ..self }
    }

    /// Gives entries their place: what to write, and the hash after them.
    fn place(&self, deeds: Vec<Deed>) -> (Vec<Compare>, Vec<Operation>, Option<Hash>) {
        let (mut compare, mut operations, mut last) = (Vec::new(), Vec::new(), self.last);
        for (number, deed) in (self.next..).zip(deeds) {
            let Deed { actor, action, subject, detail } = deed;
            let previous = last.unwrap_or(Hash([0; 32]));
            let (actor, subject, detail) = (cut(&actor), cut(&subject), cut(&detail));
            let action = action.to_owned();
            let line = AuditEntry { number, time: unix_now(), actor, action, subject, detail, previous }.to_line();
            last = Some(line_hash(&line));
            compare.push(Compare::ModRevision(layout::audit(number), 0));
            operations.push(Operation::Put(layout::audit(number), line.into_bytes()));
        }
        (compare, operations, last)
    }
}

impl Directory {
    /// Old lines of the audit log go to this folder.
    pub(crate) fn keep_audit_in(&mut self, folder: PathBuf) {
        self.audit.folder = Some(folder);
    }

    /// Who asks for what comes next; `None` once it is done.
    pub(crate) fn set_actor(&mut self, actor: Option<String>) {
        self.audit.actor = actor;
    }

    /// Runs a transaction together with its lines of the log.
    pub(super) fn commit_with(&mut self, txn: &Txn, deeds: Vec<Deed>) -> Result<(), Refusal> {
        let count = deeds.len() as u64;
        let (compare, then, last) = self.audit.place(deeds);
        let mut whole = txn.clone();
        whole.compare.extend(compare);
        whole.then.extend(then);
        self.commit_txn(&whole)?;
        self.audit.next += count;
        self.audit.last = last;
        Ok(())
    }

    pub(super) fn deed(&self, action: &'static str, subject: String, detail: String, actor: Option<String>) -> Deed {
        let actor = self.audit.actor.clone().or(actor).unwrap_or_else(|| "keyserver".to_owned());
        Deed { actor, action, subject, detail }
    }

    /// What an object that is about to be judged will mean, and what is written with it.
    pub(super) fn deeds_of_change(&self, envelope: &Envelope, operations: &[Operation]) -> Vec<Deed> {
        let deed = match envelope.kind() {
            Kind::NodeGrant => envelope.unverified().ok().map(|grant| self.deed_of_grant(&grant, operations)),
            Kind::NodeRecord => envelope.unverified().ok().and_then(|record| self.deed_of_record(&record)),
            Kind::Revocation => envelope.unverified().ok().map(|revocation| self.deed_of_revocation(&revocation)),
            Kind::TrustPolicy => envelope.unverified().ok().map(|policy| self.deed_of_policy(&policy)),
            Kind::Endpoints | Kind::Checkpoint | Kind::TokenLimits => None,
        };
        deed.into_iter().collect()
    }

    fn deed_of_grant(&self, grant: &NodeGrant, operations: &[Operation]) -> Deed {
        let fallen = || self.view().fallen().find(|(node, _)| **node == grant.node).map(|(_, member)| member);
        let held = self.view().member(grant.node).or_else(fallen).map(|member| &member.grant.object);
        let same = held.is_some_and(|held| held.name == grant.name && held.prefixes().eq(grant.prefixes()));
        let before = held.map(|held| held.identity).filter(|before| *before != grant.identity);
        let action = match (grant.lifts.is_some(), same) {
            (true, _) if held.is_none() => "restore",
            (_, true) if before.is_some() => "rotate-identity",
            (_, true) => "renew",
            _ => "join",
        };
        let actor = match before {
            Some(_) => Some(format!("node {}", grant.name)),
            None => operations.iter().find_map(used_token).map(|token| format!("token {token}")),
        };
        let identity =
            before.map(|before| format!("identity key {} after {} ", grant.identity.id().short(), before.id().short()));
        let cidrs: Vec<String> = grant.pod_cidrs.iter().map(ToString::to_string).collect();
        let detail = format!(
            "{}id {} cluster {} generation {} serial {} address {} pods {}",
            identity.unwrap_or_default(),
            grant.node.short(),
            grant.cluster,
            grant.generation,
            grant.serial,
            grant.mesh_v4,
            cidrs.join(",")
        );
        self.deed(action, format!("node {}", grant.name), detail, actor)
    }

    /// A record that promotes a key; the others say nothing that an auditor asks for.
    fn deed_of_record(&self, record: &NodeRecord) -> Option<Deed> {
        let member = self.view().member(record.node)?;
        let before = member.record.as_ref()?.object.current.epoch;
        let name = format!("node {}", member.grant.object.name);
        let detail = format!("key epoch {} after {before}", record.current.epoch);
        let actor = Some(name.clone());
        (record.current.epoch > before).then(|| self.deed("rotate", name, detail, actor))
    }

    fn deed_of_revocation(&self, revocation: &Revocation) -> Deed {
        let name = self.name_of(revocation.node);
        let detail = format!("up to generation {}: {}", revocation.up_to_generation, revocation.reason);
        self.deed("revoke", format!("node {name}"), detail, None)
    }

    fn deed_of_policy(&self, policy: &TrustPolicy) -> Deed {
        let held = self.view().policy();
        let clusters =
            |policy: &TrustPolicy| policy.clusters().map(|scope| scope.cluster.to_string()).collect::<Vec<_>>();
        let (before, after) = (clusters(held), clusters(policy));
        let new: Vec<&String> = after.iter().filter(|cluster| !before.contains(cluster)).collect();
        let gone: Vec<&String> = before.iter().filter(|cluster| !after.contains(cluster)).collect();
        let keys = |what: &str, one: usize, other: usize| (one != other).then(|| format!("{what} {one} to {other}"));
        let changed = [
            (!new.is_empty()).then(|| format!("clusters new {new:?}")),
            (!gone.is_empty()).then(|| format!("clusters gone {gone:?}")),
            keys("roots", held.roots.len(), policy.roots.len()),
            keys("issuers", held.issuers.len(), policy.issuers.len()),
            keys("revokers", held.revokers.len(), policy.revokers.len()),
            keys("keyserver keys", held.keyservers.len(), policy.keyservers.len()),
        ];
        let changed: Vec<String> = changed.into_iter().flatten().chain(issuer_words(held, policy)).collect();
        self.deed("policy", format!("policy {}", policy.version), changed.join("; "), None)
    }

    fn name_of(&self, node: NodeId) -> String {
        let name = self.view().member(node).map(|member| member.grant.object.name.to_string());
        name.unwrap_or_else(|| node.short())
    }

    /// What a transaction without an object means: tokens and evidence.
    pub(super) fn deeds_of(&self, txn: &Txn) -> Vec<Deed> {
        if let Some(deed) = txn.then.iter().find_map(|operation| self.deed_of_waiting(operation, &txn.then)) {
            return vec![deed];
        }
        let deed = |operation: &Operation| {
            let Operation::Put(key, value) = operation else { return None };
            if let Some(node) = key.strip_prefix(layout::SUCCESSORS) {
                let successor: Successor = cbor::from_slice(value).ok()?;
                let name = format!("node {}", self.name_of(NodeId(node.try_into().ok()?)));
                let (to, from) = (successor.identity.id().short(), successor.handover.from.id().short());
                let detail = format!("identity key {to} after {from}");
                return Some(self.deed("rotate-identity-request", name.clone(), detail, Some(name)));
            }
            if key.starts_with(layout::EVIDENCE) {
                let both: Vec<Envelope> = cbor::from_slice(value).unwrap_or_default();
                let detail = format!("{} objects that contradict each other", both.len());
                return Some(self.deed("evidence", format!("{:?}", both.first()?.kind()), detail, None));
            }
            let token: StoredToken = key.starts_with(layout::TOKENS).then(|| cbor::from_slice(value).ok())??;
            let limits: TokenLimits = token.limits.unverified().ok()?;
            let action = if token.revoked { "token-revoke" } else { "token-create" };
            let detail = format!("cluster {} uses {} expires {}", limits.cluster, limits.uses, limits.expires);
            Some(self.deed(action, format!("token {}", limits.id().short()), detail, None))
        };
        txn.then.iter().filter_map(deed).collect()
    }

    /// A node that begins to wait for an issuer elsewhere, or that does no more without having got in.
    fn deed_of_waiting(&self, operation: &Operation, all: &[Operation]) -> Option<Deed> {
        let (what, request) = match operation {
            Operation::Put(key, value) if key.starts_with(layout::RESERVATIONS) => {
                ("pending", cbor::from_slice::<GrantRequest>(value).ok()?)
            }
            Operation::Delete(key) => {
                let node = key.strip_prefix(layout::RESERVATIONS)?.try_into().ok()?;
                let request = self.reservations.get(NodeId(node))?.clone();
                (if request.until > unix_now() { "reject" } else { "expire" }, request)
            }
            Operation::Put(..) => return None,
        };
        let comes_back = matches!(request.reason, GrantReason::Restoration { .. });
        let action = match (comes_back, what) {
            (true, "pending") => "restore-pending",
            (true, "reject") => "restore-reject",
            (true, _) => "restore-expire",
            (false, "pending") => "join-pending",
            (false, "reject") => "join-reject",
            (false, _) => "join-expire",
        };
        let grant = &request.grant;
        let detail = format!("id {} cluster {} serial {}", grant.node.short(), grant.cluster, grant.serial);
        let token = all.iter().find_map(used_token).map(|token| format!("token {token}"));
        Some(self.deed(action, format!("node {}", grant.name), detail, token))
    }

    /// Where the log ends, signed.
    pub(crate) fn audit_head(&self) -> AuditHead {
        let hash = self.audit.last.unwrap_or(Hash([0; 32]));
        AuditHead::sign(self.mesh(), self.audit.next - 1, hash, unix_now(), &self.keys.transport)
    }

    /// Lines from entry `from` on, up to entry `until`, as many as fit a page.
    pub(crate) fn audit_page(&self, from_entry: u64, until: u64) -> Result<Vec<String>, Refusal> {
        let left = usize::try_from((until + 1).saturating_sub(from_entry)).unwrap_or(usize::MAX);
        if from_entry < self.audit.first {
            let lines = self.audit.folder.as_deref().map_or(Ok(Vec::new()), |folder| read_file(folder, from_entry));
            let mut lines = lines.map_err(|error| {
                refusal(RefusalCode::Unavailable, format!("entry {from_entry} is in no file of the audit log: {error}"))
            })?;
            lines.truncate(left);
            return Ok(lines);
        }
        let found = self.store.range(&from(from_entry), None, PAGE.min(left)).map_err(|error| unavailable(&error))?;
        Ok(found.into_iter().map(|entry| String::from_utf8_lossy(&entry.value).into_owned()).collect())
    }

    /// Moves the oldest lines to a file once there are many: on disk there before they leave the store.
    pub(super) fn rotate_audit(&mut self) {
        let (first, next) = (self.audit.first, self.audit.next);
        let Some(folder) = self.audit.folder.clone().filter(|_| next - first > MOST_IN_STORE && !self.broken) else {
            return;
        };
        let last = first + MOVED - 1;
        let moved = self.lines_in_store(first, last).and_then(|lines| {
            write_file(&folder, first, last, &lines).map_err(|error| format!("{}: {error}", folder.display()))
        });
        if let Err(error) = moved {
            warn!(%error, "audit log not moved to a file");
            self.alarm(format!("old lines of the audit log cannot be moved to a file: {error}"));
            return;
        }
        for start in (first..=last).step_by(1_000) {
            let then = (start..=last.min(start + 999)).map(|number| Operation::Delete(layout::audit(number))).collect();
            if self.commit_txn(&Txn { then, ..Txn::default() }).is_err() {
                // Read back with what is left; the file is written anew next time.
                return;
            }
            self.audit.first = last.min(start + 999) + 1;
        }
        info!(first, last, "audit log moved to a file");
    }

    fn lines_in_store(&self, first: u64, last: u64) -> Result<Vec<String>, String> {
        let mut lines = Vec::new();
        while let Some(at) = Some(first + lines.len() as u64).filter(|at| *at <= last) {
            let page = self.audit_page(at, last).map_err(|refusal| refusal.message)?;
            if page.is_empty() {
                return Err(format!("entry {at} is missing in the store"));
            }
            lines.extend(page);
        }
        Ok(lines)
    }
}

fn from(number: u64) -> Range {
    Range { start: layout::audit(number), end: Range::prefix(layout::AUDIT).end }
}

fn number_of(key: &[u8]) -> u64 {
    let number = key.strip_prefix(layout::AUDIT).and_then(|number| number.try_into().ok());
    number.map_or(0, u64::from_be_bytes)
}

/// The start of the id of a token whose use is counted.
fn used_token(operation: &Operation) -> Option<String> {
    let Operation::Put(key, _) = operation else { return None };
    let id = key.strip_prefix(layout::USES)?.first_chunk::<4>()?;
    Some(hex::encode(id))
}

fn file_name(first: u64, last: u64) -> String {
    format!("{first:012}-{last:012}.jsonl")
}

fn write_file(folder: &Path, first: u64, last: u64, lines: &[String]) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let (path, unfinished) = (folder.join(file_name(first, last)), folder.join("unfinished"));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    for line in lines {
        file.write_all(line.as_bytes())?;
        file.write_all(b"\n")?;
    }
    file.sync_all()?;
    fs::rename(&unfinished, &path)?;
    File::open(folder)?.sync_all()
}

/// A page of the file that holds entry `from_entry`.
fn read_file(folder: &Path, from_entry: u64) -> io::Result<Vec<String>> {
    for found in fs::read_dir(folder)? {
        let path = found?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let Some((first, last)) = stem.split_once('-') else { continue };
        let (Ok(first), Ok(last)) = (first.parse::<u64>(), last.parse::<u64>()) else { continue };
        if (first..=last).contains(&from_entry) {
            let skip = usize::try_from(from_entry - first).unwrap_or(usize::MAX);
            return io::BufReader::new(File::open(&path)?).lines().skip(skip).take(PAGE).collect();
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "was a file removed?"))
}

/// Keys of issuers that others took the place of, and those that are no more.
fn issuer_words(held: &TrustPolicy, policy: &TrustPolicy) -> Vec<String> {
    let before: Vec<_> = held.issuers.iter().flat_map(|issuer| &issuer.former).collect();
    let after: Vec<_> = policy.issuers.iter().flat_map(|issuer| &issuer.former).collect();
    let new = policy.issuers.iter().flat_map(|issuer| issuer.former.iter().map(move |former| (issuer, former)));
    let new = new.filter(|(_, former)| !before.contains(former)).map(|(issuer, former)| {
        let stolen = if former.stands() { "" } else { " as stolen" };
        format!("issuer {} replaced by {}{stolen}", former.key.id().short(), issuer.key.id().short())
    });
    let gone = before.iter().filter(|former| !after.iter().any(|named| named.key == former.key));
    new.chain(gone.map(|former| format!("former issuer {} forgotten", former.key.id().short()))).collect()
}

#[cfg(test)]
mod tests;
