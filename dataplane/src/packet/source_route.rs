//! Whom a packet is for in the end, when its sender chose the way: the transport's checksum covers that address, not the next
//! stop, which is what the IP header names (RFC 8200, section 8.1; RFC 1122, section 3.2.1.8).

use super::checksum;

/// IPv4 options: end of the list, filler, loose and strict source route (RFC 791, section 3.1).
const END: u8 = 0;
const FILLER: u8 = 1;
const LOOSE: u8 = 131;
const STRICT: u8 = 137;
/// IPv6 extension headers: hop-by-hop options, routing, fragment (of one piece), destination options.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const OPTIONS: u8 = 60;
/// Kinds of routing header: source route (deprecated), home address (RFC 6275), segments (RFC 8754), the last stop of
/// which stands first.
const SOURCE_ROUTE: u8 = 0;
const HOME_ADDRESS: u8 = 2;
const SEGMENTS: u8 = 4;

/// Sum of the source and the final destination of `ip`: a whole IP header with its options or extension headers.
///
/// `None` if it chooses the way by a header that is not known or cut off: what the checksum covers cannot be told.
pub(super) fn covered_addresses(ip: &[u8]) -> Option<u64> {
    let (source, destination) = match ip.first()? >> 4 {
        4 => (ip.get(12..16)?, final_v4(ip.get(16..20)?, ip.get(20..)?)?),
        _ => (ip.get(8..24)?, final_v6(ip)?),
    };
    Some(checksum::sum(source) + checksum::sum(destination))
}

/// The last stop that an option names if there are stops left, `destination` otherwise.
fn final_v4<'a>(destination: &'a [u8], mut options: &'a [u8]) -> Option<&'a [u8]> {
    while let Some(&kind) = options.first() {
        let len = match kind {
            END => break,
            FILLER => 1,
            _ => usize::from(*options.get(1)?).max(2),
        };
        let (option, behind) = options.split_at_checked(len)?;
        // Type, length, pointer to the next stop (counted from 1), stops.
        if matches!(kind, LOOSE | STRICT) && usize::from(*option.get(2)?) < len {
            return option.get(3..)?.as_chunks::<4>().0.last().map(<[u8; 4]>::as_slice);
        }
        options = behind;
    }
    Some(destination)
}

/// The same for an IPv6 header with its extension headers.
fn final_v6(ip: &[u8]) -> Option<&[u8]> {
    let (mut next, mut rest) = (*ip.get(6)?, ip.get(40..)?);
    while matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | OPTIONS) {
        let &[following, extent, kind, left, ..] = rest else { return None };
        let len = if next == FRAGMENT { 8 } else { 8 + usize::from(extent) * 8 };
        let (header, behind) = rest.split_at_checked(len)?;
        if next == ROUTING && left > 0 {
            let stops = header.get(8..)?.as_chunks::<16>().0;
            let last = match kind {
                SOURCE_ROUTE | HOME_ADDRESS => stops.last(),
                SEGMENTS => stops.first(),
                _ => None,
            };
            return last.map(<[u8; 16]>::as_slice);
        }
        (next, rest) = (following, behind);
    }
    ip.get(24..40)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    fn v4(options: &[u8]) -> Vec<u8> {
        [&[0x45; 12][..], &[10, 0, 0, 1, 10, 0, 0, 2], options].concat()
    }

    fn v6(first: u8, extensions: &[u8]) -> Vec<u8> {
        let mut ip = vec![0; 40];
        (ip[0], ip[6], ip[23], ip[39]) = (0x60, first, 1, 2);
        [&ip, extensions].concat()
    }

    /// A routing header in front of TCP, with two stops that end in 8 and in 9.
    fn routing(kind: u8, left: u8) -> Vec<u8> {
        let mut header = vec![0; 40];
        (header[0], header[1], header[2], header[3], header[23], header[39]) = (6, 4, kind, left, 8, 9);
        header
    }

    #[test]
    fn the_last_stop_counts_while_there_are_stops_left() {
        let route = |pointer| [1, LOOSE, 11, pointer, 10, 0, 0, 8, 10, 0, 0, 9];
        for (options, last) in [(&route(4)[..], 9), (&route(8), 9), (&route(12), 2), (&[], 2), (&[1, 0, LOOSE, 0], 2)] {
            let expected = 2 * 0x0a00 + 1 + last;
            assert_eq!(covered_addresses(&v4(options)), Some(expected), "{options:?}");
        }
        for (kind, left, last) in [(0, 1, 9), (2, 1, 9), (4, 1, 8), (0, 0, 2), (4, 0, 2), (9, 0, 2)] {
            let options = [&[ROUTING, 0, 1, 4, 0, 0, 0, 0][..], &routing(kind, left)].concat();
            assert_eq!(covered_addresses(&v6(60, &options)), Some(1 + last), "{kind} {left}");
        }
    }

    #[test]
    fn what_cannot_be_told_is_said_so() {
        assert_eq!(covered_addresses(&v4(&[LOOSE, 11, 4, 10])), None, "cut off");
        assert_eq!(covered_addresses(&v4(&[LOOSE, 3, 0])), None, "no stop");
        assert_eq!(covered_addresses(&v6(ROUTING, &routing(9, 1))), None, "an unknown kind");
        assert_eq!(covered_addresses(&v6(ROUTING, &routing(0, 1)[..30])), None, "cut off");
    }

    proptest! {
        #[test]
        fn hostile_bytes_do_no_harm(mut ip in proptest::collection::vec(any::<u8>(), 0..120), v6 in any::<bool>()) {
            if let Some(first) = ip.first_mut() {
                *first = if v6 { 0x60 } else { 0x4f };
            }
            covered_addresses(&ip);
        }
    }
}
