//! A table as one batch of nfnetlink messages.
//!
//! ```text
//! BATCH_BEGIN · NEWTABLE · DELTABLE · NEWTABLE · NEWSET… · NEWSETELEM… · NEWCHAIN… · NEWRULE… · BATCH_END
//! ```
//!
//! The first two make sure that nothing of an older table is left: deleting one that is not there would fail the batch.

use nix::errno::Errno;

use super::{
    Addresses, Chain, ChainKind, Family, HookPoint, Policy, Rule, Set, Table, Term, check_name, expression, prefixes,
    state::TABLE_USER_DATA,
};
use crate::{
    Error, Result, link,
    socket::{ACK, APPEND, CREATE, REQUEST},
    wire::{self, Builder, put, put_be32, put_nested},
};

const SUBSYSTEM: u16 = libc::NFNL_SUBSYS_NFTABLES as u16;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
/// Elements per message: each needs up to 36 bytes of a list that may hold 64 KiB.
const ELEMENTS_PER_MESSAGE: usize = 1000;
const INTERVAL_SET: u32 = 4;
const INTERVAL_END: u32 = 1;
/// nft's numbers for how to print keys.
const KEY_IPV4: u32 = 7;
const KEY_IPV6: u32 = 8;

/// One message of a batch, not yet numbered.
pub(super) struct Step {
    what: String,
    kind: u16,
    flags: u16,
    family: u8,
    body: Vec<u8>,
}

/// A numbered batch, ready to send.
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    first: u32,
    steps: Vec<(u32, String)>,
}

/// The message type of an nf_tables message.
pub(super) fn kind(message: libc::c_int) -> u16 {
    SUBSYSTEM << 8 | message as u16
}

/// The header behind the netlink header: family, version, resource.
pub(super) fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

/// The kernel's number of a family.
pub(super) fn family_number(family: Family) -> u8 {
    match family {
        Family::Inet => 1,
        Family::Ip => 2,
        Family::Ip6 => 10,
    }
}

/// Checks what the kernel's messages cannot express.
pub(super) fn check(table: &Table) -> Result<()> {
    check_name("nftables table", &table.name)?;
    for set in &table.sets {
        check_name("nftables set", &set.name)?;
    }
    for chain in &table.chains {
        check_name("nftables chain", &chain.name)?;
        for term in chain.rules.iter().flat_map(|rule| &rule.terms) {
            check_term(table, term)?;
        }
    }
    Ok(())
}

fn check_term(table: &Table, term: &Term) -> Result<()> {
    let invalid = |object: String, reason| Err(Error::Invalid { object, reason });
    match term {
        Term::LinkName { name, .. } => link::check_name(name),
        Term::Jump(chain) => check_name("nftables chain", chain),
        Term::Address { addresses: Addresses::V4Set(name) | Addresses::V6Set(name), .. } => {
            let known = table.sets.iter().any(|set| set.name == *name);
            if known {
                Ok(())
            } else {
                invalid(format!("nftables set {name}"), "a rule looks it up but the table lacks it")
            }
        }
        Term::Port { ports, .. } if ports.is_empty() => invalid(format!("port range {ports:?}"), "it is empty"),
        _ => Ok(()),
    }
}

/// The steps that put `table` in place of what was there.
pub(super) fn replacement(table: &Table) -> Result<Vec<Step>> {
    let mut comment = Vec::new();
    put_comment(&mut comment, &comment_of(table.fingerprint()));
    let mut steps = deletion(table);
    steps.insert(0, step(table, "table", libc::NFT_MSG_NEWTABLE, CREATE, named(1, &table.name)));
    let mut body = named(1, &table.name);
    put(&mut body, TABLE_USER_DATA, &comment);
    steps.push(step(table, "table", libc::NFT_MSG_NEWTABLE, CREATE, body));
    content(table, &mut steps)?;
    Ok(steps)
}

/// The steps that delete a table.
pub(super) fn deletion(table: &Table) -> Vec<Step> {
    vec![step(table, "table", libc::NFT_MSG_DELTABLE, 0, named(1, &table.name))]
}

fn content(table: &Table, steps: &mut Vec<Step>) -> Result<()> {
    for (id, set) in table.sets.iter().enumerate() {
        put_set(table, set, id as u32 + 1, steps);
    }
    for chain in &table.chains {
        steps.push(step(table, &chain.name, libc::NFT_MSG_NEWCHAIN, CREATE, chain_body(table, chain)));
    }
    for chain in &table.chains {
        for (number, rule) in chain.rules.iter().enumerate() {
            let what = format!("rule {} of chain {}", number + 1, chain.name);
            let body = rule_body(table, chain, rule, &what)?;
            steps.push(step(table, &what, libc::NFT_MSG_NEWRULE, CREATE | APPEND, body));
        }
    }
    Ok(())
}

fn put_set(table: &Table, set: &Set, id: u32, steps: &mut Vec<Step>) {
    let (key, length) = match set.prefixes {
        super::Prefixes::V4(_) => (KEY_IPV4, 4),
        super::Prefixes::V6(_) => (KEY_IPV6, 16),
    };
    let what = format!("set {}", set.name);
    let mut body = named(1, &table.name);
    wire::put_text(&mut body, 2, &set.name);
    put_be32(&mut body, 3, INTERVAL_SET);
    put_be32(&mut body, 4, key);
    put_be32(&mut body, 5, length);
    put_be32(&mut body, 10, id);
    steps.push(step(table, &what, libc::NFT_MSG_NEWSET, CREATE, body));

    let intervals = prefixes::intervals(&set.prefixes);
    for some in intervals.chunks(ELEMENTS_PER_MESSAGE / 2) {
        let mut body = named(1, &table.name);
        wire::put_text(&mut body, 2, &set.name);
        put_be32(&mut body, 4, id);
        put_nested(&mut body, 3, |list| {
            for interval in some {
                put_element(list, &interval.first, 0);
                if let Some(after) = &interval.after {
                    put_element(list, after, INTERVAL_END);
                }
            }
        });
        steps.push(step(table, &what, libc::NFT_MSG_NEWSETELEM, CREATE, body));
    }
}

fn put_element(list: &mut Vec<u8>, key: &[u8], flags: u32) {
    put_nested(list, 1, |element| {
        put_nested(element, 1, |data| put(data, 1, key));
        if flags != 0 {
            put_be32(element, 3, flags);
        }
    });
}

fn chain_body(table: &Table, chain: &Chain) -> Vec<u8> {
    let mut body = named(1, &table.name);
    wire::put_text(&mut body, 3, &chain.name);
    if let Some(hook) = chain.hook {
        put_nested(&mut body, 4, |nested| {
            put_be32(nested, 1, hook_number(hook.point));
            put_be32(nested, 2, hook.priority as u32);
        });
        put_be32(&mut body, 5, if hook.policy == Policy::Drop { 0 } else { 1 });
        wire::put_text(
            &mut body,
            7,
            match hook.kind {
                ChainKind::Filter => "filter",
                ChainKind::Nat => "nat",
                ChainKind::Route => "route",
            },
        );
    }
    body
}

fn hook_number(point: HookPoint) -> u32 {
    match point {
        HookPoint::Prerouting => 0,
        HookPoint::Input => 1,
        HookPoint::Forward => 2,
        HookPoint::Output => 3,
        HookPoint::Postrouting => 4,
    }
}

fn rule_body(table: &Table, chain: &Chain, rule: &Rule, what: &str) -> Result<Vec<u8>> {
    let mut expressions = Vec::new();
    expression::put_expressions(&mut expressions, rule);
    if expressions.len() > 32 * 1024 {
        return Err(Error::Invalid { object: format!("{table}, {what}"), reason: "it has too many terms" });
    }
    let mut body = named(1, &table.name);
    wire::put_text(&mut body, 2, &chain.name);
    put_nested(&mut body, 4, |nested| nested.extend_from_slice(&expressions));
    if let Some(comment) = &rule.comment {
        let mut data = Vec::new();
        put_comment(&mut data, comment);
        put(&mut body, 7, &data);
    }
    Ok(body)
}

/// nft's own format of user data: type 0 is a comment, one byte of length, text with a closing zero.
fn put_comment(out: &mut Vec<u8>, comment: &str) {
    let end = comment.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= 120).last().unwrap_or(0);
    out.push(0);
    out.push(end as u8 + 1);
    out.extend_from_slice(&comment.as_bytes()[..end]);
    out.push(0);
}

/// The text of a table's comment.
pub(super) fn comment_of(fingerprint: u64) -> String {
    format!("fingerprint {fingerprint:016x}")
}

/// FNV-1a over the messages that make the table: equal descriptions, equal numbers, in every build.
pub(super) fn fingerprint(table: &Table) -> u64 {
    let mut steps = Vec::new();
    // A description that cannot be encoded is refused before its fingerprint matters.
    let _ = content(table, &mut steps);
    let mut hash = Fnv::default();
    for step in &steps {
        hash.add(&step.kind.to_be_bytes());
        hash.add(&(step.body.len() as u32).to_be_bytes());
        hash.add(&step.body);
    }
    hash.0
}

/// The 64-bit FNV-1a hash.
pub(super) struct Fnv(pub(super) u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

fn step(table: &Table, what: &str, message: libc::c_int, flags: u16, body: Vec<u8>) -> Step {
    Step { what: what.into(), kind: kind(message), flags, family: family_number(table.family), body }
}

fn named(attribute: u16, name: &str) -> Vec<u8> {
    let mut body = Vec::new();
    wire::put_text(&mut body, attribute, name);
    body
}

/// Numbers the steps and puts them between begin and end. The last one asks for an acknowledgement.
pub(super) fn batch(steps: &[Step], mut next_sequence: impl FnMut() -> u32) -> Batch {
    let first = next_sequence();
    let mut bytes = edge(BATCH_BEGIN, first);
    let mut numbered = Vec::with_capacity(steps.len());
    for (at, step) in steps.iter().enumerate() {
        let sequence = next_sequence();
        let last = at + 1 == steps.len();
        let flags = step.flags | REQUEST | if last { ACK } else { 0 };
        let message = Builder::new(step.kind, flags, sequence).raw(&header(step.family, 0)).raw(&step.body);
        bytes.extend(message.finish());
        numbered.push((sequence, step.what.clone()));
    }
    bytes.extend(edge(BATCH_END, next_sequence()));
    Batch { bytes, first, steps: numbered }
}

fn edge(kind: u16, sequence: u32) -> Vec<u8> {
    Builder::new(kind, REQUEST, sequence).raw(&header(0, SUBSYSTEM)).finish()
}

impl Batch {
    /// What the kernel's answers say about the batch as a whole.
    pub(super) fn outcome(&self, object: &str, datagrams: &[Vec<u8>]) -> Result<()> {
        let mut acknowledged = false;
        for message in datagrams.iter().flat_map(|datagram| wire::messages(datagram)) {
            let step = self.steps.iter().find(|(sequence, _)| *sequence == message.sequence);
            if i32::from(message.kind) != libc::NLMSG_ERROR || (step.is_none() && message.sequence != self.first) {
                continue;
            }
            if let Some((errno, text)) = wire::error_of(&message) {
                let object = step.map_or_else(|| object.to_owned(), |(_, what)| format!("{object}, {what}"));
                return Err(Error::from_errno(object, errno, text));
            }
            acknowledged |= self.steps.last().is_some_and(|(sequence, _)| *sequence == message.sequence);
        }
        if acknowledged {
            return Ok(());
        }
        Err(Error::from_errno(object, Errno::EPROTO, Some("the kernel did not answer the batch".into())))
    }
}
