//! The configuration file: every key, its default, and what makes a value wrong.
//!
//! Parsing yields values that cannot be wrong, so that nobody checks twice. Unknown keys are refused with the line and the
//! nearest key that exists.

mod parse;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use mesh_dataplane::packet::dscp::Dscp;
use mesh_dataplane::selfcheck::Class;
use mesh_dataplane::tun::Wanted;
use mesh_protocol::local::{DEFAULT_SOCKET, DEFAULT_STATE_DIR, POD_LINK_GROUP};
use serde::{Deserialize, Serialize};

pub(crate) use parse::ConfigError;

use crate::control::ControlConfig;
use crate::identity::KeysConfig;

/// Lanes a node has at most.
pub(crate) const MAX_LANES: u8 = mesh_dataplane::lane::MAX_LANES as u8;
/// Where the configuration lies unless told otherwise.
pub(crate) const DEFAULT_PATH: &str = "/etc/mesh/meshd.toml";

/// The whole file. Defaults are those of [`Config::default`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// How Mesh relates to other CNI plugins.
    pub(crate) mode: Mode,
    /// Keys, directory, leases: 0700, owned by the user `meshd` runs as.
    pub(crate) state_dir: PathBuf,
    /// The local API's socket.
    pub(crate) socket: PathBuf,
    /// Group that may read through the socket. A group that does not exist leaves the socket to root alone.
    pub(crate) socket_group: String,
    /// How long running requests may take to end at SIGTERM.
    #[serde(with = "parse::duration")]
    pub(crate) shutdown_grace: Duration,
    /// TUN device and UDP port.
    pub(crate) device: DeviceConfig,
    /// Keyservers and own addresses.
    pub(crate) control: ControlConfig,
    /// When own keys rotate.
    pub(crate) keys: KeysConfig,
    /// Numbers that other programs on the host may use too.
    pub(crate) host: HostConfig,
    /// Logs.
    pub(crate) log: LogConfig,
    /// Metrics.
    pub(crate) metrics: MetricsConfig,
}

/// Who gives pods their addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Mode {
    /// Mesh does.
    Primary,
}

/// Section `[device]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct DeviceConfig {
    /// Name of the TUN device.
    pub(crate) name: String,
    /// Which kind of device.
    pub(crate) mode: DeviceMode,
    /// Offloads to do without, by name.
    #[serde(with = "parse::classes")]
    pub(crate) offloads_off: Vec<Class>,
    /// UDP port of lane 0; lane i has `port + i`.
    pub(crate) port: u16,
    /// Lanes; without it, as many as there are cores, see [`Config::lanes`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lanes: Option<u8>,
    /// Each lane stays on a core of its own.
    pub(crate) pin_lanes: bool,
    /// How long a busy lane looks for more before it sleeps; 0 never.
    #[serde(with = "parse::duration")]
    pub(crate) busy_poll: Duration,
    /// Class of service of what leaves on the lanes' ports.
    #[serde(with = "parse::dscp")]
    pub(crate) dscp: Dscp,
    /// Inner MTU in bytes; without it, it follows from the underlay's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mtu: Option<u16>,
}

/// Which kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DeviceMode {
    /// With offloads where the kernel has them; a plain device that is there stays plain.
    Auto,
    /// With offloads, or not at all.
    Offload,
    /// One packet at a time, on one lane.
    Plain,
}

impl From<DeviceMode> for Wanted {
    fn from(mode: DeviceMode) -> Self {
        match mode {
            DeviceMode::Auto => Self::Any,
            DeviceMode::Offload => Self::Fast,
            DeviceMode::Plain => Self::Plain,
        }
    }
}

/// Section `[host]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct HostConfig {
    /// Firewall mark of packets that the mesh rule passes over.
    pub(crate) mark: u32,
    /// Bits of the mark that are ours.
    pub(crate) mark_mask: u32,
    /// Routing table.
    pub(crate) table: u32,
    /// Preference of the ip rules that lead to it.
    pub(crate) rule_preference: u32,
    /// Protocol number of our routes and rules.
    pub(crate) route_protocol: u8,
    /// Group of the host ends of pod links.
    pub(crate) pod_link_group: u32,
    /// nftables table, in the family `inet`.
    pub(crate) nftables_table: String,
}

/// Section `[log]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct LogConfig {
    /// `error`, `warn`, `info`, `debug` or `trace`, or filters such as `info,meshd::host=debug`.
    pub(crate) level: String,
    /// How a line looks.
    pub(crate) format: LogFormat,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// For programs: one JSON object a line.
    Json,
}

/// Section `[metrics]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MetricsConfig {
    /// Loopback address to serve `/metrics` on; without it, none are served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) listen: Option<SocketAddr>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mode: Mode::Primary,
            state_dir: DEFAULT_STATE_DIR.into(),
            socket: DEFAULT_SOCKET.into(),
            socket_group: "mesh".into(),
            shutdown_grace: Duration::from_secs(5),
            device: DeviceConfig::default(),
            control: ControlConfig::default(),
            keys: KeysConfig::default(),
            host: HostConfig::default(),
            log: LogConfig::default(),
            metrics: MetricsConfig::default(),
        }
    }
}

impl Default for DeviceConfig {
    /// Port 7100 is clear of 51820, 51821 and 51871, which other CNIs use.
    fn default() -> Self {
        Self {
            name: "mesh0".into(),
            mode: DeviceMode::Auto,
            offloads_off: Vec::new(),
            port: 7100,
            lanes: None,
            pin_lanes: false,
            busy_poll: Duration::ZERO,
            dscp: Dscp::Clear,
            mtu: None,
        }
    }
}

impl Default for HostConfig {
    /// The mark's bit is clear of Calico's (0x40000) and Cilium's (0x1e00); preference 400 comes before other CNIs' rules.
    fn default() -> Self {
        Self {
            mark: 0x40,
            mark_mask: 0x40,
            table: 7100,
            rule_preference: 400,
            route_protocol: 71,
            pod_link_group: POD_LINK_GROUP,
            nftables_table: "mesh".into(),
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

impl Config {
    /// UDP ports of all lanes.
    pub(crate) fn ports(&self) -> std::ops::RangeInclusive<u16> {
        let port = self.device.port;
        port..=port.saturating_add(u16::from(self.lanes()).saturating_sub(1))
    }

    /// Lanes to have: as configured, else as many as this process may use cores, a power of two, at most 8. A plain device
    /// has one.
    pub(crate) fn lanes(&self) -> u8 {
        match (self.device.mode, self.device.lanes) {
            (DeviceMode::Plain, _) => 1,
            (_, Some(lanes)) => lanes,
            (_, None) => {
                let cores = std::thread::available_parallelism().map_or(1, usize::from);
                1 << cores.clamp(1, usize::from(MAX_LANES)).ilog2()
            }
        }
    }
}
