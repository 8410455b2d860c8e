//! What kernel and data plane leave to each other: super-packets that are many packets with one header.

/// What is left to do with a packet read from a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Offload {
    /// Nothing: one whole packet, its checksums done.
    #[default]
    None,
    /// A super-packet, to be cut; see [`Segments`](super::segment::Segments).
    Cut(Cut),
    /// Something that the kernel was not told it may ask for.
    Unknown,
}

/// How a super-packet is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// What it carries.
    pub transport: Transport,
    /// Bytes of payload in each packet but the last, which may have fewer. For TCP an upper bound.
    pub size: u16,
}

/// Protocols that super-packets are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A stream: may be cut anywhere.
    Tcp,
    /// Datagrams: each keeps its length.
    Udp,
}

/// Which super-packets a queue gives and takes, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// It gives those of TCP over IPv4.
    pub tso4: bool,
    /// It gives those of TCP over IPv6.
    pub tso6: bool,
    /// It gives those of UDP, over both: the kernel has no switch for one.
    pub uso: bool,
    /// It takes those of TCP.
    pub tcp_coalesce: bool,
    /// It takes those of UDP.
    pub udp_coalesce: bool,
}

impl Offloads {
    /// All there are.
    pub const ALL: Self = Self { tso4: true, tso6: true, uso: true, tcp_coalesce: true, udp_coalesce: true };
    /// None: packets come and go one by one.
    pub const NONE: Self = Self { tso4: false, tso6: false, uso: false, tcp_coalesce: false, udp_coalesce: false };

    /// True if it takes super-packets of this kind.
    pub fn joins(self, transport: Transport) -> bool {
        match transport {
            Transport::Tcp => self.tcp_coalesce,
            Transport::Udp => self.udp_coalesce,
        }
    }
}
