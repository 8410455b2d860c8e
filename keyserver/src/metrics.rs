//! What the keyserver counts, and the loopback page that shows it.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

/// Every number.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) sessions: Gauge,
    pub(crate) revision: Gauge,
    pub(crate) alarms: Gauge,
    pub(crate) connections: Gauge,
    pub(crate) waiting: Gauge,
    pub(crate) joins: Counter,
    pub(crate) refused_joins: Counter,
    pub(crate) records: Counter,
    pub(crate) refused_publications: Counter,
    pub(crate) equivocations: Counter,
    pub(crate) revocations: Counter,
    pub(crate) handshakes: Counter,
    pub(crate) failed_handshakes: Counter,
    pub(crate) turned_away: Counter,
    pub(crate) store_errors: Counter,
    pub(crate) commit_seconds: Histogram,
}

impl Metrics {
    /// All of them, in a registry.
    pub(crate) fn new() -> (Arc<Self>, Registry) {
        let metrics = Self {
            sessions: Gauge::default(),
            revision: Gauge::default(),
            alarms: Gauge::default(),
            connections: Gauge::default(),
            waiting: Gauge::default(),
            joins: Counter::default(),
            refused_joins: Counter::default(),
            records: Counter::default(),
            refused_publications: Counter::default(),
            equivocations: Counter::default(),
            revocations: Counter::default(),
            handshakes: Counter::default(),
            failed_handshakes: Counter::default(),
            turned_away: Counter::default(),
            store_errors: Counter::default(),
            commit_seconds: Histogram::new(exponential_buckets(0.000_25, 2.0, 14)),
        };
        let mut registry = Registry::default();
        metrics.register(registry.sub_registry_with_prefix("mesh_keyserver"));
        (Arc::new(metrics), registry)
    }

    fn register(&self, registry: &mut Registry) {
        registry.register("sessions", "Nodes connected", self.sessions.clone());
        registry.register("revision", "Changes in the history of the directory", self.revision.clone());
        registry.register("alarms", "Things somebody has to look at, see meshctl status", self.alarms.clone());
        registry.register("connections", "Connections open, finished handshake or not", self.connections.clone());
        registry.register("waiting", "Nodes that wait for an issuer elsewhere", self.waiting.clone());
        registry.register("joins", "Nodes enrolled", self.joins.clone());
        registry.register("refused_joins", "Requests to enrol that were refused", self.refused_joins.clone());
        registry.register("records", "Records of nodes stored", self.records.clone());
        let refused = self.refused_publications.clone();
        registry.register("refused_publications", "Records and endpoints that were refused", refused);
        registry.register("equivocations", "Two signed truths where one can be", self.equivocations.clone());
        registry.register("revocations", "Nodes revoked", self.revocations.clone());
        registry.register("handshakes", "TLS handshakes that succeeded", self.handshakes.clone());
        registry.register("failed_handshakes", "TLS handshakes that failed", self.failed_handshakes.clone());
        registry.register("turned_away", "Connections closed by a limit before a handshake", self.turned_away.clone());
        registry.register("store_errors", "Writes that the store refused", self.store_errors.clone());
        registry.register("commit_seconds", "Time of one store transaction", self.commit_seconds.clone());
    }
}

/// Serves the page until cancelled.
pub(crate) async fn serve(address: SocketAddr, registry: Registry) -> std::io::Result<()> {
    let registry = Arc::new(registry);
    let page = move || std::future::ready(render(&registry));
    let router = Router::new().route("/metrics", get(page));
    axum::serve(TcpListener::bind(address).await?, router).await
}

fn render(registry: &Registry) -> Response {
    let mut text = String::new();
    match encode(&mut text, registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
