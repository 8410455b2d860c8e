//! IP rules: which routing table is looked up for which packet.

use std::fmt;

use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::RouteProtocol,
    rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
};

use crate::{
    Error, Handle, Result,
    error::{gone_is_fine, there_is_fine},
    socket::{CREATE, EXCLUSIVE},
};

/// The family of addresses a rule is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What a rule does with a packet it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleVerdict {
    /// Looks the destination up in a table; without a match the next rule is tried.
    Lookup(u32),
    /// Answers "unreachable".
    Unreachable,
    /// Drops silently.
    Blackhole,
    /// Something else, by the kernel's number.
    Other(u8),
}

/// One ip rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// IPv4 or IPv6: each has its own rules.
    pub family: IpFamily,
    /// Order, smaller first.
    pub preference: u32,
    /// Matches packets whose mark under the mask `.1` is `.0`.
    pub mark: Option<(u32, u32)>,
    /// Matches packets that the conditions do *not* match.
    pub invert: bool,
    /// Source prefix.
    pub source: Option<IpNet>,
    /// Destination prefix.
    pub destination: Option<IpNet>,
    /// Name of the link a packet came by.
    pub input_link: Option<String>,
    /// Name of the link a packet is bound to.
    pub output_link: Option<String>,
    /// What happens.
    pub verdict: RuleVerdict,
    /// Who made it.
    pub protocol: u8,
}

impl Rule {
    /// A rule for every packet.
    pub fn lookup(family: IpFamily, preference: u32, table: u32) -> Self {
        Self {
            family,
            preference,
            mark: None,
            invert: false,
            source: None,
            destination: None,
            input_link: None,
            output_link: None,
            verdict: RuleVerdict::Lookup(table),
            protocol: 0,
        }
    }

    /// Restricts the rule to packets whose mark under `mask` is not `mark`.
    pub fn unless_marked(mut self, mark: u32, mask: u32) -> Self {
        self.mark = Some((mark, mask));
        self.invert = true;
        self
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.preference)?;
        if self.invert {
            write!(f, " not")?;
        }
        if let Some((mark, mask)) = self.mark {
            write!(f, " fwmark {mark:#x}/{mask:#x}")?;
        }
        match self.verdict {
            RuleVerdict::Lookup(table) => write!(f, " lookup {table}"),
            verdict => write!(f, " {verdict:?}"),
        }
    }
}

impl Handle {
    /// All rules of both families, in the kernel's order. Rules of an `l3mdev` table read as `Lookup(0)`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn rules(&mut self) -> Result<Vec<Rule>> {
        let mut rules = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RuleMessage::default();
            request.header.family = family;
            match self.dump("ip rules", RouteNetlinkMessage::GetRule(request)) {
                Ok(answers) => rules.extend(answers.iter().filter_map(rule_of)),
                Err(error) if error.errno() == Some(nix::errno::Errno::EAFNOSUPPORT) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(rules)
    }

    /// Adds a rule; an equal one being there is success.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn add_rule(&mut self, rule: &Rule) -> Result<()> {
        let request = RouteNetlinkMessage::NewRule(message(rule)?);
        // Without `EXCLUSIVE` the kernel adds a second, equal one; with it, it overlooks `invert` (`rule_exists`).
        match self.request(&object(rule), request.clone(), CREATE | EXCLUSIVE) {
            Err(error) if error.is_exists() && !self.rules()?.contains(rule) => {
                self.request(&object(rule), request, CREATE)
            }
            other => there_is_fine(other),
        }
    }

    /// Removes a rule and no other. Already gone is success.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn delete_rule(&mut self, rule: &Rule) -> Result<()> {
        let request = RouteNetlinkMessage::DelRule(message(rule)?);
        let all = self.rules()?;
        if !all.contains(rule) {
            return Ok(());
        }
        gone_is_fine(self.request(&object(rule), request.clone(), 0))?;
        // The kernel overlooks `invert` here too and takes the first of the two: put the wrong one back.
        let twin = Rule { invert: !rule.invert, ..rule.clone() };
        if all.contains(&twin) && !self.rules()?.contains(&twin) {
            gone_is_fine(self.request(&object(rule), request, 0))?;
            return self.add_rule(&twin);
        }
        Ok(())
    }
}

fn message(rule: &Rule) -> Result<RuleMessage> {
    let mut message = RuleMessage::default();
    message.header.family = match rule.family {
        IpFamily::V4 => AddressFamily::Inet,
        IpFamily::V6 => AddressFamily::Inet6,
    };
    message.header.flags.set(RuleFlags::Invert, rule.invert);
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.preference));
    message.header.action = match rule.verdict {
        RuleVerdict::Lookup(table) => {
            message.header.table = u8::try_from(table).unwrap_or(0);
            attributes.push(RuleAttribute::Table(table));
            RuleAction::ToTable
        }
        RuleVerdict::Unreachable => RuleAction::Unreachable,
        RuleVerdict::Blackhole => RuleAction::Blackhole,
        RuleVerdict::Other(number) => RuleAction::from(number),
    };
    if let Some((mark, mask)) = rule.mark {
        attributes.push(RuleAttribute::FwMark(mark));
        attributes.push(RuleAttribute::FwMask(mask));
    }
    for net in rule.source.iter().chain(&rule.destination) {
        if net.addr().is_ipv4() != (rule.family == IpFamily::V4) {
            return Err(Error::Invalid { object: object(rule), reason: "its prefix is of the other family" });
        }
    }
    if let Some(net) = rule.source {
        message.header.src_len = net.prefix_len();
        attributes.push(RuleAttribute::Source(net.network()));
    }
    if let Some(net) = rule.destination {
        message.header.dst_len = net.prefix_len();
        attributes.push(RuleAttribute::Destination(net.network()));
    }
    attributes.extend(rule.input_link.clone().map(RuleAttribute::Iifname));
    attributes.extend(rule.output_link.clone().map(RuleAttribute::Oifname));
    if rule.protocol != 0 {
        attributes.push(RuleAttribute::Protocol(RouteProtocol::from(rule.protocol)));
    }
    Ok(message)
}

/// Reads a rule out of an rtnetlink message.
pub(crate) fn rule_of(message: &RouteNetlinkMessage) -> Option<Rule> {
    let (RouteNetlinkMessage::NewRule(message) | RouteNetlinkMessage::DelRule(message)) = message else {
        return None;
    };
    let family = match message.header.family {
        AddressFamily::Inet => IpFamily::V4,
        AddressFamily::Inet6 => IpFamily::V6,
        _ => return None,
    };
    let mut table = u32::from(message.header.table);
    let (mut mark, mut mask) = (None, u32::MAX);
    let mut rule = Rule::lookup(family, 0, 0);
    rule.invert = message.header.flags.contains(RuleFlags::Invert);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(preference) => rule.preference = *preference,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::FwMark(value) => mark = Some(*value),
            RuleAttribute::FwMask(value) => mask = *value,
            RuleAttribute::Source(ip) => rule.source = IpNet::new(*ip, message.header.src_len).ok(),
            RuleAttribute::Destination(ip) => rule.destination = IpNet::new(*ip, message.header.dst_len).ok(),
            RuleAttribute::Iifname(name) => rule.input_link = Some(name.clone()),
            RuleAttribute::Oifname(name) => rule.output_link = Some(name.clone()),
            RuleAttribute::Protocol(protocol) => rule.protocol = u8::from(*protocol),
            _ => {}
        }
    }
    rule.mark = mark.map(|mark| (mark, mask));
    rule.verdict = match message.header.action {
        RuleAction::ToTable => RuleVerdict::Lookup(table),
        RuleAction::Unreachable => RuleVerdict::Unreachable,
        RuleAction::Blackhole => RuleVerdict::Blackhole,
        other => RuleVerdict::Other(other.into()),
    };
    Some(rule)
}

fn object(rule: &Rule) -> String {
    format!("ip rule {rule}")
}
