//! An issuer's key takes the place of another: its nodes are granted anew, and none of them joins again.
//!
//! ```text
//! keys/issuer.next made ── policy: the issuer has it, the key before is a former one ── issuer replaced ──
//! issuer.next removed ── every node granted anew ── each speaks under its new grant ── policy without the former key
//! ```
//!
//! Each step may be the last one before an end of the process: policy, key file and grants say where to go on. Where the
//! key is elsewhere the policy comes by import, and the grants by [`Directory::import_grants`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mesh_protocol::admin::{FormerIssuer, IssuerProgress};
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::id::{Name, NodeId};
use mesh_protocol::key::{SigningKey, VerifyKey};
use mesh_protocol::record::{FormerKey, Issuer, NodeGrant};
use mesh_protocol::trust::{Change, Member};
use tracing::{info, warn};

use super::{Directory, refusal, unix_now};
use crate::keys;

/// The key that comes next.
const NEXT: &str = "issuer.next";
/// The key in use.
const CURRENT: &str = "issuer";
/// Nodes granted anew in one go: each is a transaction, and nobody else is served meanwhile.
const AT_ONCE: usize = 64;
/// What could not be granted anew is tried again after so long.
const AGAIN_AFTER: Duration = Duration::from_secs(60);
/// Names in a message.
const NAMED: usize = 8;

impl Directory {
    /// The keyserver's key files are in this folder.
    pub(crate) fn keep_keys_in(&mut self, folder: PathBuf) {
        self.keys_dir = Some(folder);
    }

    /// Gives the issuer whose key lies here another one, and grants its nodes anew; does nothing if that is under way. Gives
    /// how many join tokens are void by it.
    pub(crate) fn rotate_issuer(&mut self, stolen: bool) -> Result<u32, Refusal> {
        self.writable()?;
        let issuer = self.own_issuer()?.clone();
        let under_way = match stolen {
            true => issuer.former.iter().any(|former| !former.stands()),
            false => !issuer.former.is_empty(),
        };
        if under_way {
            self.anew_due = Some(Instant::now());
            return Ok(0);
        }
        let folder = self.keys_folder()?;
        let next = next_key(&folder)?.verify_key();
        let held = issuer.key;
        // A generation of 0 would say that it was stolen.
        let (generation, serial) =
            if stolen { (0, 0) } else { (self.view().highest_generation().max(1), self.history.serial) };
        let amended = self.amend_policy_keeping_sessions(|policy| {
            let Some(issuer) = policy.issuers.iter_mut().find(|issuer| issuer.key == held) else { return };
            if stolen {
                issuer.former.iter_mut().for_each(|former| (former.generation, former.serial) = (0, 0));
            }
            issuer.former.push(FormerKey { key: held, generation, serial });
            issuer.key = next;
        });
        let change = amended.map_err(|error| match self.sole_root() {
            Some(_) => error,
            None => signed_elsewhere(error, held, next, stolen),
        })?;
        info!(key = %next.id().short(), before = %held.id().short(), stolen, "issuer has another key");
        self.take_issuer_key();
        self.follow_issuers(&change);
        self.flush();
        self.void_tokens_of_former_keys()
    }

    /// Takes the former keys of the issuer whose key lies here out of the policy. Its nodes have to be granted anew, and
    /// those that are connected to speak under that.
    pub(crate) fn finish_issuer(&mut self, leave_absent: bool) -> Result<(), Refusal> {
        self.writable()?;
        let issuer = self.own_issuer()?.clone();
        if issuer.former.is_empty() {
            return Ok(());
        }
        let progress = self.progress_of(&issuer);
        let refuse = |what: &str, names: &[Name]| {
            let listed: Vec<String> = names.iter().take(NAMED).map(ToString::to_string).collect();
            let more = if names.len() > NAMED { ", .." } else { "" };
            Err(refusal(RefusalCode::Taken, format!("{} {what} ({}{more})", names.len(), listed.join(", "))))
        };
        if !progress.ungranted.is_empty() {
            return refuse("nodes are not granted anew yet", &progress.ungranted);
        }
        if !progress.waiting.is_empty() {
            return refuse("connected nodes do not speak under their new grants yet: try again", &progress.waiting);
        }
        if !progress.absent.is_empty() && !leave_absent {
            let what = "nodes are not connected and hold a grant of the former key: wait for them, or finish with \
                        --leave-absent; they need not join again";
            return refuse(what, &progress.absent);
        }
        let held = issuer.key;
        let forget: Vec<String> =
            issuer.former.iter().map(|former| format!("--forget-issuer {}", former.key.id().short())).collect();
        self.amend_policy(|policy| {
            policy.issuers.iter_mut().filter(|issuer| issuer.key == held).for_each(|issuer| issuer.former.clear());
        })
        .map_err(|error| match self.sole_root() {
            Some(_) => error,
            None => Refusal {
                message: format!("{}: meshctl policy propose {} --out next.txt", error.message, forget.join(" ")),
                ..error
            },
        })?;
        self.flush();
        info!(key = %held.id().short(), "former keys of the issuer are out of the policy");
        Ok(())
    }

    /// Takes `issuer.next` into use once the policy names it. Called at start and after each policy.
    pub(crate) fn take_issuer_key(&mut self) {
        let Some(folder) = self.keys_dir.clone() else { return };
        let next = match keys::load_optional(&folder, NEXT) {
            Ok(Some(next)) => next,
            Ok(None) => return,
            // The key in use is as good as before.
            Err(error) => return warn!(%error, "next issuer key not taken into use"),
        };
        if !self.view().policy().issuers.iter().any(|issuer| issuer.key == next.verify_key()) {
            return;
        }
        // What is in memory signs, whatever the disk says: it is tried again at the next start.
        self.keys.issuer = Some(next.clone());
        self.forget_alarm("keys/issuer");
        let replaced = keys::replace(&folder, CURRENT, &next).map_err(|error| error.to_string());
        let replaced = replaced.and_then(|()| remove(&folder, NEXT).map_err(|error| error.to_string()));
        if let Err(error) = replaced {
            warn!(%error, "the issuer's key is in use and not in its place");
            self.alarm(format!("keys/issuer.next is in use and cannot be put in the place of keys/issuer: {error}"));
        }
    }

    /// After a policy: nodes of a stolen key are granted anew before anybody hears of it, if the key is here; who waits with
    /// a token of a former key waits no more; who is out then is told.
    pub(super) fn follow_issuers(&mut self, change: &Change) {
        let Change::Policy { version, dropped } = change else { return };
        let fallen = self.view().fallen().map(|(_, member)| &member.grant.object);
        let fallen: Vec<NodeGrant> = fallen.filter(|grant| self.signs_for(&grant.cluster)).cloned().collect();
        for grant in &fallen {
            // Refused: it is in the log and among those that are not granted anew.
            let _ = self.grant_after(grant);
        }
        self.grant_anew();
        let released = self.release_tokens_of_former_keys();
        if !released.is_empty() {
            let names: Vec<String> = released.iter().map(ToString::to_string).collect();
            self.alarm(format!(
                "no issuer stands for the join tokens of nodes that waited: they join with new ones ({})",
                names.join(", ")
            ));
        }
        let still_out: Vec<NodeId> =
            dropped.iter().copied().filter(|node| self.view().member(*node).is_none()).collect();
        self.close_sessions_after(&Change::Policy { version: *version, dropped: still_out });
    }

    /// Grants some nodes anew whose issuer has another key since, if that one lies here.
    pub(super) fn grant_anew(&mut self) {
        self.anew_due = None;
        if self.keys.issuer.is_none() || self.behind.is_some() {
            return;
        }
        let grants = self.members_and_fallen().filter(|(_, member, fallen)| {
            let grant = &member.grant.object;
            (*fallen || self.view().is_former(grant)) && self.signs_for(&grant.cluster)
        });
        let due: Vec<NodeGrant> = grants.map(|(_, member, _)| member.grant.object.clone()).take(AT_ONCE + 1).collect();
        let failed = due.iter().take(AT_ONCE).filter(|grant| self.grant_after(grant).is_err()).count();
        if failed > 0 {
            self.anew_due = Some(Instant::now() + AGAIN_AFTER);
        } else if due.len() > AT_ONCE {
            self.anew_due = Some(Instant::now());
        }
        if !due.is_empty() {
            self.hub.progressed();
        }
    }

    /// Members, then those that are out because their issuer's key was stolen.
    fn members_and_fallen(&self) -> impl Iterator<Item = (NodeId, &Member, bool)> {
        let members = self.view().members().map(|(node, member)| (*node, member, false));
        members.chain(self.view().fallen().map(|(node, member)| (*node, member, true)))
    }

    /// How far the nodes of the issuer are whose key lies here.
    pub(crate) fn issuer_progress(&self) -> Result<IssuerProgress, Refusal> {
        Ok(self.progress_of(self.own_issuer()?))
    }

    /// How far those of every issuer are that the policy names a former key of.
    pub(super) fn issuers_under_way(&self) -> Vec<IssuerProgress> {
        let issuers = self.view().policy().issuers.iter().filter(|issuer| !issuer.former.is_empty());
        issuers.map(|issuer| self.progress_of(issuer)).collect()
    }

    fn progress_of(&self, issuer: &Issuer) -> IssuerProgress {
        let former = issuer.former.iter().map(|former| {
            let FormerKey { key, generation, serial } = *former;
            FormerIssuer { key, generation, serial }
        });
        let mut progress = IssuerProgress {
            policy_version: self.view().policy().version,
            issuer: issuer.key,
            former: former.collect(),
            total: 0,
            holding: 0,
            waiting: Vec::new(),
            absent: Vec::new(),
            ungranted: Vec::new(),
            voided_tokens: 0,
            done: false,
        };
        let now = unix_now();
        for (node, member, fallen) in self.members_and_fallen() {
            let grant = &member.grant.object;
            let is_its = issuer.clusters.iter().any(|scope| scope.cluster == grant.cluster);
            // Who left says no more.
            if !is_its || member.has_departed() || (!fallen && !member.is_valid_at(now)) {
                continue;
            }
            progress.total += 1;
            if fallen || self.view().is_former(grant) {
                progress.ungranted.push(grant.name.clone());
            } else if grant.external || member.speaks_under_its_grant() {
                progress.holding += 1;
            } else if self.hub.sessions().contains_key(&node) {
                progress.waiting.push(grant.name.clone());
            } else {
                progress.absent.push(grant.name.clone());
            }
        }
        progress
    }

    /// The issuer whose key lies here.
    fn own_issuer(&self) -> Result<&Issuer, Refusal> {
        let key = self.keys.issuer.as_ref().map(SigningKey::verify_key);
        let issuer = key.and_then(|key| self.view().policy().issuers.iter().find(|issuer| issuer.key == key));
        issuer.ok_or_else(|| {
            let message = "no issuer's key is on this machine: make the next one where it is kept ('meshctl signer new'), \
                           then 'meshctl policy propose --replace-issuer OLD NEW --out next.txt', and have the roots sign";
            refusal(RefusalCode::Unavailable, message)
        })
    }

    fn keys_folder(&self) -> Result<PathBuf, Refusal> {
        self.keys_dir.clone().ok_or_else(|| refusal(RefusalCode::Unavailable, "the keyserver has no folder for keys"))
    }
}

/// The key that comes next: the one that was made and never taken into use, or a new one, sealed like the others.
fn next_key(folder: &Path) -> Result<SigningKey, Refusal> {
    let failed = |error: keys::KeyFileError| refusal(RefusalCode::Unavailable, error.to_string());
    if let Some(next) = keys::load_optional(folder, NEXT).map_err(failed)? {
        return Ok(next);
    }
    let next = keys::generate().map_err(failed)?;
    keys::replace(folder, NEXT, &next).map_err(failed)?;
    Ok(next)
}

/// Where a root is needed that is not here, the command to type is part of the refusal.
fn signed_elsewhere(error: Refusal, held: VerifyKey, next: VerifyKey, stolen: bool) -> Refusal {
    let stolen = if stolen { " --stolen" } else { "" };
    let message = format!(
        "{}; the next key is made and is taken into use with that policy: meshctl policy propose --replace-issuer {} \
         {next}{stolen} --out next.txt",
        error.message,
        held.id().short()
    );
    Refusal { message, ..error }
}

fn remove(folder: &Path, name: &str) -> io::Result<()> {
    fs::remove_file(folder.join(name))?;
    fs::File::open(folder)?.sync_all()
}
