//! One rule as a value: conditions, then actions.

use std::{net::IpAddr, ops::RangeInclusive};

use ipnet::IpNet;

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
