//! Packets that are counted while every node's keys rotate: in a ring of nodes, each sends to the next one.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use crate::capture::{Handshakes, new_marker};
use crate::mesh::{CLUSTERS, Mesh};
use crate::pod::Pod;
use crate::traffic::{Counts, Stream};
use crate::wait;

/// Payload of a datagram: small, so that the number of packets is what loads the nodes.
const PAYLOAD_BYTES: usize = 64;
/// How long each rate is tried when the full load is looked for.
const TRIAL: Duration = Duration::from_secs(2);
/// Rates tried, in packets a second over all nodes.
const RATES: [u32; 8] = [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000];
/// Packets of each stream on each pair of keys, however slow it is.
const LEAST_PACKETS: u64 = 5;
/// How long nodes may take over a rotation: tunnels are opened over two minutes at most.
const PATIENCE: Duration = Duration::from_secs(300);

/// How fast packets are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    /// One packet a second from each node.
    OnePerSecond,
    /// Half of the highest rate, in a doubling series, that passes without loss while nothing rotates: at the highest the
    /// machine's own noise loses some.
    Full,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// Nodes in the mesh.
    pub nodes: usize,
    /// `required` or `off`: post-quantum preshared keys.
    pub pq: String,
    /// Packets a second, over all nodes.
    pub per_second: u64,
    /// Rotations of every node.
    pub rotations: u32,
    /// Packets sent.
    pub sent: u64,
    /// Packets that never arrived.
    pub lost: u64,
    /// Packets that arrived twice.
    pub duplicated: u64,
    /// Longest time between two arrivals of one stream, in microseconds.
    pub longest_gap_micros: u64,
    /// The slowest rotation, from the command to the last tunnel on new keys, in milliseconds.
    pub slowest_rotation_millis: u64,
    /// Handshakes seen on the underlay.
    pub handshakes: usize,
    /// The median handshake, from the initiator's first datagram to the response, in microseconds.
    pub handshake_p50_micros: u64,
    /// The 99th of a hundred.
    pub handshake_p99_micros: u64,
}

/// A mesh with one pod on each node.
#[derive(Debug)]
pub struct Ring {
    mesh: Mesh,
    pods: Vec<Pod>,
    pq: String,
    epoch: u64,
}

impl Ring {
    /// Makes `count` nodes with `pq` (`off` or `required`) and waits until each reaches the next.
    ///
    /// # Errors
    /// If anything says no.
    pub fn new(count: usize, pq: &str) -> Result<Self> {
        ensure!((2..=200).contains(&count), "a ring has 2 to 200 nodes");
        let mut mesh = Mesh::new_with("ring", &["--pq", pq])?;
        let mut pods = Vec::new();
        for at in 0..count {
            let (name, (cluster, _)) = (format!("n{at}"), CLUSTERS[at % CLUSTERS.len()]);
            mesh.add_node(&name, cluster)?;
            let before = mesh.nodes.iter().take(at).map(|node| &node.node);
            mesh.lab.introduce(&mesh.node(&name).node, before.chain([mesh.keyserver_node()]))?;
            pods.push(mesh.pod(&name, "a")?);
        }
        mesh.wait_settled()?;
        let ring = Self { mesh, pods, pq: pq.to_owned(), epoch: 1 };
        for (from, to) in ring.pairs() {
            let netns = from.netns()?;
            wait::until_true("a pod reaches the next one", PATIENCE, || {
                Ok(!crate::traffic::ping(&netns, to.v4(), 1, new_marker())?.times.is_empty())
            })?;
        }
        Ok(ring)
    }

    fn pairs(&self) -> impl Iterator<Item = (&Pod, &Pod)> {
        self.pods.iter().zip(self.pods.iter().cycle().skip(1))
    }

    fn start(&self, per_node: u32) -> Result<Vec<Stream>> {
        let start = |(from, to): (&Pod, &Pod)| {
            Stream::start(&from.netns()?, &to.netns()?, to.v4(), per_node, u64::MAX, PAYLOAD_BYTES, new_marker())
        };
        self.pairs().map(start).collect()
    }

    /// Rotates all nodes `rotations` times while packets pass, and counts them.
    ///
    /// # Errors
    /// If a rotation does not end, or anything says no. Lost packets are no error: the line says so.
    pub fn measure(&mut self, rate: Rate, rotations: u32) -> Result<Line> {
        let per_node = match rate {
            Rate::OnePerSecond => 1,
            Rate::Full => self.full_load()?,
        };
        let handshakes = Handshakes::start(&self.mesh.lab)?;
        let streams = self.start(per_node)?;
        let wanted = u64::from(per_node).max(LEAST_PACKETS);
        self.until_arrived(&streams, wanted)?;
        let mut slowest = Duration::ZERO;
        for _ in 0..rotations {
            slowest = slowest.max(self.rotate()?);
            // Some packets on each pair of keys.
            let enough = streams.iter().map(Stream::arrived).min().unwrap_or(0) + wanted;
            self.until_arrived(&streams, enough)?;
        }
        let taken = handshakes.stop()?;
        let total = sum(streams)?;
        let at = |part: usize| taken.get(taken.len() * part / 100).map_or(0, |took| took.as_micros() as u64);
        Ok(Line {
            nodes: self.pods.len(),
            pq: self.pq.clone(),
            per_second: u64::from(per_node) * self.pods.len() as u64,
            rotations,
            sent: total.sent,
            lost: total.lost(),
            duplicated: total.duplicated,
            longest_gap_micros: total.longest_gap_micros,
            slowest_rotation_millis: slowest.as_millis() as u64,
            handshakes: taken.len(),
            handshake_p50_micros: at(50),
            handshake_p99_micros: at(99),
        })
    }

    /// The rate of each node that is [`Rate::Full`].
    fn full_load(&self) -> Result<u32> {
        let count = u32::try_from(self.pods.len())?;
        let mut best = None;
        for rate in RATES {
            let per_node = (rate / count).max(1);
            let streams = self.start(per_node)?;
            let begun = Instant::now();
            wait::until_true("the trial is over", TRIAL * 2, || Ok(begun.elapsed() >= TRIAL))?;
            let total = sum(streams)?;
            let kept_up = total.sent as f64 >= 0.9 * f64::from(per_node * count) * TRIAL.as_secs_f64();
            if total.lost() > 0 || !kept_up {
                break;
            }
            best = Some(per_node);
        }
        let best = best.context("packets are lost at the lowest rate, while nothing rotates")?;
        Ok((best / 2).max(1))
    }

    fn until_arrived(&self, streams: &[Stream], wanted: u64) -> Result<()> {
        wait::until_true("packets arrive on every pair", PATIENCE, || {
            Ok(streams.iter().all(|stream| stream.arrived() >= wanted))
        })
    }

    /// Rotates every node; how long it took until the last pair used the new keys.
    fn rotate(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        self.mesh.admin(&["keys", "rotate", "--force", "--wait", "5m"])?;
        self.epoch += 1;
        let mut waiting: Vec<usize> = (0..self.pods.len()).collect();
        wait::until_true("every pair uses the new keys", PATIENCE, || {
            let mut still = Vec::new();
            for at in &waiting {
                if !self.uses_new_keys(*at)? {
                    still.push(*at);
                }
            }
            waiting = still;
            Ok(waiting.is_empty())
        })?;
        Ok(begun.elapsed())
    }

    fn uses_new_keys(&self, at: usize) -> Result<bool> {
        let next = format!("n{}", (at + 1) % self.pods.len());
        let shown = self.mesh.node(&format!("n{at}")).ctl_json(&["keys", "status", "--local"])?;
        let peer = shown["peers"].as_array().into_iter().flatten().find(|peer| peer["name"] == *next);
        let peer = peer.with_context(|| format!("n{at} does not know {next}"))?;
        Ok(peer["local_epoch"] == self.epoch && peer["remote_epoch"] == self.epoch)
    }

    /// What the daemons wrote last, for a failure's report.
    #[must_use]
    pub fn logs(&self) -> String {
        self.mesh.logs()
    }
}

fn sum(streams: Vec<Stream>) -> Result<Counts> {
    let mut total = Counts::default();
    for counts in streams.into_iter().map(Stream::stop).collect::<Vec<_>>() {
        let counts = counts?;
        total.sent += counts.sent;
        total.received += counts.received;
        total.duplicated += counts.duplicated;
        total.reordered += counts.reordered;
        total.longest_gap_micros = total.longest_gap_micros.max(counts.longest_gap_micros);
    }
    Ok(total)
}

/// The lines as aligned text.
#[must_use]
pub fn table(lines: &[Line]) -> String {
    let mut text = format!(
        "{:>5}  {:>8}  {:>9}  {:>9}  {:>10}  {:>5}  {:>5}  {:>11}  {:>12}  {:>10}  {:>10}  {:>10}\n",
        "nodes",
        "pq",
        "packets/s",
        "rotations",
        "sent",
        "lost",
        "twice",
        "longest gap",
        "slowest rot.",
        "handshakes",
        "p50",
        "p99"
    );
    let millis = |micros: u64| format!("{:.1} ms", micros as f64 / 1000.0);
    for line in lines {
        let _ = writeln!(
            text,
            "{:>5}  {:>8}  {:>9}  {:>9}  {:>10}  {:>5}  {:>5}  {:>11}  {:>9} ms  {:>10}  {:>10}  {:>10}",
            line.nodes,
            line.pq,
            line.per_second,
            line.rotations,
            line.sent,
            line.lost,
            line.duplicated,
            millis(line.longest_gap_micros),
            line.slowest_rotation_millis,
            line.handshakes,
            millis(line.handshake_p50_micros),
            millis(line.handshake_p99_micros)
        );
    }
    text
}
