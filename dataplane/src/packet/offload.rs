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

/// Which super-packets a queue gives and takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// TCP, over IPv4 and IPv6.
    pub tcp: bool,
    /// UDP, over IPv4 and IPv6.
    pub udp: bool,
}

impl Offloads {
    /// All there are.
    pub const ALL: Self = Self { tcp: true, udp: true };
    /// None: packets come and go one by one.
    pub const NONE: Self = Self { tcp: false, udp: false };

    /// True if such super-packets pass.
    pub fn has(self, transport: Transport) -> bool {
        match transport {
            Transport::Tcp => self.tcp,
            Transport::Udp => self.udp,
        }
    }
}
