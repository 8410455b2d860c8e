//! nftables: whole tables, described as values and put into the kernel in one atomic step.
//!
//! ```text
//! Table ─► encode (one batch: make, delete, make anew, sets, chains, rules) ─► kernel: all or nothing
//! kernel ─► state (fingerprint kept in the table, counts, digest of what is there) ─► compare
//! ```
//!
//! There is no moment without the table: packets see the old one or the new one.

mod encode;
mod expression;
mod prefixes;
mod rule;
mod state;

use std::{collections::BTreeSet, fmt};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use rule::{Addresses, IpVersion, Is, Rule, Side, Term, connection_state};
pub use state::TableState;

use crate::{Error, Handle, Result};

/// Which packets a table sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet,
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
}

/// A whole table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Family.
    pub family: Family,
    /// Name, unique in its family.
    pub name: String,
    /// Prefix sets that rules look up.
    pub sets: Vec<Set>,
    /// Chains; one without a hook is reached by [`Rule::jump`] and must come before the rule that jumps to it.
    pub chains: Vec<Chain>,
}

/// A named set of prefixes. Overlapping and adjacent ones are merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Name, unique in the table.
    pub name: String,
    /// Its prefixes, of one family.
    pub prefixes: Prefixes,
}

/// Prefixes of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prefixes {
    /// IPv4.
    V4(BTreeSet<Ipv4Net>),
    /// IPv6.
    V6(BTreeSet<Ipv6Net>),
}

impl Set {
    /// A set of the IPv4 prefixes among `prefixes`.
    pub fn v4(name: impl Into<String>, prefixes: impl IntoIterator<Item = IpNet>) -> Self {
        let v4 = prefixes.into_iter().filter_map(|net| match net {
            IpNet::V4(net) => Some(net),
            IpNet::V6(_) => None,
        });
        Self { name: name.into(), prefixes: Prefixes::V4(v4.collect()) }
    }

    /// A set of the IPv6 prefixes among `prefixes`.
    pub fn v6(name: impl Into<String>, prefixes: impl IntoIterator<Item = IpNet>) -> Self {
        let v6 = prefixes.into_iter().filter_map(|net| match net {
            IpNet::V6(net) => Some(net),
            IpNet::V4(_) => None,
        });
        Self { name: name.into(), prefixes: Prefixes::V6(v6.collect()) }
    }
}

/// Where in the kernel a chain is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HookPoint {
    /// Every packet that arrives, before routing.
    Prerouting,
    /// Packets for this host.
    Input,
    /// Packets that pass through.
    Forward,
    /// Packets of this host.
    Output,
    /// Every packet that leaves, after routing.
    Postrouting,
}

/// What a chain may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainKind {
    /// Judge.
    Filter,
    /// Translate addresses; called for the first packet of a connection.
    Nat,
    /// Judge, and route anew if the mark was changed (output only).
    Route,
}

/// What happens to a packet that no rule judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Policy {
    /// It goes on.
    #[default]
    Accept,
    /// It is dropped.
    Drop,
}

/// A place in the kernel for a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hook {
    /// What the chain may do.
    pub kind: ChainKind,
    /// Where it is called.
    pub point: HookPoint,
    /// Order among the chains there, smaller first. Connection tracking is at -200, translation of the source at 100.
    pub priority: i32,
    /// For packets no rule judged.
    pub policy: Policy,
}

/// A chain: rules in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Name, unique in the table.
    pub name: String,
    /// Where it is called; `None` for one that rules jump to.
    pub hook: Option<Hook>,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

impl Chain {
    /// A chain with policy accept.
    pub fn hooked(name: impl Into<String>, kind: ChainKind, point: HookPoint, priority: i32) -> Self {
        let hook = Hook { kind, point, priority, policy: Policy::Accept };
        Self { name: name.into(), hook: Some(hook), rules: Vec::new() }
    }

    /// Appends a rule.
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }
}

impl Table {
    /// An empty table.
    pub fn new(family: Family, name: impl Into<String>) -> Self {
        Self { family, name: name.into(), sets: Vec::new(), chains: Vec::new() }
    }

    /// A hash of the whole description. It is kept in the kernel's table (shown by `nft list` as its comment) and read back
    /// by [`Handle::table_state`]. It recognises, it does not protect: who may change tables may forge it.
    pub fn fingerprint(&self) -> u64 {
        encode::fingerprint(self)
    }

    /// How many rules it has.
    pub fn rule_count(&self) -> usize {
        self.chains.iter().map(|chain| chain.rules.len()).sum()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nftables table {} {}", family_name(self.family), self.name)
    }
}

impl Handle {
    /// Puts the table into the kernel in place of any of that family and name, in one atomic step.
    ///
    /// Counters start at zero again.
    ///
    /// # Errors
    /// [`Error::Invalid`] for names the kernel cannot take; [`Error::Refused`] with the place of the refusal. Then nothing
    /// was changed.
    pub fn replace_table(&mut self, table: &Table) -> Result<()> {
        encode::check(table)?;
        let steps = encode::replacement(table)?;
        self.commit(&table.to_string(), steps)
    }

    /// Deletes a table with all that is in it. Already gone is success.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn delete_table(&mut self, family: Family, name: &str) -> Result<()> {
        let table = Table::new(family, name);
        encode::check(&table)?;
        crate::error::gone_is_fine(self.commit(&table.to_string(), encode::deletion(&table)))
    }

    /// What the kernel has of a table, `None` if it has none.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn table_state(&mut self, family: Family, name: &str) -> Result<Option<TableState>> {
        encode::check(&Table::new(family, name))?;
        state::read(self, family, name)
    }

    /// Whether the kernel has exactly this table: the fingerprint and every count agree.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn has_table(&mut self, table: &Table) -> Result<bool> {
        let state = self.table_state(table.family, &table.name)?;
        Ok(state.is_some_and(|state| state.matches(table)))
    }

    /// The number of the ruleset; every change by anyone raises it.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn ruleset_generation(&mut self) -> Result<u32> {
        state::generation(self)
    }

    /// Sends the steps as one batch.
    fn commit(&mut self, object: &str, steps: Vec<encode::Step>) -> Result<()> {
        let channel = self.netfilter()?;
        let batch = encode::batch(&steps, || channel.next_sequence());
        channel.send(&batch.bytes, object)?;
        // The kernel has answered when `send` returns.
        let datagrams = channel.drain(object)?;
        batch.outcome(object, &datagrams)
    }
}

/// The family's name in nft's language.
pub(crate) fn family_name(family: Family) -> &'static str {
    match family {
        Family::Inet => "inet",
        Family::Ip => "ip",
        Family::Ip6 => "ip6",
    }
}

/// Checks a name of a table, set or chain.
pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    if name.is_empty() || name.len() > 127 || name.contains('\0') {
        return Err(Error::Invalid { object: format!("{what} {name}"), reason: "a name has 1 to 127 bytes" });
    }
    Ok(())
}
