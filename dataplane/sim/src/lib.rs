//! Lanes of the data plane on a virtual link with a virtual clock.
//!
//! Every node is one [`Lane`]: the code that a thread drives between a TUN queue and a socket is driven here by a heap
//! of datagrams on their way. The link loses, delays and reorders by a seeded generator, so a failing run comes again
//! with its seed. Hours pass in milliseconds: boringtun's own clock is replaced too (`mock-instant`; it is per thread,
//! so tests run in parallel).
//!
//! ```no_run
//! use mesh_dataplane_sim::{Sim, millis, secs};
//!
//! let mut sim = Sim::seeded(7).nodes(2).delay(millis(20));
//! sim.send(0, 1);
//! sim.advance(secs(1));
//! assert_eq!(sim.received(1).len(), 1);
//! ```

mod control;
mod link;
mod node;

use std::time::Duration;

use boringtun as _;
use mesh_dataplane::{
    clock::Instant,
    command::{Event, PeerSnapshot},
    drop_reason::DropReason,
    table::PeerId,
    udp::Ends,
};
use mock_instant::MockClock;

pub use control::{Control, OFFER};
pub use link::{Link, Sent};
pub use node::{Node, packet};

/// So many milliseconds.
pub const fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// So many seconds.
pub const fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// So many minutes.
pub const fn minutes(count: u64) -> Duration {
    Duration::from_secs(count * 60)
}

/// A stream of numbered packets from one node to another.
#[derive(Debug, Clone, Copy)]
pub struct Flow {
    from: usize,
    to: usize,
    every: Duration,
    next: Instant,
    /// Packets sent so far.
    pub sent: u32,
}

/// Nodes, the link between them, and the time.
#[derive(Debug)]
pub struct Sim {
    now: Instant,
    nodes: Vec<Node>,
    /// The network: everyone reaches everyone.
    pub link: Link,
    flows: Vec<Flow>,
    seed: u64,
}

impl Sim {
    /// An empty network; the same seed gives the same run.
    pub fn seeded(seed: u64) -> Self {
        // Far from zero, so that nothing takes "never" for "just now".
        let now = Instant::from_start(secs(10_000));
        Self { now, nodes: Vec::new(), link: Link::seeded(seed), flows: Vec::new(), seed }
    }

    /// Adds `count` nodes of one lane that know each other.
    pub fn nodes(self, count: usize) -> Self {
        self.nodes_with_lanes(&vec![1; count])
    }

    /// Adds nodes of so many lanes that know each other.
    pub fn nodes_with_lanes(mut self, lanes: &[usize]) -> Self {
        for lanes in lanes {
            self.nodes.push(Node::new(self.nodes.len(), *lanes, self.seed, self.now));
        }
        self.publish_all();
        self
    }

    /// Makes all pairs of nodes agree on a preshared key for each tunnel.
    pub fn agreed(mut self) -> Self {
        for node in &mut self.nodes {
            node.agreed = true;
        }
        self.publish_all();
        self
    }

    /// Sets the one-way delay.
    pub fn delay(mut self, delay: Duration) -> Self {
        self.link.delay = delay;
        self
    }

    /// Sets the share of datagrams that are lost, in percent.
    pub fn loss(mut self, percent: u64) -> Self {
        self.link.loss_percent = percent;
        self
    }

    /// Sets by how much datagrams are delayed at random on top, which reorders them.
    pub fn jitter(mut self, jitter: Duration) -> Self {
        self.link.jitter = jitter;
        self
    }

    /// The time.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// One node.
    pub fn node(&self, number: usize) -> &Node {
        &self.nodes[number]
    }

    /// One node, to change it; call [`publish`](Self::publish) afterwards to give tables to those concerned.
    pub fn node_mut(&mut self, number: usize) -> &mut Node {
        &mut self.nodes[number]
    }

    /// Gives node `number` a table made of what all nodes are now.
    pub fn publish(&mut self, number: usize) {
        let table = self.nodes[number].table(&self.nodes);
        self.nodes[number].set_table(table, self.now);
        self.drain(number);
    }

    /// Gives every node a table.
    pub fn publish_all(&mut self) {
        for number in 0..self.nodes.len() {
            self.publish(number);
        }
    }

    /// Promotes the spare key of a node. The node itself uses it at once; the others learn of it when
    /// [`publish`](Self::publish)ed to.
    pub fn rotate_key(&mut self, number: usize) {
        self.nodes[number].promote_key();
        self.publish(number);
    }

    /// Starts a node anew: same keys, no tunnels.
    pub fn restart(&mut self, number: usize) {
        self.nodes[number].restart(self.now);
        self.publish(number);
    }

    /// Starts a node anew with another number of lanes.
    pub fn restart_with_lanes(&mut self, number: usize, lanes: usize) {
        self.nodes[number].change_lanes(lanes);
        self.restart(number);
    }

    /// Sends one packet; returns its number.
    pub fn send(&mut self, from: usize, to: usize) -> u32 {
        let number = self.nodes[from].next_number();
        let packet = node::packet(from, to, number);
        self.send_packet(from, &packet);
        number
    }

    /// Hands a node a packet of your own making.
    pub fn send_packet(&mut self, from: usize, packet: &[u8]) {
        self.nodes[from].handle_packet(packet, self.now);
        self.drain(from);
    }

    /// Hands a node a datagram as if it had arrived from the network.
    pub fn inject(&mut self, to: usize, datagram: &[u8], source: std::net::SocketAddr) {
        self.inject_to(to, 0, datagram, source);
    }

    /// The same for a lane other than the first.
    pub fn inject_to(&mut self, to: usize, lane: usize, datagram: &[u8], source: std::net::SocketAddr) {
        self.nodes[to].handle_datagram(lane, source.into(), datagram, self.now);
        self.drain(to);
    }

    /// Begins a stream of packets, one each `every`.
    pub fn flow(&mut self, from: usize, to: usize, every: Duration) -> usize {
        self.flows.push(Flow { from, to, every, next: self.now, sent: 0 });
        self.flows.len() - 1
    }

    /// Ends a stream; how many packets it sent.
    pub fn end_flow(&mut self, flow: usize) -> u32 {
        self.flows[flow].next = Instant::from_start(Duration::MAX);
        self.flows[flow].sent
    }

    /// A node begins a handshake.
    pub fn initiate(&mut self, from: usize, to: usize) {
        self.nodes[from].initiate(PeerId(to as u32), self.now);
        self.drain(from);
    }

    /// Lets time pass.
    pub fn advance(&mut self, time: Duration) -> &mut Self {
        let end = self.now + time;
        while let Some(at) = self.next_event().filter(|at| *at <= end) {
            self.set_time(at);
            self.run_due();
        }
        self.set_time(end);
        self
    }

    /// Lets time pass without anybody noticing: a suspended machine, threads that get no processor.
    pub fn freeze(&mut self, time: Duration) {
        self.set_time(self.now + time);
    }

    /// Numbers of the packets that a node received, in order of arrival.
    pub fn received(&self, number: usize) -> &[u32] {
        self.nodes[number].received()
    }

    /// What a node knows of another.
    pub fn peer(&self, number: usize, other: usize) -> Option<PeerSnapshot> {
        self.nodes[number].peer(PeerId(other as u32), self.now)
    }

    /// How often a node dropped something for this reason.
    pub fn drops(&self, number: usize, reason: DropReason) -> u64 {
        self.nodes[number].drops(reason)
    }

    /// Takes what happened on a node since the last call.
    pub fn events(&mut self, number: usize) -> Vec<Event> {
        self.nodes[number].take_events()
    }

    /// Panics, naming the seed, unless exactly the numbers `0..sent` arrived, each once.
    pub fn assert_all_arrived(&self, number: usize, sent: u32) {
        let mut got = self.received(number).to_vec();
        got.sort_unstable();
        let seed = self.seed;
        let lost: Vec<u32> = (0..sent).filter(|n| got.binary_search(n).is_err()).take(20).collect();
        assert!(lost.is_empty(), "seed {seed}: lost {lost:?}, {} of {sent} arrived", got.len());
        assert_eq!(got.len(), sent as usize, "seed {seed}: some arrived twice");
    }

    fn next_event(&self) -> Option<Instant> {
        let timers = self.nodes.iter().filter_map(Node::poll_timeout);
        let flows = self.flows.iter().map(|flow| flow.next);
        timers.chain(flows).chain(self.link.next()).min().map(|at| at.max(self.now))
    }

    fn run_due(&mut self) {
        while let Some(sent) = self.link.pop(self.now) {
            let mut lanes = self.nodes.iter().map(|node| node.lane_at(sent.to)).enumerate();
            if let Some((to, lane)) = lanes.find_map(|(to, lane)| lane.map(|lane| (to, lane))) {
                let ends = Ends { remote: sent.from, local: Some(sent.to.ip()) };
                self.nodes[to].handle_datagram(lane, ends, &sent.bytes, self.now);
                self.drain(to);
            }
        }
        for number in 0..self.nodes.len() {
            if self.nodes[number].poll_timeout().is_some_and(|at| at <= self.now) {
                self.nodes[number].handle_timeout(self.now);
                self.drain(number);
            }
        }
        for n in 0..self.flows.len() {
            let flow = self.flows[n];
            if flow.next <= self.now {
                self.flows[n].next = flow.next + flow.every;
                self.flows[n].sent += 1;
                self.send(flow.from, flow.to);
            }
        }
    }

    fn drain(&mut self, number: usize) {
        for (lane, to, bytes) in self.nodes[number].take_datagrams() {
            // A source that it has no more is refused by the system; then it is sent from another.
            let from = self.nodes[number].source(lane, to.ends.local);
            let (to, dont_fragment) = (to.ends.remote, to.dont_fragment);
            self.link.send(Sent { from, to, bytes, dont_fragment }, self.now);
        }
    }

    fn set_time(&mut self, at: Instant) {
        MockClock::advance(at.since(self.now));
        self.now = self.now.max(at);
    }
}
