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
mod state;

use std::{collections::BTreeSet, fmt, net::IpAddr, ops::RangeInclusive};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

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

/// Whether a condition wants the value or anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Is {
    /// The value.
    Equal,
    /// Any other value.
    NotEqual,
}

/// Direction of an address, port or link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// Where the packet comes from.
    Source,
    /// Where it goes.
    Destination,
}

/// Addresses to compare with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// All of one prefix.
    Prefix(IpNet),
    /// A set of IPv4 prefixes of the same table.
    V4Set(String),
    /// A set of IPv6 prefixes of the same table.
    V6Set(String),
}

/// One condition or action of a rule, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are what the variant's line names")]
pub enum Term {
    /// Name of the link the packet came by (`Source`) or leaves by (`Destination`).
    LinkName { side: Side, is: Is, name: String },
    /// Group of that link.
    LinkGroup { side: Side, is: Is, group: u32 },
    /// The packet's address. In an `inet` table a packet of the other IP version never matches, with `NotEqual` either.
    Address { side: Side, is: Is, addresses: Addresses },
    /// Transport protocol number: 6 TCP, 17 UDP, 1 ICMP, 58 ICMPv6.
    Protocol { is: Is, number: u8 },
    /// Transport port in a range; combine with [`Term::Protocol`].
    Port { side: Side, ports: RangeInclusive<u16> },
    /// The packet's mark under a mask.
    Mark { is: Is, value: u32, mask: u32 },
    /// Sets the bits of `mask` in the packet's mark to those of `value`, and no others.
    SetMark { value: u32, mask: u32 },
    /// Matches packets of connections in one of these states; bits of [`connection_state`].
    ConnectionState { states: u32 },
    /// Does not track the packet's connection. At priorities below -200.
    NoTrack,
    /// Counts packets and bytes.
    Counter,
    /// Translates the source to itself, so that no later chain translates it to another.
    KeepSource { version: IpVersion },
    /// Translates the source to this address.
    SourceTo(IpAddr),
    /// Answers "administratively prohibited" and drops.
    Reject,
    /// Drops.
    Drop,
    /// Goes on with the next chain at this hook.
    Accept,
    /// Goes back to the chain that jumped here, or to the policy.
    Return,
    /// Runs another chain of the table, then goes on.
    Jump(String),
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Bits for [`Term::ConnectionState`].
pub mod connection_state {
    /// The packet belongs to no connection and starts none.
    pub const INVALID: u32 = 1;
    /// Packets were seen both ways.
    pub const ESTABLISHED: u32 = 2;
    /// Belongs to another connection, as ICMP errors do.
    pub const RELATED: u32 = 4;
    /// The first of its connection.
    pub const NEW: u32 = 8;
}

/// One rule: conditions, then actions.
///
/// ```
/// use mesh_hostnet::nft::{Addresses, Is, Rule, Side};
/// let clear_text = Rule::new()
///     .output_link(Is::NotEqual, "mesh0")
///     .address(Side::Destination, Is::Equal, Addresses::V4Set("remote4".into()))
///     .counter()
///     .drop();
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Conditions and actions.
    pub terms: Vec<Term>,
    /// Shown by `nft list`.
    pub comment: Option<String>,
}

impl Rule {
    /// A rule for every packet that does nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends any term.
    pub fn term(mut self, term: Term) -> Self {
        self.terms.push(term);
        self
    }

    /// Sets the text `nft list` shows, at most 120 bytes.
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }

    /// Condition: the link the packet came by.
    pub fn input_link(self, is: Is, name: impl Into<String>) -> Self {
        self.term(Term::LinkName { side: Side::Source, is, name: name.into() })
    }

    /// Condition: the link the packet leaves by.
    pub fn output_link(self, is: Is, name: impl Into<String>) -> Self {
        self.term(Term::LinkName { side: Side::Destination, is, name: name.into() })
    }

    /// Condition: the group of the link the packet came by.
    pub fn input_group(self, is: Is, group: u32) -> Self {
        self.term(Term::LinkGroup { side: Side::Source, is, group })
    }

    /// Condition: the group of the link the packet leaves by.
    pub fn output_group(self, is: Is, group: u32) -> Self {
        self.term(Term::LinkGroup { side: Side::Destination, is, group })
    }

    /// Condition: source or destination address.
    pub fn address(self, side: Side, is: Is, addresses: Addresses) -> Self {
        self.term(Term::Address { side, is, addresses })
    }

    /// Condition: transport protocol number.
    pub fn protocol(self, number: u8) -> Self {
        self.term(Term::Protocol { is: Is::Equal, number })
    }

    /// Condition: UDP with a port in the range.
    pub fn udp_port(self, side: Side, ports: RangeInclusive<u16>) -> Self {
        self.protocol(17).term(Term::Port { side, ports })
    }

    /// Condition: TCP with a port in the range.
    pub fn tcp_port(self, side: Side, ports: RangeInclusive<u16>) -> Self {
        self.protocol(6).term(Term::Port { side, ports })
    }

    /// Condition: the packet's mark under a mask.
    pub fn mark(self, is: Is, value: u32, mask: u32) -> Self {
        self.term(Term::Mark { is, value, mask })
    }

    /// Action: sets the bits of `mask` in the packet's mark to those of `value`.
    pub fn set_mark(self, value: u32, mask: u32) -> Self {
        self.term(Term::SetMark { value, mask })
    }

    /// Action: no connection tracking.
    pub fn no_track(self) -> Self {
        self.term(Term::NoTrack)
    }

    /// Action: counts.
    pub fn counter(self) -> Self {
        self.term(Term::Counter)
    }

    /// Action: pins the packet to its own source address.
    pub fn keep_source(self, version: IpVersion) -> Self {
        self.term(Term::KeepSource { version })
    }

    /// Action: translates the source.
    pub fn source_to(self, ip: IpAddr) -> Self {
        self.term(Term::SourceTo(ip))
    }

    /// Action: answers and drops.
    pub fn reject(self) -> Self {
        self.term(Term::Reject)
    }

    /// Action: drops.
    pub fn drop(self) -> Self {
        self.term(Term::Drop)
    }

    /// Action: accepts.
    pub fn accept(self) -> Self {
        self.term(Term::Accept)
    }

    /// Action: back to the calling chain.
    pub fn return_(self) -> Self {
        self.term(Term::Return)
    }

    /// Action: runs another chain.
    pub fn jump(self, chain: impl Into<String>) -> Self {
        self.term(Term::Jump(chain.into()))
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
