#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const START: Instant = Instant::from_start(Duration::from_secs(1_000));

/// A path that carries so much, with a peer at its end; and somebody who sends large packets.
struct World {
    path: PathMtu,
    endpoint: SocketAddr,
    most: u16,
    now: Instant,
    /// Largest packet that arrives; `None`: nothing does.
    carries: Option<u16>,
    knows: bool,
    delay: Duration,
    loss_percent: u64,
    state: u64,
    answers: BTreeMap<(Instant, u64), (u32, u16)>,
    packets: u64,
    used: bool,
    probes: u64,
}

impl World {
    fn new(v6: bool, most: u16, carries: u16) -> Self {
        let endpoint = if v6 { "[2001:db8::1]:7100" } else { "192.0.2.1:7100" }.parse().unwrap();
        let mut path = PathMtu::new(START);
        path.follow(endpoint, most, START);
        Self {
            path,
            endpoint,
            most,
            now: START,
            carries: Some(carries),
            knows: true,
            delay: Duration::from_millis(20),
            loss_percent: 0,
            state: 1,
            answers: BTreeMap::new(),
            packets: 0,
            used: true,
            probes: 0,
        }
    }

    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        self.state >> 33
    }

    /// Lets time pass as a lane does: timers in steps of 100 ms, a packet in each.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now = self.now + Duration::from_millis(100);
            while let Some((&(at, n), &(number, size))) =
                self.answers.first_key_value().filter(|((at, _), _)| *at <= self.now)
            {
                self.answers.remove(&(at, n));
                self.path.handle_answer(number, size, at);
            }
            if self.used {
                self.packets += 1;
                self.path.note_packet(usize::from(self.path.limits(self.most).mtu()));
            }
            let pulse = self.now.since_start().as_millis().is_multiple_of(1_000);
            if pulse || self.path.poll_timeout().is_some_and(|at| at <= self.now) {
                self.path.follow(self.endpoint, self.most, self.now);
                self.path.handle_timeout(self.packets, self.now);
            }
            while let Some(probe) = self.path.poll_transmit() {
                self.probes += 1;
                let lost = self.random() % 100 < self.loss_percent;
                let arrives = self.carries.is_some_and(|carries| probe.size <= carries);
                if arrives && self.knows && !lost {
                    self.answers.insert((self.now + self.delay, self.probes), (probe.number, probe.size));
                }
            }
            let limits = self.path.limits(self.most);
            assert!(limits.cut <= limits.fits && limits.fits <= self.most && limits.mtu() >= 1_280);
        }
    }

    fn secs(&mut self, count: u64) -> Limits {
        self.run(Duration::from_secs(count));
        self.path.limits(self.most)
    }

    fn state(&self) -> PathState {
        self.path.snapshot(0, 0, self.now).unwrap().state
    }
}

#[test]
fn a_path_as_wide_as_control_says_costs_one_pair() {
    let mut world = World::new(false, 1_420, 1_440);
    world.run(Duration::from_millis(400));
    assert_eq!((world.state(), world.probes), (PathState::Confirmed, 2));
    let snapshot = world.path.snapshot(3, 1, world.now).unwrap();
    assert_eq!((snapshot.path_mtu, snapshot.inner_mtu), (1_480, 1_420), "headers counted");
    world.used = false;
    world.secs(3);
    let before = world.probes;
    world.secs(3_600);
    assert_eq!(world.probes, before, "nobody sends, nobody asks");
    assert_eq!(world.path.poll_timeout(), None);
}

#[test]
fn a_black_hole_is_doubted_within_a_second_and_found_within_two() {
    for (v6, least) in [(false, 1_220), (true, 1_200)] {
        let mut world = World::new(v6, 1_420, 1_420);
        world.secs(5);
        world.carries = Some(least);
        world.run(Duration::from_secs(1));
        assert!(world.path.limits(1_420).cut <= least, "TCP is cut");
        world.run(Duration::from_secs(1));
        assert!(world.path.limits(1_420).fits <= least);
        let limits = world.secs(5);
        assert!((least - GRAIN..=least).contains(&limits.fits), "{limits:?}");
        assert_eq!((limits.mtu(), world.state(), world.path.black_holes()), (1_280, PathState::BlackHole, 1));
        world.carries = Some(1_420);
        let limits = world.secs(35);
        assert_eq!((limits, world.state()), (Limits::flat(1_420), PathState::Confirmed), "it climbs back");
    }
}

#[test]
fn a_size_is_tried_again_ever_more_rarely() {
    let mut world = World::new(false, 8_920, 1_420);
    world.secs(60);
    let probes = |world: &mut World| {
        let before = world.probes;
        world.secs(600);
        world.probes - before
    };
    let (first, later) = (probes(&mut world), probes(&mut world));
    // Two a second while large packets go out, and the search.
    assert!(later <= first && later < 2 * 2 * 600 + 100, "{first} {later}");
    assert_eq!(world.path.climb_pause, CLIMB.1);
}

#[test]
fn a_peer_without_probes_and_a_dead_path_change_nothing() {
    let mut world = World::new(false, 1_420, 1_420);
    world.knows = false;
    let limits = world.secs(600);
    assert_eq!((limits, world.state()), (Limits::flat(1_420), PathState::Unanswered));
    assert!(world.probes <= 15 * 6, "{} probes in ten minutes", world.probes);
    world.knows = true;
    world.secs(65);
    assert_eq!(world.state(), PathState::Confirmed);
    world.carries = None;
    assert_eq!((world.secs(60), world.path.black_holes()), (Limits::flat(1_420), 0));
    world.carries = Some(1_300);
    let limits = world.secs(10);
    assert!((1_292..=1_300).contains(&limits.fits), "what comes back narrower is found: {limits:?}");
}

#[test]
fn another_endpoint_is_another_path() {
    let mut world = World::new(true, 1_420, 1_300);
    world.secs(10);
    assert!(world.path.limits(1_420).fits <= 1_300);
    world.endpoint = "[2001:db8::2]:7100".parse().unwrap();
    world.carries = Some(1_420);
    assert_eq!((world.secs(3), world.state()), (Limits::flat(1_420), PathState::Confirmed));
    world.most = 1_300;
    world.path.follow(world.endpoint, 1_300, world.now);
    assert_eq!(world.path.limits(1_300), Limits::flat(1_300));
    world.secs(1);
    world.path.forget(world.now);
    assert_eq!((world.path.limits(9_000), world.path.poll_timeout()), (Limits::flat(9_000), None), "not to be probed");
}

#[test]
fn answers_to_what_was_not_asked_mean_nothing() {
    let mut world = World::new(false, 1_420, 1_300);
    for number in [0, 1, 7, u32::MAX] {
        world.path.handle_answer(number, 1_420, world.now);
    }
    assert_eq!(world.state(), PathState::Unanswered);
    let limits = world.secs(10);
    // An answer from before the path shrank, late.
    world.path.handle_answer(0, 1_420, world.now);
    assert_eq!(world.path.limits(1_420), limits);
}

proptest! {
    #[test]
    fn the_search_ends_below_what_passes_and_recovers(
        v6 in any::<bool>(), most in 1_280..9_000u16, first in 516..9_000u16, second in 516..9_000u16, delay in 1..400u64,
    ) {
        let least = if v6 { BASE } else { LEAST_V4 };
        let mut world = World::new(v6, most, first.max(least));
        world.delay = Duration::from_millis(delay);
        for carries in [first, second] {
            let carries = carries.max(least);
            world.carries = Some(carries);
            // Long enough for a climb that was put off to the utmost.
            let limits = world.secs(600);
            prop_assert!(limits.fits <= carries, "{limits:?} of {carries}");
            prop_assert!(limits.fits + GRAIN >= carries.min(most), "{limits:?} of {carries}");
            prop_assert!(world.path.trial.is_none_or(|trial| trial.size == limits.fits) || world.path.searching);
        }
    }

    #[test]
    fn loss_makes_it_slower_but_not_wrong(seed in any::<u64>(), loss in 0..20u64, carries in 1_220..1_420u16) {
        let mut world = World::new(false, 1_420, carries);
        (world.state, world.loss_percent) = (seed, loss);
        world.secs(60);
        world.loss_percent = 0;
        let limits = world.secs(600);
        prop_assert!(limits.fits <= carries && limits.fits + GRAIN >= carries, "{limits:?} of {carries}");
    }
}
