//! What one peer said, and what of it is worth asking for.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mesh_protocol::id::{NodeId, Position};
use mesh_protocol::peer::{CheckpointHead, Heads, MAX_HEADS, MAX_MEMBERS, MemberHead, MembersPage, RecordHead, Want};

use super::OwnWord;
use super::pull::Pull;
use super::serve::record_head;
use mesh_protocol::record::RevocationHead;

use crate::directory::Directory;

/// What a peer could not give, or gave in vain, is not asked for again for so long.
const ASK_AGAIN: Duration = Duration::from_secs(60);
/// Such things remembered for one peer: beyond them nothing more is asked of it for a while.
const MOST_DECLINED: usize = 8;
/// `Heads` of one peer that are read in a burst, and each second.
const HEADS_BURST: u32 = 8;
/// A peer that is behind and did not ask is told so no more often than this.
const ANSWER_EVERY: Duration = Duration::from_secs(5);
/// A checkpoint is worth fetching when it is fresher than ours by so much, in seconds.
const FRESHER: u64 = 5;

/// One peer.
#[derive(Debug)]
pub(super) struct Talk {
    /// What it said last.
    pub(super) heads: Option<Heads>,
    /// When.
    pub(super) heard: Option<Instant>,
    /// When it was answered last.
    answered: Option<Instant>,
    /// What is being fetched from it.
    pub(super) pull: Option<Pull>,
    declined: Vec<(Want, Instant)>,
    listing: Option<Listing>,
    allowance: u32,
    refilled: Instant,
}

/// The members of a peer that is further than this node, page by page.
#[derive(Debug)]
struct Listing {
    /// Where the peer stands.
    position: Position,
    after: Option<NodeId>,
    over: bool,
    /// Objects of the page that are missing here: at most three for each member of it.
    wants: VecDeque<Want>,
}

impl Talk {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            heads: None,
            heard: None,
            answered: None,
            pull: None,
            declined: Vec::new(),
            listing: None,
            allowance: HEADS_BURST,
            refilled: now,
        }
    }

    /// Whether its word is read: one a second on average.
    pub(super) fn may_speak(&mut self, now: Instant) -> bool {
        let gained = now.saturating_duration_since(self.refilled).as_secs();
        if gained > 0 {
            self.refilled = now;
            self.allowance = HEADS_BURST.min(self.allowance.saturating_add(u32::try_from(gained).unwrap_or(u32::MAX)));
        }
        let may = self.allowance > 0;
        self.allowance = self.allowance.saturating_sub(1);
        may
    }

    /// Whether it is answered now: two nodes that both lack what they cannot take do not talk for ever.
    pub(super) fn may_answer(&mut self, asked: bool, now: Instant) -> bool {
        let pause = if asked { Duration::from_secs(1) } else { ANSWER_EVERY };
        let may = self.answered.is_none_or(|answered| now.saturating_duration_since(answered) >= pause);
        if may {
            self.answered = Some(now);
        }
        may
    }

    /// When the piece that is waited for is late.
    pub(super) fn pull_due(&self) -> Option<Instant> {
        self.pull.as_ref().map(Pull::due)
    }

    /// Does not ask it for this again for a while.
    pub(super) fn decline(&mut self, want: Want, now: Instant) {
        if self.declined.len() >= MOST_DECLINED {
            self.declined.remove(0);
        }
        self.declined.push((want, now + ASK_AGAIN));
        if let Want::Members { .. } = want {
            self.listing = None;
        }
    }

    /// The next thing to fetch from it.
    pub(super) fn next_want(
        &mut self,
        from: NodeId,
        directory: &Directory,
        own: &OwnWord,
        listed: Option<Position>,
        now: Instant,
    ) -> Option<Want> {
        self.declined.retain(|(_, until)| *until > now);
        if self.declined.len() >= MOST_DECLINED {
            return None;
        }
        let heads = self.heads.as_ref()?;
        let fresh = |want: &Want| !self.declined.iter().any(|(declined, _)| declined == want);
        let told = wants(heads, from, directory, own).into_iter().find(fresh);
        if told.is_some() {
            return told;
        }
        self.next_of_listing(directory, own, listed)
    }

    /// Members are listed only without a keyserver, and only of a peer that is further than anybody listed before.
    fn next_of_listing(&mut self, directory: &Directory, own: &OwnWord, listed: Option<Position>) -> Option<Want> {
        let theirs = self.heads.as_ref()?.position?;
        let further = |than: Option<Position>| {
            than.is_none_or(|than| than.epoch != theirs.epoch || theirs.revision > than.revision)
        };
        if self.listing.is_none() && own.cut_off && further(directory.position()) && further(listed) {
            self.listing = Some(Listing { position: theirs, after: None, over: false, wants: VecDeque::new() });
        }
        let declined = &self.declined;
        let listing = self.listing.as_mut()?;
        while let Some(want) = listing.wants.pop_front() {
            if is_missing(want, directory) && !declined.iter().any(|(declined, _)| *declined == want) {
                return Some(want);
            }
        }
        if listing.over {
            self.listing = None;
            return None;
        }
        let page = Want::Members { after: listing.after };
        (!declined.iter().any(|(declined, _)| *declined == page)).then_some(page)
    }

    /// Notes what of a page of its members is missing here.
    pub(super) fn take_page(&mut self, page: &MembersPage, directory: &Directory, own: &OwnWord) {
        let Some(listing) = &mut self.listing else { return };
        // A page that does not go on, or that nobody could have cut, ends it: no peer lists for ever.
        let forward = page.members.first().is_some_and(|first| Some(first.node) > listing.after)
            && page.members.is_sorted_by(|one, other| one.node < other.node);
        listing.over = !forward || page.members.len() != MAX_MEMBERS;
        if !forward || page.members.len() > MAX_MEMBERS {
            return;
        }
        listing.after = page.members.last().map(|last| last.node);
        // Of itself a node lacks a grant at most: what it says it knows.
        let own_grant = |want: &Want| *want == Want::Grant { node: own.node };
        let wanted = page.members.iter().flat_map(|member| {
            let wants = missing_of(member, directory).into_iter();
            wants.filter(move |want| member.node != own.node || own_grant(want))
        });
        let mut wanted: Vec<Want> = wanted.collect();
        // Somebody may wait for the grants, and not for long.
        wanted.sort_by_key(|want| !matches!(want, Want::Grant { .. }));
        listing.wants = wanted.into();
    }

    /// Where the peer stands whose members are being listed.
    pub(super) fn listed_at(&self) -> Option<Position> {
        self.listing.as_ref().map(|listing| listing.position)
    }

    /// Whether its last page has arrived.
    pub(super) fn is_listing_over(&self) -> bool {
        self.listing.as_ref().is_some_and(|listing| listing.over)
    }
}

/// What a peer has and this node lacks, by its word; the most pressing first.
fn wants(heads: &Heads, from: NodeId, directory: &Directory, own: &OwnWord) -> Vec<Want> {
    let view = directory.view();
    let mut wants = Vec::new();
    if heads.policy_version > view.policy().version {
        wants.push(Want::Policy { version: view.policy().version + 1 });
    } else if heads.policy_version == view.policy().version && heads.policy != view.policy_hash() {
        wants.push(Want::Policy { version: heads.policy_version });
    }
    wants.extend(heads.revocations.iter().filter_map(|head| wanted_revocation(head, directory)));
    // Of one that fell nothing is taken before its new grant, which the list of its members brings once it has it.
    if let Some(member) = view.member(from) {
        if heads.generation > member.grant.object.generation {
            wants.push(Want::Grant { node: from });
        }
        let is_news =
            |held: RecordHead| heads.own.seq > held.seq || (heads.own.seq == held.seq && heads.own.hash != held.hash);
        if record_head(member).is_none_or(is_news) {
            wants.push(Want::Record { node: from });
        }
    }
    // Somebody speaks for this node, and it is not this machine.
    if let Some(yours) = heads.yours
        && (yours.seq > own.record.seq || (yours.seq == own.record.seq && yours.hash != own.record.hash))
    {
        wants.push(Want::Record { node: own.node });
    }
    if let Some(told) = &heads.checkpoint
        && is_interesting(told, directory)
    {
        wants.push(Want::Checkpoint { time: told.time });
    }
    wants
}

fn wanted_revocation(head: &RevocationHead, directory: &Directory) -> Option<Want> {
    let view = directory.view();
    let held = view.revocation_heads().into_iter().find(|held| held.revoker == head.revoker);
    let have = held.as_ref().map_or(0, |held| held.number);
    let forked = held.is_some_and(|held| held.number == head.number && held.hash != head.hash);
    let number = if forked { head.number } else { have + 1 };
    (forked || head.number > have).then_some(Want::Revocation { revoker: head.revoker, number })
}

/// Fresher than ours, further than ours, or of another world.
fn is_interesting(told: &CheckpointHead, directory: &Directory) -> bool {
    let is_known = directory.proof().is_some_and(|(it, _)| it.position == told.position && it.state == told.state);
    let contradicts = !is_known && directory.state_at(told.position).is_some_and(|state| state != told.state);
    let further = directory.newest_checkpoint().is_none_or(|(held, _)| {
        held.position.epoch == told.position.epoch && told.position.revision > held.position.revision
    });
    let fresher = directory.checkpoint_time().is_none_or(|latest| told.time.saturating_sub(latest) > FRESHER);
    contradicts || (!is_known && (further || fresher))
}

/// Whether a peer lacks something that this node has, by its word.
pub(super) fn is_behind(heads: &Heads, directory: &Directory, own: &OwnWord) -> bool {
    let view = directory.view();
    let ours = view.revocation_heads();
    let lacks = |head: &RevocationHead| {
        let theirs = heads.revocations.iter().find(|theirs| theirs.revoker == head.revoker);
        match theirs {
            Some(theirs) => theirs.number < head.number,
            // A full list is a part of a longer one.
            None => heads.revocations.len() < MAX_HEADS,
        }
    };
    heads.policy_version < view.policy().version
        || ours.iter().any(lacks)
        || heads.yours.is_none_or(|yours| yours.seq < own.record.seq)
}

fn missing_of(member: &MemberHead, directory: &Directory) -> Vec<Want> {
    let node = member.node;
    let held = directory.view().member(node);
    // Of one that fell no generation counts, and what it said is its own again with its new grant.
    let spoke = held.or_else(|| directory.fallen(node));
    let generation = held.map_or(0, |held| held.grant.object.generation);
    let seq = spoke.and_then(record_head).map_or(0, |record| record.seq);
    let mut wants = Vec::new();
    if member.generation > generation {
        wants.push(Want::Grant { node });
    }
    if member.seq > seq {
        wants.push(Want::Record { node });
    }
    // Many of those that fell may have none to ask for, and so keep the grants of others waiting.
    if held.map_or(spoke.is_none(), |held| held.endpoints.is_none()) && !wants.is_empty() {
        wants.push(Want::Endpoints { node });
    }
    wants
}

/// Whether it is still of use: another peer may have given it in the meantime, or the grant may have been refused.
fn is_missing(want: Want, directory: &Directory) -> bool {
    match want {
        Want::Record { node } | Want::Endpoints { node } => directory.view().member(node).is_some(),
        _ => true,
    }
}
