//! The kinds of offload, and what it means to do without one.

use std::{fmt, str::FromStr};

use crate::{packet::offload::Offloads, udp::Trains};

/// A kind of offload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// The device hands over super-packets of TCP over IPv4.
    Tso4,
    /// The device hands over super-packets of TCP over IPv6.
    Tso6,
    /// The device hands over super-packets of UDP.
    Uso,
    /// The device takes super-packets of TCP.
    TcpCoalesce,
    /// The device takes super-packets of UDP.
    UdpCoalesce,
    /// The socket sends trains.
    UdpSegment,
    /// The socket receives trains.
    UdpGro,
}

impl Class {
    /// All kinds.
    pub const ALL: [Self; 7] =
        [Self::Tso4, Self::Tso6, Self::Uso, Self::TcpCoalesce, Self::UdpCoalesce, Self::UdpSegment, Self::UdpGro];

    /// Its name, as configuration, status and metrics have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tso4 => "tso4",
            Self::Tso6 => "tso6",
            Self::Uso => "uso",
            Self::TcpCoalesce => "tcp-coalesce",
            Self::UdpCoalesce => "udp-coalesce",
            Self::UdpSegment => "udp-segment",
            Self::UdpGro => "udp-gro",
        }
    }

    /// Whether it is on.
    pub fn is_on(self, offloads: Offloads, trains: Trains) -> bool {
        match self {
            Self::Tso4 => offloads.tso4,
            Self::Tso6 => offloads.tso6,
            Self::Uso => offloads.uso,
            Self::TcpCoalesce => offloads.tcp_coalesce,
            Self::UdpCoalesce => offloads.udp_coalesce,
            Self::UdpSegment => trains.send,
            Self::UdpGro => trains.receive,
        }
    }

    /// Switches it off.
    pub fn turn_off(self, offloads: &mut Offloads, trains: &mut Trains) {
        *self.switch(offloads, trains) = false;
    }

    /// Its switch.
    pub(super) fn switch<'a>(self, offloads: &'a mut Offloads, trains: &'a mut Trains) -> &'a mut bool {
        match self {
            Self::Tso4 => &mut offloads.tso4,
            Self::Tso6 => &mut offloads.tso6,
            Self::Uso => &mut offloads.uso,
            Self::TcpCoalesce => &mut offloads.tcp_coalesce,
            Self::UdpCoalesce => &mut offloads.udp_coalesce,
            Self::UdpSegment => &mut trains.send,
            Self::UdpGro => &mut trains.receive,
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// There is no such kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no offload `{0}`: they are tso4, tso6, uso, tcp-coalesce, udp-coalesce, udp-segment and udp-gro")]
pub struct UnknownClass(String);

impl FromStr for Class {
    type Err = UnknownClass;

    fn from_str(text: &str) -> Result<Self, UnknownClass> {
        Self::ALL.into_iter().find(|class| class.as_str() == text).ok_or_else(|| UnknownClass(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_own_name_and_switch() {
        for class in Class::ALL {
            assert_eq!(class.as_str().parse(), Ok(class));
            let (mut offloads, mut trains) = (Offloads::ALL, Trains::ALL);
            class.turn_off(&mut offloads, &mut trains);
            let off: Vec<Class> = Class::ALL.into_iter().filter(|other| !other.is_on(offloads, trains)).collect();
            assert_eq!(off, [class]);
        }
        let said = "gso".parse::<Class>().map_err(|error| error.to_string());
        assert!(said.is_err_and(|said| said.contains("udp-segment")));
    }
}
