//! `keyserver.toml`: unknown keys are refused, every key has a default, durations are written as `"25s"`.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_protocol::admin;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where a keyserver keeps everything, unless told otherwise.
pub(crate) const DEFAULT_DIR: &str = "/etc/mesh-keyserver";
/// UDP (QUIC) and TCP (TLS).
pub(crate) const DEFAULT_PORT: u16 = 7443;

/// Addresses of a keyserver: with the longest names they take 2 KiB of a join token.
const MAX_ADDRESSES: usize = 8;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {reason}")]
pub(crate) struct ConfigError {
    place: String,
    reason: String,
}

/// A keyserver's settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// Holds keys and store.
    pub(crate) dir: PathBuf,
    /// Addresses to listen on: UDP for QUIC and TCP for TLS each.
    pub(crate) listen: Vec<SocketAddr>,
    /// Addresses under which nodes reach this keyserver, `host:port`; they go into join tokens.
    pub(crate) addresses: Vec<String>,
    /// Unix socket for operators.
    pub(crate) admin_socket: PathBuf,
    /// Loopback address for metrics; absent: none.
    pub(crate) metrics_listen: Option<SocketAddr>,
    /// How long a grant lasts; it is renewed after two thirds of that.
    #[serde(serialize_with = "write_duration", deserialize_with = "read_duration")]
    pub(crate) grant_life: Duration,
    /// How much is logged.
    pub(crate) log_level: LogLevel,
    /// In which form.
    pub(crate) log_format: LogFormat,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogLevel {
    /// Someone must act.
    Error,
    /// Recovered, or tries again.
    Warn,
    /// Life of nodes and policies.
    Info,
    /// Decisions.
    Debug,
    /// Everything.
    Trace,
}

/// In which form it is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// A line for people.
    Text,
    /// A line of JSON.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            dir: DEFAULT_DIR.into(),
            listen: vec![SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), DEFAULT_PORT)],
            addresses: Vec::new(),
            admin_socket: admin::DEFAULT_SOCKET.into(),
            metrics_listen: None,
            grant_life: Duration::from_secs(90 * 86_400),
            log_level: LogLevel::Info,
            log_format: LogFormat::Text,
        }
    }
}

impl Config {
    /// Reads and checks a file.
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        let error = |reason: String| ConfigError { place: path.display().to_string(), reason };
        let text = std::fs::read_to_string(path).map_err(|cause| error(cause.to_string()))?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Parses and checks text that came from `file`.
    pub(crate) fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            ConfigError { place: format!("{file}:{line}"), reason: error.message().to_owned() }
        })?;
        config.check().map_err(|(key, reason)| {
            let line = text.lines().position(|line| line.trim_start().starts_with(key));
            let place = line.map_or_else(|| file.to_owned(), |line| format!("{file}:{}", line + 1));
            ConfigError { place, reason: format!("{key}: {reason}") }
        })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.listen.is_empty() || self.listen.iter().any(|address| address.port() == 0) {
            return Err(("listen", "at least one address with a port other than 0".to_owned()));
        }
        if self.addresses.len() > MAX_ADDRESSES {
            return Err(("addresses", format!("at most {MAX_ADDRESSES}: they have to fit into a join token")));
        }
        if let Some(bad) = self.addresses.iter().find_map(|address| check_address(address).err()) {
            return Err(("addresses", bad));
        }
        if self.metrics_listen.is_some_and(|address| !address.ip().is_loopback()) {
            return Err(("metrics_listen", "metrics are served on a loopback address only".to_owned()));
        }
        if self.grant_life < Duration::from_secs(3600) {
            return Err(("grant_life", "grants last an hour at least".to_owned()));
        }
        Ok(())
    }

    /// The folder of the keys.
    pub(crate) fn keys_dir(&self) -> PathBuf {
        self.dir.join("keys")
    }

    /// The store's file.
    pub(crate) fn store_path(&self) -> PathBuf {
        self.dir.join("store.redb")
    }
}

/// Checks `host:port`.
///
/// # Errors
/// Words for people.
pub(crate) fn check_address(address: &str) -> Result<(), String> {
    let wrong = || format!("'{address}' is not host:port");
    if address.parse::<Ipv6Addr>().is_ok() {
        return Err(format!("{}: an IPv6 address is written [{address}]:{DEFAULT_PORT}", wrong()));
    }
    if !address.contains(':') || address.ends_with(']') {
        return Err(format!("{}: the port is missing, as in {address}:{DEFAULT_PORT}", wrong()));
    }
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host_is_good = match bare {
        Some(v6) => v6.parse::<Ipv6Addr>().is_ok(),
        None => !host.is_empty() && !host.contains([':', '/', ' ', '[', ']']) && host.len() <= 253,
    };
    let port_is_good = port.parse::<u16>().is_ok_and(|port| port != 0);
    if host_is_good && port_is_good { Ok(()) } else { Err(wrong()) }
}

/// The commented file that `init` writes: what differs from the defaults is set.
pub(crate) fn template(dir: &Path, address: &str) -> String {
    let port = address.rsplit_once(':').map_or("7443", |(_, port)| port);
    let listen = if port == "7443" { "#listen".to_owned() } else { "listen".to_owned() };
    let quoted = |text: &str| toml::Value::from(text).to_string();
    format!(
        r#"# Configuration of keyserver. A line `#key = value` shows the default.

# Holds keys and store.
dir = {dir}

# UDP for QUIC and TCP for TLS, each on these addresses.
{listen} = ["[::]:{port}"]

# Addresses under which nodes reach this keyserver. They go into join tokens.
addresses = [{address}]

# Unix socket for operators (meshctl), for this user only.
#admin_socket = "{socket}"

# Loopback address for metrics (Prometheus text). None unless set.
#metrics_listen = "127.0.0.1:7444"

# How long a grant lasts. It is renewed by itself after two thirds of that.
#grant_life = "90d"

# error, warn, info, debug or trace; text or json.
#log_level = "info"
#log_format = "text"
"#,
        dir = quoted(&dir.display().to_string()),
        address = quoted(address),
        socket = admin::DEFAULT_SOCKET,
    )
}

fn read_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(|error| serde::de::Error::custom(format!("'{text}': {error}")))
}

fn write_duration<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_duration(*duration))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn refused(text: &str) -> String {
        Config::parse(text, "k.toml").unwrap_err().to_string()
    }

    #[test]
    fn the_template_parses_and_its_comments_are_the_defaults() {
        let text = template(Path::new(DEFAULT_DIR), "keys.example.net:7443");
        let config = Config::parse(&text, "k.toml").unwrap();
        assert_eq!(config, Config { addresses: vec!["keys.example.net:7443".into()], ..Config::default() });
        let uncommented =
            text.replace("#metrics_listen", "# metrics_listen").replace("\n#", "\n").replace("\n ", "\n# ");
        let prose = |line: &&str| line.contains(" = ") && !line.starts_with('#');
        let set: Vec<&str> = uncommented.lines().filter(prose).collect();
        assert_eq!(Config::parse(&set.join("\n"), "k.toml").unwrap(), config);
        let other = Config::parse(&template(Path::new("/x y"), "[fd00::1]:99"), "k.toml").unwrap();
        assert_eq!((other.dir, other.listen[0].port()), ("/x y".into(), 99));
    }

    #[test]
    fn the_shipped_file_shows_every_key_and_the_defaults() {
        let shipped = include_str!("../../configs/keyserver.toml");
        assert_eq!(Config::parse(shipped, "k.toml").unwrap(), Config::default());
        let is_key = |line: &&str| line.starts_with(|first: char| first.is_ascii_lowercase());
        let keys = shipped.lines().filter_map(|line| line.strip_prefix('#').filter(is_key).or(Some(line)));
        let mut shown = Config::parse(&keys.collect::<Vec<_>>().join("\n"), "k.toml").unwrap();
        for key in toml::Table::try_from(&shown).unwrap().keys() {
            assert!(shipped.contains(&format!("\n#{key} = ")), "{key} is missing");
        }
        // Absent by default: the file shows an example.
        assert!(shown.metrics_listen.take().is_some());
        assert_eq!(shown, Config::default());
    }

    #[test]
    fn addresses_are_a_host_and_a_port() {
        for good in ["a:1", "keys.example.net:7443", "192.0.2.1:7443", "[fd00::1]:7443", "[::1]:1"] {
            assert_eq!(check_address(good), Ok(()), "{good}");
        }
        for (bad, hint) in [
            ("fd00::1", "written [fd00::1]:7443"),
            ("[fd00::1]", "port is missing, as in [fd00::1]:7443"),
            ("keys.example.net", "port is missing, as in keys.example.net:7443"),
            ("fd00::1:7443", "written [fd00::1:7443]:7443"),
            ("a:0", "not host:port"),
            ("a:65536", "not host:port"),
            (":7443", "not host:port"),
            ("[a]:7443", "not host:port"),
            ("a b:7443", "not host:port"),
            ("", "not host:port"),
        ] {
            let error = check_address(bad).unwrap_err();
            assert!(error.contains(hint), "{error}");
        }
        let many = ["\"a:1\""; MAX_ADDRESSES + 1].join(",");
        assert!(refused(&format!("addresses = [{many}]")).starts_with("k.toml:1: addresses: at most 8"));
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        assert!(refused("\nlisen = []").starts_with("k.toml:2: unknown field `lisen`"));
        assert!(refused("listen = [\"[::]:0\"]").starts_with("k.toml:1: listen:"));
        assert!(refused("addresses = [\"host\"]").contains("'host' is not host:port"));
        assert!(refused("metrics_listen = \"0.0.0.0:1\"").contains("loopback"));
        assert!(refused("log_level = \"info\"\ngrant_life = \"1x\"").starts_with("k.toml:2:"));
        assert!(refused("dir = 1").contains("k.toml:1"));
        assert!(refused("dir = \"a\"\ndir = \"b\"").contains("duplicate key"));
    }
}
