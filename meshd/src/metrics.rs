//! Metrics in the text format of Prometheus, on a loopback address. Names and meaning: `docs/metrics.md`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use mesh_dataplane::Snapshot;
use mesh_dataplane::selfcheck::Class;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::api::is_post_quantum;
use crate::app::Node;
use crate::control::Rotations;
use crate::exchange::Counters;
use crate::psk;

/// Binds the address.
///
/// # Errors
/// The system refused.
pub(crate) async fn bind(listen: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(listen).await.with_context(|| format!("serve metrics on {listen}"))
}

/// Serves `/metrics` for ever.
///
/// # Errors
/// The listener broke.
pub(crate) async fn serve(node: Arc<Node>, listener: TcpListener) -> anyhow::Result<()> {
    let router = Router::new().route("/metrics", get(scrape)).with_state(node);
    axum::serve(listener, router).await.context("serve metrics")
}

async fn scrape(State(node): State<Arc<Node>>, headers: HeaderMap) -> Response {
    // A page in a browser on this host must not read them by a name of its own that leads here.
    if !headers.get(header::HOST).is_some_and(|host| is_loopback(host.as_bytes())) {
        return (StatusCode::FORBIDDEN, "metrics are served to this host only\n").into_response();
    }
    let seen = Seen::of(&node).await;
    let mut registry = Registry::default();
    registry.register_collector(Box::new(seen));
    let mut text = String::new();
    if encode(&mut text, &registry).is_err() {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
}

fn is_loopback(host: &[u8]) -> bool {
    let host = std::str::from_utf8(host).unwrap_or_default();
    let address =
        host.parse::<SocketAddr>().map(|address| address.ip()).or_else(|_| host.trim_matches(['[', ']']).parse());
    address.is_ok_and(|ip: std::net::IpAddr| ip.is_loopback()) || host.split(':').next() == Some("localhost")
}

/// All values of one moment.
#[derive(Debug, Default)]
struct Seen {
    snapshot: Snapshot,
    peers_known: u64,
    peers_up: u64,
    peers_post_quantum: u64,
    offers: psk::Counters,
    pods: u64,
    ready: bool,
    connected: bool,
    exposure_left: u64,
    sessions: u64,
    refused: u64,
    stale: bool,
    equivocations: u64,
    exchange: Counters,
    repairs: u64,
    host_refusals: u64,
    alarms: u64,
    key_epoch: u64,
    key_age: u64,
    key_due: Option<u64>,
    rotations: Rotations,
}

impl Seen {
    async fn of(node: &Node) -> Self {
        let snapshot = node.snapshot().await;
        let facts = node.facts();
        let report = node.control.report.borrow().clone();
        let host = node.host.report.borrow().clone();
        let now = Instant::now();
        let wall = crate::control::now().wall;
        let due = node.config.keys.due(facts.directory.own.node, facts.keys.current.0, facts.keys.promoted);
        let up = snapshot.peers.values().filter(|peer| peer.tunnels.iter().any(|tunnel| tunnel.confirmed)).count();
        Self {
            peers_known: facts.directory.peers.len() as u64,
            peers_up: up as u64,
            peers_post_quantum: snapshot.peers.values().filter(|peer| is_post_quantum(Some(peer))).count() as u64,
            offers: node.psk.counters(),
            pods: facts.pods.len() as u64,
            ready: node.ready.waiting_for().is_empty(),
            connected: report.transport.is_some(),
            exposure_left: report.status(now).exposure_left,
            sessions: report.sessions,
            refused: report.refused,
            stale: report.stale,
            equivocations: report.equivocations,
            exchange: report.exchange,
            repairs: host.repairs,
            host_refusals: host.refused.len() as u64,
            alarms: (report.alarms.len() + node.alarms.list(now).len()) as u64,
            key_epoch: facts.keys.current.0,
            key_age: wall.saturating_sub(facts.keys.promoted),
            key_due: due.map(|due| due.saturating_sub(wall)),
            rotations: report.rotations,
            snapshot,
        }
    }
}

impl Collector for Seen {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let to = &mut encoder;
        let gauges = [
            ("mesh_node_ready", "1 once everything is up", u64::from(self.ready)),
            ("mesh_node_alarms", "Alarms that somebody has to look at", self.alarms),
            ("mesh_control_connected", "1 while a control session is open", u64::from(self.connected)),
            (
                "mesh_directory_stale",
                "1 while a keyserver shows less than was seen, or two worlds",
                u64::from(self.stale),
            ),
            (
                "mesh_control_exposure_left_seconds",
                "Time until tunnels close without a new checkpoint",
                self.exposure_left,
            ),
            ("mesh_keys_current_epoch", "Epoch of the own key in use", self.key_epoch),
            ("mesh_keys_current_age_seconds", "Time since the own key in use was promoted", self.key_age),
            ("mesh_peers_known", "Members with a record", self.peers_known),
            ("mesh_peers_up", "Peers with a live session", self.peers_up),
            (
                "mesh_peers_post_quantum",
                "Peers that packets go to under a post-quantum preshared key",
                self.peers_post_quantum,
            ),
            ("mesh_pods_attached", "Leases of pods", self.pods),
            ("mesh_host_refused_steps", "Steps the kernel refuses at the moment", self.host_refusals),
        ];
        for (name, help, value) in gauges {
            gauge(to, name, help, value)?;
        }
        if let Some(due) = self.key_due {
            gauge(to, "mesh_keys_rotation_due_seconds", "Time until the schedule rotates the own key", due)?;
        }
        self.rotations(to)?;
        counter(to, "mesh_control_sessions", "Control sessions opened", self.sessions)?;
        counter(to, "mesh_directory_refused_objects", "Objects of the directory that were refused", self.refused)?;
        counter(
            to,
            "mesh_directory_equivocations",
            "Times that somebody was caught signing two truths",
            self.equivocations,
        )?;
        let Counters { received, dropped, objects } = self.exchange;
        counter(to, "mesh_exchange_received_datagrams", "Datagrams of other nodes that were read", received)?;
        counter(to, "mesh_exchange_dropped_datagrams", "Datagrams of other nodes that were not", dropped)?;
        counter(to, "mesh_exchange_accepted_objects", "Objects accepted from other nodes", objects)?;
        counter(to, "mesh_host_repairs", "Times something of ours was missing or changed on the host", self.repairs)?;
        let psk::Counters { made, accepted, strange, repeated, refused, dropped, kem } = self.offers;
        counter(to, "mesh_offers_made", "Key offers made", made)?;
        counter(to, "mesh_offers_accepted", "Key offers of peers that brought preshared keys", accepted)?;
        counter(to, "mesh_offers_repeated", "Key offers that came before", repeated)?;
        counter(to, "mesh_offers_strange", "Datagrams that look like key offers and are no peer's", strange)?;
        counter(to, "mesh_offers_refused", "Key offers of peers that cannot be used", refused)?;
        counter(to, "mesh_offers_dropped", "Key offers and wishes of lanes that found the queue full", dropped)?;
        counter(to, "mesh_offers_kem_operations", "ML-KEM-768 operations for key offers", kem)?;
        self.lanes(to)?;
        self.drops(to)
    }
}

impl Seen {
    fn lanes(&self, to: &mut DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        type Value = fn(&mesh_dataplane::command::LaneSnapshot) -> u64;
        let counters: [(&str, &str, Value); 12] = [
            ("mesh_dataplane_received_packets", "Inner packets received", |lane| lane.traffic.rx_packets),
            ("mesh_dataplane_received_bytes", "Their bytes", |lane| lane.traffic.rx_bytes),
            ("mesh_dataplane_sent_packets", "Inner packets sent", |lane| lane.traffic.tx_packets),
            ("mesh_dataplane_sent_bytes", "Their bytes", |lane| lane.traffic.tx_bytes),
            ("mesh_dataplane_handshake_messages", "Handshake messages with a right first MAC", |lane| lane.handshakes),
            ("mesh_dataplane_cookies_sent", "Cookie replies sent because of load", |lane| lane.cookies_sent),
            ("mesh_dataplane_events_lost", "Events not fetched in time", |lane| lane.events_lost),
            ("mesh_dataplane_strayed_packets", "Packets that came on another lane than their flow's", |lane| {
                lane.strayed_packets
            }),
            ("mesh_dataplane_crossed_packets", "Packets handed to lane 0", |lane| lane.crossed_packets),
            ("mesh_dataplane_black_holes", "Times that large packets were found to vanish on a path", |lane| {
                lane.black_holes
            }),
            ("mesh_dataplane_refused_super_packets", "Super-packets that the device refused", |lane| lane.refused_runs),
            ("mesh_dataplane_refused_trains", "Trains that the kernel refused", |lane| lane.socket.refused_trains),
        ];
        for (name, help, value) in counters {
            let constant = ConstCounter::new(0_u64);
            let mut family = to.encode_descriptor(name, help, None, constant.metric_type())?;
            for lane in &self.snapshot.lanes {
                let labels = [("lane", lane.lane.to_string())];
                ConstCounter::new(value(lane)).encode(family.encode_family(&labels)?)?;
            }
        }
        let gauges: [(&str, &str, Value); 3] = [
            ("mesh_dataplane_tunnels", "Tunnels", |lane| lane.tunnels as u64),
            ("mesh_dataplane_receive_buffer_bytes", "Receive buffer of the socket", |lane| {
                lane.socket.receive_buffer as u64
            }),
            ("mesh_dataplane_send_buffer_bytes", "Send buffer of the socket", |lane| lane.socket.send_buffer as u64),
        ];
        for (name, help, value) in gauges {
            let constant = ConstGauge::new(0_u64);
            let mut family = to.encode_descriptor(name, help, None, constant.metric_type())?;
            for lane in &self.snapshot.lanes {
                let labels = [("lane", lane.lane.to_string())];
                ConstGauge::new(value(lane)).encode(family.encode_family(&labels)?)?;
            }
        }
        self.offloads(to)
    }

    /// 1 for each kind that is on, on every lane.
    fn offloads(&self, to: &mut DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let constant = ConstGauge::new(0_u64);
        let help = "1 for each offload that is on, on every lane";
        let mut family = to.encode_descriptor("mesh_dataplane_offloads", help, None, constant.metric_type())?;
        for class in Class::ALL {
            let lanes = &self.snapshot.lanes;
            let on = !lanes.is_empty() && lanes.iter().all(|lane| class.is_on(lane.offloads, lane.socket.trains));
            ConstGauge::new(u64::from(on)).encode(family.encode_family(&[("offload", class.as_str())])?)?;
        }
        Ok(())
    }

    fn rotations(&self, to: &mut DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Rotations { operator, keyserver, schedule, clock, refused } = self.rotations;
        let constant = ConstCounter::new(0_u64);
        let help = "Rotations of the own keys, by cause";
        let mut family = to.encode_descriptor("mesh_keys_rotations", help, None, constant.metric_type())?;
        let causes = [("operator", operator), ("keyserver", keyserver), ("schedule", schedule), ("clock", clock)];
        for (cause, count) in causes {
            ConstCounter::new(count).encode(family.encode_family(&[("cause", cause)])?)?;
        }
        counter(to, "mesh_keys_refused_rotations", "Rotations asked for by the keyserver and refused", refused)
    }

    fn drops(&self, to: &mut DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let constant = ConstCounter::new(0_u64);
        let help = "Packets and datagrams dropped, by reason";
        let mut family = to.encode_descriptor("mesh_dataplane_dropped_packets", help, None, constant.metric_type())?;
        for (reason, count) in self.snapshot.drops.iter() {
            ConstCounter::new(count).encode(family.encode_family(&[("reason", reason.as_str())])?)?;
        }
        Ok(())
    }
}

fn gauge(to: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> Result<(), std::fmt::Error> {
    let value = ConstGauge::new(value);
    value.encode(to.encode_descriptor(name, help, None, value.metric_type())?)
}

fn counter(to: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> Result<(), std::fmt::Error> {
    let value = ConstCounter::new(value);
    value.encode(to.encode_descriptor(name, help, None, value.metric_type())?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn every_name_begins_with_mesh_and_no_peer_is_named() {
        let mut registry = Registry::default();
        let snapshot = Snapshot { lanes: vec![Default::default()], ..Snapshot::default() };
        registry.register_collector(Box::new(Seen { snapshot, ..Seen::default() }));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            assert!(line.starts_with("mesh_"), "{line}");
            assert!(!line.contains("peer="), "{line}");
        }
        for name in
            ["mesh_node_ready 0", "mesh_dataplane_dropped_packets_total{reason=", "mesh_control_sessions_total 0"]
        {
            assert!(text.contains(name), "{name} missing in\n{text}");
        }
    }

    #[test]
    fn only_names_of_this_host_are_served() {
        for host in ["127.0.0.1:7180", "127.0.0.1", "localhost:7180", "localhost", "[::1]:7180", "[::1]"] {
            assert!(is_loopback(host.as_bytes()), "{host}");
        }
        for host in ["evil.example", "evil.example:7180", "10.0.0.1:7180", "localhost.evil.example", "", "\u{ff}"] {
            assert!(!is_loopback(host.as_bytes()), "{host}");
        }
    }
}
