//! Why a packet went nowhere: one small reason each, one counter each.

use std::fmt;

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $variant:ident = $label:literal,)*) => {
        /// Why a packet or datagram was dropped.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum DropReason { $($(#[$doc])* $variant,)* }

        impl DropReason {
            /// Every reason there is, in the order of [`DropCounters`].
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)*];

            /// Label for logs and metrics: lower case, stable.
            pub const fn as_str(self) -> &'static str {
                match self { $(DropReason::$variant => $label,)* }
            }
        }
    };
}

drop_reasons! {
    /// Outbound: not a whole IPv4 or IPv6 packet.
    MalformedPacket = "malformed_packet",
    /// Outbound: nobody owns the destination.
    NoRoute = "no_route",
    /// Outbound: multicast, loopback or another destination that is never routed.
    UnroutableDestination = "unroutable_destination",
    /// Outbound: the source is not ours.
    ForeignSource = "foreign_source",
    /// Outbound: larger than the path carries and not to be fragmented.
    PacketTooBig = "packet_too_big",
    /// Outbound: a datagram of ours, whose way to its peer leads into the device.
    RoutingLoop = "routing_loop",
    /// Outbound: the peer has no endpoint to send to.
    NoEndpoint = "no_endpoint",
    /// Outbound: more packets wait for a handshake than the queue holds.
    QueueFull = "queue_full",
    /// Outbound: more packets cross to lane 0 than the queue holds.
    CrossingFull = "crossing_full",
    /// Outbound: waited for a handshake that did not come.
    HandshakeTimeout = "handshake_timeout",
    /// Outbound: the kernel refused the datagram.
    SendFailed = "send_failed",
    /// Outbound: a super-packet of a kind that the device was not told to make, or with headers that are none of it.
    UnexpectedOffload = "unexpected_offload",
    /// Inbound: neither a WireGuard message nor a datagram for control.
    MalformedDatagram = "malformed_datagram",
    /// Inbound: the datagram was longer than the receive buffer.
    Truncated = "truncated",
    /// Inbound: a datagram for control, whose queue was full.
    EventQueueFull = "event_queue_full",
    /// Inbound: no local key matches the first MAC of a handshake message.
    WrongMac = "wrong_mac",
    /// Inbound: more handshakes from one source than its bucket allows, although it proved its address.
    HandshakeRate = "handshake_rate",
    /// Inbound: one of a flood of handshakes from where no peer is known to be, dropped before anything is computed.
    HandshakeFlood = "handshake_flood",
    /// Inbound: a cookie was demanded instead of an answer.
    CookieDemanded = "cookie_demanded",
    /// Inbound: a handshake whose static key belongs to no peer, or cannot be opened.
    UnknownPeer = "unknown_peer",
    /// Inbound: a handshake from a lane of the peer that has nothing to do with the one it reached.
    WrongLane = "wrong_lane",
    /// Inbound: a handshake for whose tunnel no preshared key was agreed on in time.
    MissingKey = "missing_key",
    /// Inbound: a handshake message that is old, replayed or answers nothing.
    StaleHandshake = "stale_handshake",
    /// Inbound: a handshake message that does not authenticate.
    BadHandshake = "bad_handshake",
    /// Inbound: a cookie reply that is unsolicited or forged.
    BadCookie = "bad_cookie",
    /// Inbound: no tunnel has this receiver index.
    UnknownIndex = "unknown_index",
    /// Inbound: data on a session that is over.
    ExpiredSession = "expired_session",
    /// Inbound: data that does not authenticate.
    BadData = "bad_data",
    /// Inbound: data that arrived before.
    Replay = "replay",
    /// Inbound: authenticated, but no whole IPv4 or IPv6 packet inside.
    MalformedInner = "malformed_inner",
    /// Inbound: authenticated, but the source belongs to another peer or to nobody.
    WrongSource = "wrong_source",
    /// Inbound: authenticated, but the source is one of our own.
    OwnSource = "own_source",
    /// Inbound: authenticated, but the source can never be one: multicast, loopback, unspecified, IPv4-mapped.
    MartianSource = "martian_source",
    /// Inbound: authenticated, but the destination is not ours.
    ForeignDestination = "foreign_destination",
    /// Inbound: authenticated, but routers marked congestion on a flow that does not know of it (RFC 6040, section 4.2).
    CongestionUnmarkable = "congestion_unmarkable",
    /// Inbound: the TUN queue did not take the packet, or there is none.
    QueueRefused = "queue_refused",
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One counter for each [`DropReason`].
#[derive(Clone, PartialEq, Eq)]
pub struct DropCounters([u64; DropReason::ALL.len()]);

impl Default for DropCounters {
    fn default() -> Self {
        Self([0; DropReason::ALL.len()])
    }
}

impl DropCounters {
    /// How often `reason` occurred.
    pub fn count(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// Every reason with its count, zeros included.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|&reason| (reason, self.count(reason)))
    }

    /// Counts one more.
    pub fn add(&mut self, reason: DropReason) {
        self.add_many(reason, 1);
    }

    /// Counts `many` more.
    pub fn add_many(&mut self, reason: DropReason, many: u64) {
        let counter = &mut self.0[reason as usize];
        *counter = counter.wrapping_add(many);
    }

    /// Adds all counts of `other`.
    pub fn merge(&mut self, other: &DropCounters) {
        for (own, theirs) in self.0.iter_mut().zip(&other.0) {
            *own = own.wrapping_add(*theirs);
        }
    }
}

impl fmt::Debug for DropCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter().filter(|(_, count)| *count > 0)).finish()
    }
}
