//! What the outer header of a tunnelled packet says of its class of service (RFC 2983); congestion marks are
//! [`ecn`]'s.

use super::ecn;

/// Class of service of outer headers. What comes out of a tunnel keeps the class it went in with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dscp {
    /// Best effort for all: an observer of the wire learns nothing of the packets.
    #[default]
    Clear,
    /// That of the inner packet: networks that sort by class do so; an observer of the wire sees the classes.
    Copy,
    /// This one for all, handshakes too: 0 to 63.
    Fixed(u8),
}

impl Dscp {
    /// The outer traffic class byte of a packet with this one inside.
    pub fn outer_class(self, inner: u8) -> u8 {
        match self {
            Self::Clear => inner & ecn::MASK,
            Self::Copy => inner,
            Self::Fixed(_) => self.own_class() | inner & ecn::MASK,
        }
    }

    /// The traffic class byte of datagrams that carry no packet.
    pub fn own_class(self) -> u8 {
        match self {
            Self::Clear | Self::Copy => 0,
            Self::Fixed(class) => class << 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn congestion_marks_pass_whatever_the_class() {
        for ecn in 0..4 {
            let inner = 46 << 2 | ecn;
            assert_eq!(Dscp::Clear.outer_class(inner), ecn);
            assert_eq!(Dscp::Copy.outer_class(inner), inner);
            assert_eq!(Dscp::Fixed(10).outer_class(inner), 10 << 2 | ecn);
        }
        assert_eq!([Dscp::Clear, Dscp::Copy, Dscp::Fixed(10)].map(Dscp::own_class), [0, 0, 40]);
    }
}
