//! How large an inner packet may be.

/// Outer IPv6 header 40, UDP 8, WireGuard header and tag 32: the larger of the two outer families, because a path may
/// change from one to the other.
const OVERHEAD: u16 = 40 + 8 + 32;
/// Least MTU of a link that carries IPv6 (RFC 8200, section 5); below it the kernel removes its IPv6 addresses.
const MIN_MTU: u16 = 1280;
/// What an underlay of unknown MTU is taken for.
const ETHERNET: u16 = 1500;
/// Largest MTU a TUN device and the data plane take.
const MAX_MTU: u16 = 65_000;

/// Largest inner packet, in bytes, that an underlay of `underlay` bytes carries in one datagram; never below 1280, where
/// outer datagrams go fragmented instead. 0 means unknown.
///
/// Source: WireGuard whitepaper, section 5.4.6.
pub(crate) fn inner_mtu(underlay: u16) -> u16 {
    let underlay = if underlay == 0 { ETHERNET } else { underlay };
    underlay.saturating_sub(OVERHEAD).clamp(MIN_MTU, MAX_MTU)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overhead_is_subtracted_and_ipv6_keeps_its_least() {
        for (underlay, inner) in
            [(1500, 1420), (9000, 8920), (1360, 1280), (1280, 1280), (0, 1420), (1, 1280), (u16::MAX, 65_000)]
        {
            assert_eq!(inner_mtu(underlay), inner, "{underlay}");
        }
    }
}
