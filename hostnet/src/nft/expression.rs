//! One rule as the kernel's register machine runs it.
//!
//! Each condition loads something into register 1 and compares it; actions read the same register. Numbers of the packet
//! are in network byte order, those the kernel keeps itself (mark, group) in the host's.
//!
//! Source of the numbers: `include/uapi/linux/netfilter/nf_tables.h`.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Addresses, IpVersion, Is, Rule, Side, Term};
use crate::wire::{put, put_be32, put_nested, put_text};

const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const REGISTER: u32 = 1;
const VERDICT_REGISTER: u32 = 0;

const META_MARK: u32 = 3;
const META_INPUT_NAME: u32 = 6;
const META_OUTPUT_NAME: u32 = 7;
const META_VERSION: u32 = 15;
const META_PROTOCOL: u32 = 16;
const META_INPUT_GROUP: u32 = 21;
const META_OUTPUT_GROUP: u32 = 22;

const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;

const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
const LESS_OR_EQUAL: u32 = 3;
const GREATER_OR_EQUAL: u32 = 5;

const VERSION_4: u8 = 2;
const VERSION_6: u8 = 10;

/// Writes the rule's expressions, the content of the rule's expression list.
pub(super) fn put_expressions(out: &mut Vec<u8>, rule: &Rule) {
    let mut machine = Machine { out };
    for term in &rule.terms {
        machine.term(term);
    }
}

struct Machine<'a> {
    out: &'a mut Vec<u8>,
}

impl Machine<'_> {
    fn term(&mut self, term: &Term) {
        match term {
            Term::LinkName { side, is, name } => {
                let mut padded = [0; libc::IFNAMSIZ];
                padded[..name.len()].copy_from_slice(name.as_bytes());
                self.meta(by_side(*side, META_INPUT_NAME, META_OUTPUT_NAME));
                self.compare(operator(*is), &padded);
            }
            Term::LinkGroup { side, is, group } => {
                self.meta(by_side(*side, META_INPUT_GROUP, META_OUTPUT_GROUP));
                self.compare(operator(*is), &group.to_ne_bytes());
            }
            Term::Address { side, is, addresses } => self.address(*side, *is, addresses),
            Term::Protocol { is, number } => {
                self.meta(META_PROTOCOL);
                self.compare(operator(*is), &[*number]);
            }
            Term::Port { side, ports } => self.port(*side, *ports.start(), *ports.end()),
            Term::Mark { is, value, mask } => {
                self.meta(META_MARK);
                self.bitwise(&mask.to_ne_bytes(), &[0; 4]);
                self.compare(operator(*is), &(value & mask).to_ne_bytes());
            }
            Term::SetMark { value, mask } => {
                self.meta(META_MARK);
                self.bitwise(&(!mask).to_ne_bytes(), &(value & mask).to_ne_bytes());
                self.expression("meta", |data| {
                    put_be32(data, 2, META_MARK);
                    put_be32(data, 3, REGISTER);
                });
            }
            Term::ConnectionState { states } => {
                self.expression("ct", |data| {
                    put_be32(data, 1, REGISTER);
                    put_be32(data, 2, 0);
                });
                self.bitwise(&states.to_ne_bytes(), &[0; 4]);
                self.compare(NOT_EQUAL, &[0; 4]);
            }
            action => self.action(action),
        }
    }

    fn action(&mut self, term: &Term) {
        match term {
            Term::NoTrack => self.expression("notrack", |_| {}),
            Term::Counter => self.expression("counter", |data| {
                put(data, 1, &[0; 8]);
                put(data, 2, &[0; 8]);
            }),
            Term::KeepSource { version } => {
                let (offset, length) = address_at(Side::Source, *version);
                self.version(*version);
                self.payload(NETWORK_HEADER, offset, length);
                self.source_nat(*version);
            }
            Term::SourceTo(ip) => {
                let (version, bytes) = ip_bytes(*ip);
                self.version(version);
                self.immediate(&bytes);
                self.source_nat(version);
            }
            Term::Reject => self.expression("reject", |data| {
                // icmpx, administratively prohibited: the right message for either IP version.
                put_be32(data, 1, 2);
                put(data, 2, &[3]);
            }),
            Term::Drop => self.verdict(libc::NF_DROP, None),
            Term::Accept => self.verdict(libc::NF_ACCEPT, None),
            Term::Return => self.verdict(libc::NFT_RETURN, None),
            Term::Jump(chain) => self.verdict(libc::NFT_JUMP, Some(chain)),
            // The conditions, written by the caller.
            Term::LinkName { .. }
            | Term::LinkGroup { .. }
            | Term::Address { .. }
            | Term::Protocol { .. }
            | Term::Port { .. }
            | Term::Mark { .. }
            | Term::SetMark { .. }
            | Term::ConnectionState { .. } => {}
        }
    }

    fn address(&mut self, side: Side, is: Is, addresses: &Addresses) {
        let version = match addresses {
            Addresses::V4Set(_) | Addresses::Prefix(IpNet::V4(_)) => IpVersion::V4,
            Addresses::V6Set(_) | Addresses::Prefix(IpNet::V6(_)) => IpVersion::V6,
        };
        let (offset, length) = address_at(side, version);
        self.version(version);
        self.payload(NETWORK_HEADER, offset, length);
        match addresses {
            Addresses::V4Set(set) | Addresses::V6Set(set) => self.expression("lookup", |data| {
                put_text(data, 1, set);
                put_be32(data, 2, REGISTER);
                put_be32(data, 5, u32::from(is == Is::NotEqual));
            }),
            Addresses::Prefix(net) => {
                let (_, mask) = ip_bytes(net.netmask());
                let (_, network) = ip_bytes(net.network());
                if net.prefix_len() < net.max_prefix_len() {
                    self.bitwise(&mask, &vec![0; mask.len()]);
                }
                self.compare(operator(is), &network);
            }
        }
    }

    fn port(&mut self, side: Side, first: u16, last: u16) {
        let offset = by_side(side, 0, 2);
        self.payload(TRANSPORT_HEADER, offset, 2);
        if first == last {
            return self.compare(EQUAL, &first.to_be_bytes());
        }
        self.compare(GREATER_OR_EQUAL, &first.to_be_bytes());
        self.compare(LESS_OR_EQUAL, &last.to_be_bytes());
    }

    /// Lets only packets of one IP version go on; needed in `inet` tables, harmless in others.
    fn version(&mut self, version: IpVersion) {
        self.meta(META_VERSION);
        self.compare(
            EQUAL,
            &[match version {
                IpVersion::V4 => VERSION_4,
                IpVersion::V6 => VERSION_6,
            }],
        );
    }

    fn meta(&mut self, key: u32) {
        self.expression("meta", |data| {
            put_be32(data, 1, REGISTER);
            put_be32(data, 2, key);
        });
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32) {
        self.expression("payload", |data| {
            put_be32(data, 1, REGISTER);
            put_be32(data, 2, base);
            put_be32(data, 3, offset);
            put_be32(data, 4, length);
        });
    }

    fn compare(&mut self, operator: u32, value: &[u8]) {
        self.expression("cmp", |data| {
            put_be32(data, 1, REGISTER);
            put_be32(data, 2, operator);
            put_nested(data, 3, |data| put(data, DATA_VALUE, value));
        });
    }

    /// register = (register & mask) ^ xor
    fn bitwise(&mut self, mask: &[u8], xor: &[u8]) {
        self.expression("bitwise", |data| {
            put_be32(data, 1, REGISTER);
            put_be32(data, 2, REGISTER);
            put_be32(data, 3, mask.len() as u32);
            put_nested(data, 4, |data| put(data, DATA_VALUE, mask));
            put_nested(data, 5, |data| put(data, DATA_VALUE, xor));
        });
    }

    fn immediate(&mut self, value: &[u8]) {
        self.expression("immediate", |data| {
            put_be32(data, 1, REGISTER);
            put_nested(data, 2, |data| put(data, DATA_VALUE, value));
        });
    }

    fn source_nat(&mut self, version: IpVersion) {
        let family = match version {
            IpVersion::V4 => VERSION_4,
            IpVersion::V6 => VERSION_6,
        };
        self.expression("nat", |data| {
            put_be32(data, 1, 0);
            put_be32(data, 2, family.into());
            put_be32(data, 3, REGISTER);
        });
    }

    fn verdict(&mut self, code: i32, chain: Option<&str>) {
        self.expression("immediate", |data| {
            put_be32(data, 1, VERDICT_REGISTER);
            put_nested(data, 2, |data| {
                put_nested(data, DATA_VERDICT, |data| {
                    put_be32(data, 1, code as u32);
                    if let Some(chain) = chain {
                        put_text(data, 2, chain);
                    }
                });
            });
        });
    }

    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Vec<u8>)) {
        put_nested(self.out, LIST_ELEMENT, |out| {
            put_text(out, EXPRESSION_NAME, name);
            put_nested(out, EXPRESSION_DATA, fill);
        });
    }
}

fn operator(is: Is) -> u32 {
    match is {
        Is::Equal => EQUAL,
        Is::NotEqual => NOT_EQUAL,
    }
}

fn by_side<T>(side: Side, source: T, destination: T) -> T {
    match side {
        Side::Source => source,
        Side::Destination => destination,
    }
}

/// Offset and length of an address in the IP header (RFC 791 section 3.1, RFC 8200 section 3).
fn address_at(side: Side, version: IpVersion) -> (u32, u32) {
    match version {
        IpVersion::V4 => (by_side(side, 12, 16), 4),
        IpVersion::V6 => (by_side(side, 8, 24), 16),
    }
}

fn ip_bytes(ip: IpAddr) -> (IpVersion, Vec<u8>) {
    match ip {
        IpAddr::V4(ip) => (IpVersion::V4, ip.octets().to_vec()),
        IpAddr::V6(ip) => (IpVersion::V6, ip.octets().to_vec()),
    }
}
