//! From text to a [`Config`], with errors an operator can act on.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Config, MAX_LANES};
use crate::identity::{LONGEST, SHORTEST};

/// The longest `busy_poll`.
const MAX_BUSY_POLL: Duration = Duration::from_millis(1);
/// Longest configuration file, in bytes.
const MAX_BYTES: u64 = 1024 * 1024;

/// A configuration was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ConfigError {
    /// The file cannot be read.
    #[error("read {}: {cause}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// It is no TOML, or a key or value is wrong.
    #[error("{}:{line}: {message}", path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// A value cannot be used.
    #[error("{}: {key} = {value}: {reason}", path.display())]
    Value {
        /// Which.
        path: PathBuf,
        /// Key with its section.
        key: &'static str,
        /// What it is.
        value: String,
        /// Why that does not do.
        reason: &'static str,
    },
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// Any [`ConfigError`].
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |cause| ConfigError::Read { path: path.to_owned(), cause };
        let metadata = std::fs::metadata(path).map_err(unreadable)?;
        if !metadata.is_file() || metadata.len() > MAX_BYTES {
            return Err(unreadable(io::Error::other("not a regular file of at most 1 MiB")));
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        Self::parse(&text, path)
    }

    /// Reads the file at `path`, or the defaults if it is the default one and not there.
    ///
    /// # Errors
    /// Any [`ConfigError`].
    pub(crate) fn load_or_default(path: &Path) -> Result<Self, ConfigError> {
        match Self::load(path) {
            Err(ConfigError::Read { cause, .. })
                if cause.kind() == io::ErrorKind::NotFound && path == Path::new(super::DEFAULT_PATH) =>
            {
                Ok(Self::default())
            }
            other => other,
        }
    }

    /// Checks text; `path` is for messages.
    ///
    /// # Errors
    /// Any [`ConfigError`] but [`ConfigError::Read`].
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| syntax(text, path, &error))?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let refuse = |key, value: &dyn std::fmt::Display, reason| {
            Err(ConfigError::Value { path: path.to_owned(), key, value: value.to_string(), reason })
        };
        let (device, host) = (&self.device, &self.host);
        if mesh_hostnet::link::check_name(&device.name).is_err() || device.name == "lo" {
            return refuse("device.name", &device.name, "a link name has 1 to 15 bytes without slash, colon or space");
        }
        if device.port == 0 {
            return refuse("device.port", &device.port, "peers have to know the port: 1 to 65535");
        }
        if let Some(lanes) = device.lanes.filter(|lanes| !lanes.is_power_of_two() || *lanes > MAX_LANES) {
            return refuse("device.lanes", &lanes, "1, 2, 4 or 8: a flow's lane is a part of a hash");
        }
        if device.port.checked_add(u16::from(self.lanes()) - 1).is_none() {
            return refuse(
                "device.port",
                &device.port,
                "each lane has a port of its own, and there is none above 65535",
            );
        }
        if device.busy_poll > MAX_BUSY_POLL {
            return refuse(
                "device.busy_poll",
                &humantime::format_duration(device.busy_poll),
                "at most 1ms: beyond, a lane is busy without end",
            );
        }
        if device.mtu.is_some_and(|mtu| !(1280..=65_000).contains(&mtu)) {
            return refuse("device.mtu", &device.mtu.unwrap_or_default(), "IPv6 needs 1280; at most 65000");
        }
        if host.mark == 0 || host.mark & host.mark_mask != host.mark {
            return refuse(
                "host.mark",
                &format!("{:#x}", host.mark),
                "must have a bit, and only bits of host.mark_mask",
            );
        }
        if matches!(host.table, 0 | 253..=255) {
            return refuse("host.table", &host.table, "0 and 253 to 255 are the kernel's own: choose a free one");
        }
        if !(1..32_766).contains(&host.rule_preference) {
            return refuse("host.rule_preference", &host.rule_preference, "must be between 1 and 32765");
        }
        if host.route_protocol < 5 {
            return refuse(
                "host.route_protocol",
                &host.route_protocol,
                "0 to 4 are the kernel's own: choose a free one",
            );
        }
        if host.pod_link_group == 0 {
            return refuse("host.pod_link_group", &host.pod_link_group, "0 is the group of every other link");
        }
        let word = |text: &str| {
            !text.is_empty()
                && text.len() <= 100
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
        };
        if !word(&host.nftables_table) {
            return refuse("host.nftables_table", &host.nftables_table, "letters, digits, - and _ only");
        }
        if !self.state_dir.is_absolute() {
            return refuse("state_dir", &self.state_dir.display(), "must be an absolute path");
        }
        if !self.socket.is_absolute() || self.socket.as_os_str().len() > 107 {
            return refuse("socket", &self.socket.display(), "must be an absolute path of at most 107 bytes");
        }
        if let Some(listen) = self.metrics.listen.filter(|listen| !listen.ip().is_loopback()) {
            return refuse("metrics.listen", &listen, "metrics are served on loopback only");
        }
        if let Some(every) = self.keys.rotate_every.filter(|every| !(SHORTEST..=LONGEST).contains(every)) {
            let value = humantime::format_duration(every);
            return refuse("keys.rotate_every", &value, "an hour to a year, or \"off\"");
        }
        if self.log.level.parse::<tracing_subscriber::EnvFilter>().is_err() {
            return refuse("log.level", &self.log.level, "error, warn, info, debug or trace, or a list of filters");
        }
        Ok(())
    }
}

/// Names the line, and for an unknown key the nearest that exists.
fn syntax(text: &str, path: &Path, error: &toml::de::Error) -> ConfigError {
    let start = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = 1 + text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count();
    let mut message = error.message().trim_end().replace('\n', " ");
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    if let [unknown, known @ ..] = quoted.as_slice()
        && message.starts_with("unknown field")
        && let Some(nearest) = known.iter().min_by_key(|name| distance(unknown, name))
    {
        message = format!("unknown key `{unknown}`; the nearest is `{nearest}` (all: {})", known.join(", "));
    }
    ConfigError::Syntax { path: path.to_owned(), line, message }
}

/// Edit distance (Levenshtein). Keys are short.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Durations as `"25s"` or `"1h 30m"`.
pub(super) mod duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*duration))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text).map_err(|error| D::Error::custom(format!("{error}: write \"25s\" or \"2m\"")))
    }
}

/// A class of service as `"clear"`, `"copy"` or a number from 0 to 63.
pub(super) mod dscp {
    use mesh_dataplane::packet::dscp::Dscp;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Written {
        Word(String),
        Number(i64),
    }

    pub(crate) fn serialize<S: Serializer>(dscp: &Dscp, serializer: S) -> Result<S::Ok, S::Error> {
        let written = match dscp {
            Dscp::Clear => Written::Word("clear".into()),
            Dscp::Copy => Written::Word("copy".into()),
            Dscp::Fixed(class) => Written::Number((*class).into()),
        };
        written.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Dscp, D::Error> {
        let written = Written::deserialize(deserializer);
        match written.as_ref().map(|written| match written {
            Written::Word(word) if word == "clear" => Some(Dscp::Clear),
            Written::Word(word) if word == "copy" => Some(Dscp::Copy),
            Written::Number(class @ 0..64) => Some(Dscp::Fixed(*class as u8)),
            Written::Word(_) | Written::Number(_) => None,
        }) {
            Ok(Some(dscp)) => Ok(dscp),
            _ => Err(D::Error::custom("write \"clear\", \"copy\" or a number from 0 to 63")),
        }
    }
}

/// Offloads by their names.
pub(super) mod classes {
    use mesh_dataplane::selfcheck::Class;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(classes: &[Class], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(classes.iter().map(|class| class.as_str()))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Class>, D::Error> {
        let names = Vec::<String>::deserialize(deserializer)?;
        names.iter().map(|name| name.parse().map_err(D::Error::custom)).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use mesh_dataplane::packet::dscp::Dscp;

    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("meshd.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_is_the_defaults_and_defaults_survive_a_round_trip() {
        assert_eq!(parse("").unwrap(), Config::default());
        let text = toml::to_string(&Config::default()).unwrap();
        assert_eq!(parse(&text).unwrap(), Config::default());
    }

    #[test]
    fn the_shipped_file_shows_every_key_and_the_defaults() {
        let shipped = include_str!("../../../configs/meshd.toml");
        assert_eq!(parse(shipped).unwrap(), Config::default());
        let is_key = |line: &&str| line.starts_with(|first: char| first.is_ascii_lowercase());
        let keys = shipped.lines().filter_map(|line| line.strip_prefix('#').filter(is_key).or(Some(line)));
        let mut shown = parse(&keys.collect::<Vec<_>>().join("\n")).unwrap();
        for (key, value) in toml::Table::try_from(&shown).unwrap() {
            let inner = value.as_table().map(|section| section.keys().cloned().collect());
            for key in inner.unwrap_or_else(|| vec![key]) {
                assert!(shipped.contains(&format!("\n#{key} = ")), "{key} is missing");
            }
        }
        // These are absent by default: the file shows an example.
        assert!(shown.device.mtu.take().is_some() && shown.metrics.listen.take().is_some());
        assert!(shown.device.lanes.take().is_some());
        assert_eq!(shown, Config::default());
    }

    #[test]
    fn a_class_of_service_is_a_word_or_a_number() {
        let class = |text: &str| parse(&format!("[device]\ndscp = {text}")).unwrap().device.dscp;
        assert_eq!([class("\"copy\""), class("\"clear\""), class("46")], [Dscp::Copy, Dscp::Clear, Dscp::Fixed(46)]);
        let fixed = parse("[device]\ndscp = 46").unwrap();
        assert_eq!(parse(&toml::to_string(&fixed).unwrap()).unwrap(), fixed);
    }

    #[test]
    fn there_are_as_many_lanes_as_cores_and_one_on_a_plain_device() {
        let lanes = parse("").unwrap().lanes();
        let cores = std::thread::available_parallelism().unwrap().get();
        assert!(lanes.is_power_of_two() && usize::from(lanes) <= cores.min(8) && usize::from(lanes) * 2 > cores.min(8));
        let configured = parse("[device]\nlanes = 8\nport = 100").unwrap();
        assert_eq!((configured.lanes(), configured.ports()), (8, 100..=107));
        assert_eq!(parse("[device]\nlanes = 8\nmode = \"plain\"").unwrap().lanes(), 1);
    }

    #[test]
    fn unknown_keys_are_refused_with_line_and_nearest_key() {
        let error = parse("state_dir = \"/x\"\n[device]\nnmae = \"mesh0\"\n").unwrap_err();
        assert!(error.starts_with("meshd.toml:3: unknown key `nmae`; the nearest is `name`"), "{error}");
        let error = parse("\nsokcet = \"/x\"\n").unwrap_err();
        assert!(error.starts_with("meshd.toml:2: unknown key `sokcet`; the nearest is `socket`"), "{error}");
    }

    #[test]
    fn wrong_values_are_refused_with_the_key() {
        let cases = [
            ("[device]\nport = 0", "device.port"),
            ("[device]\nport = 65536", "meshd.toml:2"),
            ("[device]\nport = \"7100\"", "meshd.toml:2"),
            ("[device]\nport = 1\nport = 2", "meshd.toml:3"),
            ("[device]\nmtu = 1279", "device.mtu"),
            ("[device]\nlanes = 3", "device.lanes"),
            ("[device]\nlanes = 16", "device.lanes"),
            ("[device]\nlanes = 0", "device.lanes"),
            ("[device]\nlanes = 2\nport = 65535", "device.port"),
            ("[device]\nbusy_poll = \"1s\"", "device.busy_poll"),
            ("[device]\ndscp = 64", "meshd.toml:2"),
            ("[device]\ndscp = \"high\"", "from 0 to 63"),
            ("[device]\ndscp = true", "from 0 to 63"),
            ("[device]\nname = \"a/b\"", "device.name"),
            ("[device]\nmode = \"quick\"", "meshd.toml:2"),
            ("[device]\noffloads_off = [\"gso\"]", "udp-segment"),
            ("[host]\nmark = 0x80", "host.mark"),
            ("[host]\ntable = 254", "host.table"),
            ("[host]\nrule_preference = 0", "host.rule_preference"),
            ("[host]\nroute_protocol = 2", "host.route_protocol"),
            ("[host]\nnftables_table = \"a b\"", "host.nftables_table"),
            ("[metrics]\nlisten = \"0.0.0.0:9710\"", "metrics.listen"),
            ("[keys]\nrotate_every = \"59m\"", "keys.rotate_every"),
            ("[keys]\nrotate_every = \"2years\"", "keys.rotate_every"),
            ("[keys]\nrotate_every = \"never\"", "meshd.toml:2"),
            ("state_dir = \"var\"", "state_dir"),
            ("shutdown_grace = \"soon\"", "meshd.toml:1"),
            ("mode = \"add-on\"", "meshd.toml:1"),
            ("[log]\nlevel = \"a=b=c\"", "log.level"),
            ("not toml", "meshd.toml:1"),
        ];
        for (text, expected) in cases {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn distances_are_those_of_the_book() {
        for (a, b, expected) in [("", "abc", 3), ("kitten", "sitting", 3), ("port", "port", 0), ("nmae", "name", 2)] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }
}
