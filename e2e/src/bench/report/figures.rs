//! Which figures are shown, under which names, and which way is better.

/// A figure of a test.
#[derive(Debug, Clone, Copy)]
pub(super) struct Figure {
    pub(super) test: &'static str,
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    pub(super) better: Better,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Better {
    More,
    Less,
}

use Better::{Less, More};

/// In the order they are shown.
pub(super) const FIGURES: &[Figure] = &[
    figure("tcp1", "mbit_per_second", "TCP 1 stream, Mbit/s", More),
    figure("tcp1", "machine_cpu_s_per_gb", "machine CPU s/GB, 1 stream", Less),
    figure("tcp1", "daemon_cpu_s_per_gb", "daemons' CPU s/GB, 1 stream", Less),
    figure("tcp4", "mbit_per_second", "TCP 4 streams, Mbit/s", More),
    figure("tcp4", "machine_cpu_s_per_gb", "machine CPU s/GB, 4 streams", Less),
    figure("tcp4", "daemon_cpu_s_per_gb", "daemons' CPU s/GB, 4 streams", Less),
    figure("rr", "per_second", "request/response, 1/s", More),
    figure("rr", "p99_us", "request/response p99, us", Less),
    figure("rr", "machine_cpu_us_per_exchange", "machine CPU us/exchange", Less),
    figure("rr", "daemon_cpu_us_per_exchange", "daemons' CPU us/exchange", Less),
    figure("ping", "idle_p50_us", "idle ping p50, us", Less),
    figure("ping", "idle_p99_us", "idle ping p99, us", Less),
    figure("ping", "flood_p50_us", "back-to-back ping p50, us", Less),
    figure("ping", "flood_p99_us", "back-to-back ping p99, us", Less),
    figure("udp1400", "packets_per_second", "UDP 1400 B, <= 1 % lost, packets/s", More),
    figure("udp1400", "flood_per_second", "UDP 1400 B, open tap, packets/s", More),
    figure("udp64", "packets_per_second", "UDP 64 B, <= 1 % lost, packets/s", More),
    figure("udp64", "flood_per_second", "UDP 64 B, open tap, packets/s", More),
    figure("start", "first_packet_ms", "first packet, ms", Less),
    figure("start", "start_ms", "start to first packet, ms", Less),
    figure("start", "rss_idle_mib", "RSS idle, MiB", Less),
    figure("start", "rss_loaded_mib", "RSS loaded, MiB", Less),
    figure("peers", "1000_configure_s", "1,000 peers: configure, s", Less),
    figure("peers", "1000_rss_mib", "1,000 peers: RSS, MiB", Less),
    figure("peers", "1000_idle_cpu_percent", "1,000 peers: idle CPU, %", Less),
    figure("peers", "1000_mbit_per_second", "1,000 peers: TCP, Mbit/s", More),
    figure("peers", "10000_configure_s", "10,000 peers: configure, s", Less),
    figure("peers", "10000_rss_mib", "10,000 peers: RSS, MiB", Less),
    figure("peers", "10000_idle_cpu_percent", "10,000 peers: idle CPU, %", Less),
    figure("peers", "10000_mbit_per_second", "10,000 peers: TCP, Mbit/s", More),
];

const fn figure(test: &'static str, name: &'static str, title: &'static str, better: Better) -> Figure {
    Figure { test, name, title, better }
}
