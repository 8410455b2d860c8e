//! A network that loses, delays and reorders.

use std::{cmp::Reverse, collections::BTreeMap, net::SocketAddr, time::Duration};

use mesh_dataplane::clock::Instant;

/// A datagram on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// Its source.
    pub from: SocketAddr,
    /// Where it goes.
    pub to: SocketAddr,
    /// What it carries.
    pub bytes: Vec<u8>,
    /// It must not be cut on its way.
    pub dont_fragment: bool,
}

/// Decides about one datagram: true lets it pass.
type Filter = Box<dyn FnMut(&Sent) -> bool>;

/// See the module.
pub struct Link {
    /// One-way delay.
    pub delay: Duration,
    /// Added at random, evenly.
    pub jitter: Duration,
    /// Share that is lost.
    pub loss_percent: u64,
    /// Largest datagram that passes, IP header included. What is larger vanishes without a word.
    pub mtu: usize,
    /// Everything ever sent, lost or not, while this is `Some`: a recording to replay.
    pub recording: Option<Vec<Sent>>,
    filter: Option<Filter>,
    under_way: BTreeMap<Reverse<(Instant, u64)>, Sent>,
    count: u64,
    state: u64,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("under_way", &self.under_way.len()).finish_non_exhaustive()
    }
}

impl Link {
    pub(crate) fn seeded(seed: u64) -> Self {
        Self {
            delay: Duration::from_millis(1),
            jitter: Duration::ZERO,
            loss_percent: 0,
            mtu: 1_500,
            recording: None,
            filter: None,
            under_way: BTreeMap::new(),
            count: 0,
            state: seed,
        }
    }

    /// Only what `filter` lets pass arrives from now on.
    pub fn set_filter(&mut self, filter: impl FnMut(&Sent) -> bool + 'static) {
        self.filter = Some(Box::new(filter));
    }

    /// Everything passes again.
    pub fn clear_filter(&mut self) {
        self.filter = None;
    }

    pub(crate) fn send(&mut self, sent: Sent, now: Instant) {
        if let Some(recording) = &mut self.recording {
            recording.push(sent.clone());
        }
        let header = if sent.to.is_ipv4() { 20 } else { 40 };
        let fits = sent.bytes.len() + 8 + header <= self.mtu;
        let passes = fits && self.filter.as_mut().is_none_or(|filter| filter(&sent));
        let lost = self.random() % 100 < self.loss_percent;
        let jitter = self.random() % (self.jitter.as_nanos() as u64 + 1);
        if passes && !lost {
            self.count += 1;
            let at = now + self.delay + Duration::from_nanos(jitter);
            self.under_way.insert(Reverse((at, self.count)), sent);
        }
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.under_way.last_key_value().map(|(Reverse((at, _)), _)| *at)
    }

    pub(crate) fn pop(&mut self, now: Instant) -> Option<Sent> {
        self.next().filter(|at| *at <= now)?;
        self.under_way.pop_last().map(|(_, sent)| sent)
    }

    /// SplitMix64.
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}
