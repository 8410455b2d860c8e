//! Where a peer is reached: candidates from control, and the address its authenticated traffic comes from.
//!
//! A completed handshake is the probe of a candidate. The endpoint moves only to the source of something that only
//! the peer can have made just now: a response to our initiation, or data. Which of our own addresses that reached is
//! kept with it: data leaves from there, for nothing else may get through to the peer.

use std::{net::SocketAddr, time::Duration};

use crate::{clock::Instant, udp::Ends};

/// From an endpoint that nothing came from for so long, traffic moves to another address of the peer's for certain.
const STILL_THERE: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug, Clone, Default)]
pub(crate) struct Path {
    candidates: Vec<SocketAddr>,
    /// Proved by authenticated traffic.
    proved: Option<Ends>,
    /// When it proved it last.
    heard: Option<Instant>,
    /// Initiations sent in this attempt.
    tried: usize,
    /// Once traffic proved an endpoint, candidates are no longer tried: a plain WireGuard peer has one endpoint.
    pub(crate) follows_traffic_only: bool,
}

impl Path {
    /// The path to lane `lane` of a peer whose lane 0 has these addresses.
    pub(crate) fn new(candidates: &[SocketAddr], lane: u8) -> Self {
        let mut path = Self::default();
        path.set_candidates(candidates, lane);
        path
    }

    /// Takes the candidates of a new table. A proved endpoint stays: traffic says more than a record.
    pub(crate) fn set_candidates(&mut self, candidates: &[SocketAddr], lane: u8) {
        let candidates = candidates.iter().filter_map(|candidate| of_lane(*candidate, lane));
        if !candidates.clone().eq(self.candidates.iter().copied()) {
            self.candidates = candidates.collect();
        }
    }

    /// Where data goes.
    pub(crate) fn endpoint(&self) -> Option<Ends> {
        self.proved.or_else(|| self.candidates.first().map(|candidate| (*candidate).into()))
    }

    /// Where authenticated traffic came from last, and the address of ours that it reached.
    pub(crate) fn proved(&self) -> Option<Ends> {
        self.proved
    }

    fn proved_remote(&self) -> Option<SocketAddr> {
        self.proved.map(|ends| ends.remote)
    }

    /// Takes an endpoint that somebody chose by hand: traffic goes there from now on.
    pub(crate) fn redirect(&mut self, to: SocketAddr, lane: u8) {
        if let Some(to) = of_lane(to, lane) {
            self.proved = Some(to.into());
        }
    }

    /// The address of ours that the peer reached may not lead to it any more: the system chooses again.
    pub(crate) fn forget_local(&mut self) {
        if let Some(proved) = &mut self.proved {
            proved.local = None;
        }
    }

    /// A new attempt begins with the best address again.
    pub(crate) fn begin(&mut self) {
        self.tried = 0;
    }

    /// Where the next initiation goes: the proved endpoint first, then one candidate after another, and round again.
    pub(crate) fn next_target(&mut self) -> Option<SocketAddr> {
        let choices = self.choices();
        let n = self.tried % choices.max(1);
        self.tried += 1;
        self.proved_remote().into_iter().chain(self.others()).nth(n)
    }

    /// The next initiation goes where the last one went.
    pub(crate) fn try_again(&mut self) {
        self.tried = self.tried.saturating_sub(1);
    }

    /// True while an address has not been tried in this attempt: then the next try need not wait long.
    pub(crate) fn has_untried(&self) -> bool {
        self.tried < self.choices()
    }

    /// True for a candidate beside the proved endpoint, which the peer was heard from just now.
    pub(crate) fn is_second(&self, from: SocketAddr, now: Instant) -> bool {
        self.proved_remote().is_some_and(|proved| proved != from)
            && self.heard.is_some_and(|heard| now.since(heard) < STILL_THERE)
            && self.candidates.contains(&from)
    }

    /// Authenticated traffic came from `from`; returns what was there before if that is another address.
    pub(crate) fn prove(&mut self, from: Ends, now: Instant) -> Option<Option<SocketAddr>> {
        self.heard = Some(now);
        if self.proved == Some(from) {
            return None;
        }
        let before = self.endpoint().map(|ends| ends.remote);
        self.proved = Some(from);
        (before != Some(from.remote)).then_some(before)
    }

    fn choices(&self) -> usize {
        self.others().count() + usize::from(self.proved.is_some())
    }

    /// Candidates to try beside the proved endpoint.
    fn others(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        let proved = self.proved_remote();
        let none = self.follows_traffic_only && proved.is_some();
        self.candidates.iter().copied().filter(move |candidate| !none && Some(*candidate) != proved)
    }
}

/// The address of a lane of a node whose lane 0 has this one; `None` if there is no such port.
fn of_lane(first: SocketAddr, lane: u8) -> Option<SocketAddr> {
    Some(SocketAddr::new(first.ip(), first.port().checked_add(lane.into())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> SocketAddr {
        ([192, 0, 2, 1], port).into()
    }

    fn now() -> Instant {
        Instant::from_start(Duration::from_secs(1))
    }

    #[test]
    fn tries_the_proved_endpoint_then_each_candidate() {
        let mut path = Path::new(&[address(1), address(2)], 0);
        assert_eq!(path.prove(address(1).into(), now()), None, "already the endpoint");
        assert_eq!(path.prove(address(9).into(), now()), Some(Some(address(1))));
        path.begin();
        let targets: Vec<_> = (0..4).map(|_| path.next_target()).collect();
        assert_eq!(targets, [9, 1, 2, 9].map(|port| Some(address(port))));
        assert!(!path.has_untried());
    }

    #[test]
    fn new_candidates_do_not_move_a_proved_endpoint() {
        let mut path = Path::new(&[], 0);
        assert_eq!(path.next_target(), None);
        path.prove(address(5).into(), now());
        path.set_candidates(&[address(6)], 0);
        assert_eq!(path.endpoint(), Some(address(5).into()));
    }

    #[test]
    fn another_lane_has_another_port() {
        let mut path = Path::new(&[address(7_100), address(65_535)], 3);
        assert_eq!(path.endpoint(), Some(address(7_103).into()));
        path.set_candidates(&[address(65_533)], 3);
        assert_eq!(path.endpoint(), None, "there is no such port");
    }

    #[test]
    fn our_end_follows_without_being_a_move() {
        let by = |local: u8| Ends { remote: address(1), local: Some([192, 0, 2, local].into()) };
        let mut path = Path::new(&[address(1)], 0);
        assert_eq!(path.prove(by(7), now()), None, "the endpoint is where it was");
        assert_eq!(path.endpoint(), Some(by(7)));
        assert_eq!(path.prove(by(8), now()), None);
        assert_eq!(path.endpoint(), Some(by(8)));
        path.forget_local();
        assert_eq!(path.endpoint(), Some(address(1).into()));
        assert!(path.next_target().is_some() && !path.has_untried(), "still one address to try");
    }

    #[test]
    fn a_second_address_is_a_candidate_while_the_endpoint_is_heard() {
        let mut path = Path::new(&[address(1), address(2)], 0);
        assert!(!path.is_second(address(2), now()), "nothing is proved");
        path.prove(address(1).into(), now());
        assert!(path.is_second(address(2), now()) && !path.is_second(address(1), now()));
        assert!(!path.is_second(address(9), now()), "nobody listed it: the peer moved");
        assert!(!path.is_second(address(2), now() + STILL_THERE), "the endpoint went silent");
    }
}
