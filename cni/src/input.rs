//! What the runtime says: variables of the environment and the configuration on standard input. All of it is checked
//! here, before anything is changed.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use mesh_hostnet::link;
use mesh_protocol::local::{self, Attachment};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::reply::{Failure, FailureCode};

/// Most bytes of configuration that are read. Results and attachments of a full node are far below.
const MAX_CONFIG_BYTES: u64 = 4 * 1024 * 1024;
/// Longest container id. The specification names no limit; runtimes use 64 digits.
const MAX_CONTAINER_BYTES: usize = 255;
/// Longest `namespace/name` of a pod: two names of 253 bytes (Kubernetes object names).
const MAX_POD_BYTES: usize = 2 * 253 + 1;

/// Versions of the specification that are spoken, oldest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    pub(crate) const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// Reads a version that was asked for.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let known = Self::ALL.into_iter().find(|version| version.as_str() == text);
        known.ok_or_else(|| {
            let all = Self::ALL.map(Self::as_str).join(", ");
            Failure::new(FailureCode::Version, format!("cniVersion {text} is not supported; supported are {all}"))
        })
    }

    /// Refuses a command that this version does not have yet.
    pub(crate) fn at_least(self, oldest: Self, command: &str) -> Result<(), Failure> {
        if self >= oldest {
            return Ok(());
        }
        let message = format!("cniVersion {} has no {command}, {} is the first", self.as_str(), oldest.as_str());
        Err(Failure::new(FailureCode::Version, message))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether Mesh gives pods their addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    /// It does.
    #[default]
    Primary,
    /// Another plugin did, and its result passes through.
    Chained,
}

/// The configuration, as far as it is ours. Unknown keys belong to others and are not looked at.
#[derive(Debug, Deserialize)]
pub(crate) struct Config {
    /// meshd's socket.
    #[serde(default = "default_socket")]
    pub(crate) socket: PathBuf,
    /// meshd's state directory, for releases it could not be told of.
    #[serde(default = "default_state_dir", rename = "stateDir")]
    pub(crate) state_dir: PathBuf,
    /// Upper bound of the pod link's MTU in bytes; the lease's is used when it is lower.
    #[serde(default)]
    pub(crate) mtu: Option<u16>,
    /// Primary unless said otherwise.
    #[serde(default)]
    pub(crate) mode: Mode,
    /// Result of the plugin before (ADD), or of the whole chain (CHECK, DEL); decoded by whom it concerns.
    #[serde(default, rename = "prevResult")]
    pub(crate) previous: Option<Box<RawValue>>,
    /// GC: what is valid. Absent is not the same as empty.
    #[serde(default, rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Box<RawValue>>,
    /// GC: the name that libcni gave the key at first.
    #[serde(default, rename = "cni.dev/attachments")]
    attachments: Option<Box<RawValue>>,
}

fn default_socket() -> PathBuf {
    local::DEFAULT_SOCKET.into()
}

fn default_state_dir() -> PathBuf {
    local::DEFAULT_STATE_DIR.into()
}

impl Config {
    /// Decodes and checks our part of the configuration.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let wrong = |message: String| Failure::new(FailureCode::Config, message);
        let config: Self = serde_json::from_str(text).map_err(|error| wrong(format!("configuration: {error}")))?;
        absolute("socket", &config.socket)?;
        absolute("stateDir", &config.state_dir)?;
        if let Some(mtu) = config.mtu.filter(|mtu| *mtu < 1280) {
            return Err(wrong(format!("mtu is {mtu}, below 1280, the least IPv6 needs")));
        }
        Ok(config)
    }

    /// The attachments GC has to keep.
    pub(crate) fn valid_attachments(&self) -> Result<Vec<Attachment>, Failure> {
        #[derive(Deserialize)]
        struct Entry {
            #[serde(rename = "containerID")]
            container: String,
            ifname: String,
        }
        let wrong = |message: String| Failure::new(FailureCode::Config, message);
        let Some(raw) = self.valid_attachments.as_ref().or(self.attachments.as_ref()) else {
            return Err(wrong("cni.dev/valid-attachments is missing, so nothing is known to be stale".into()));
        };
        let entries: Vec<Entry> =
            serde_json::from_str(raw.get()).map_err(|error| wrong(format!("cni.dev/valid-attachments: {error}")))?;
        Ok(entries
            .into_iter()
            .map(|entry| Attachment { container: entry.container, interface: entry.ifname })
            .collect())
    }
}

fn absolute(key: &str, path: &Path) -> Result<(), Failure> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(Failure::new(FailureCode::Config, format!("{key} is '{}', which is not an absolute path", path.display())))
}

/// Reads standard input to its end.
pub(crate) fn read_config(input: impl Read) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let read = input.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|error| {
        Failure::new(FailureCode::Io, format!("read the configuration from standard input: {error}"))
    })?;
    if bytes.len() as u64 > MAX_CONFIG_BYTES {
        let message = format!("the configuration is longer than {MAX_CONFIG_BYTES} bytes");
        return Err(Failure::new(FailureCode::Decode, message));
    }
    String::from_utf8(bytes).map_err(|_| Failure::new(FailureCode::Decode, "the configuration is not UTF-8"))
}

/// The version a configuration asks for; without the key it is 0.1.0 (specification, section "Configuration format").
pub(crate) fn asked_version(text: &str) -> Result<String, Failure> {
    #[derive(Deserialize)]
    struct Asked {
        #[serde(rename = "cniVersion")]
        version: Option<String>,
    }
    if text.trim().is_empty() {
        return Err(Failure::new(FailureCode::Decode, "standard input is empty; the configuration has to come there"));
    }
    // serde would read an array as the members of a struct in order.
    if !text.trim_start().starts_with('{') {
        return Err(Failure::new(FailureCode::Decode, "the configuration does not decode: it is not a JSON object"));
    }
    let asked: Asked = serde_json::from_str(text).map_err(|error| {
        let code = if error.is_data() { FailureCode::Config } else { FailureCode::Decode };
        Failure::new(code, format!("the configuration does not decode: {error}"))
    })?;
    Ok(asked.version.unwrap_or_else(|| "0.1.0".to_owned()))
}

/// A variable that has to be there.
pub(crate) fn variable(name: &'static str) -> Result<String, Failure> {
    let wrong = |what: &str| Failure::new(FailureCode::Environment, format!("{name} {what}"));
    match std::env::var(name) {
        Ok(value) if value.is_empty() => Err(wrong("is empty")),
        Ok(value) => Ok(value),
        Err(std::env::VarError::NotPresent) => Err(wrong("is missing")),
        Err(std::env::VarError::NotUnicode(_)) => Err(wrong("is not UTF-8")),
    }
}

/// Container and interface from the environment.
pub(crate) fn attachment() -> Result<Attachment, Failure> {
    let container = variable("CNI_CONTAINERID")?;
    check_container(&container).map_err(|reason| wrong_variable("CNI_CONTAINERID", &container, reason))?;
    let interface = variable("CNI_IFNAME")?;
    if let Err(error) = link::check_name(&interface) {
        return Err(wrong_variable("CNI_IFNAME", &interface, &error.to_string()));
    }
    Ok(Attachment { container, interface })
}

/// The pod's namespace from the environment.
pub(crate) fn netns_path() -> Result<String, Failure> {
    let path = variable("CNI_NETNS")?;
    if !Path::new(&path).is_absolute() {
        return Err(wrong_variable("CNI_NETNS", &path, "it is not an absolute path"));
    }
    Ok(path)
}

/// A variable's value is wrong.
pub(crate) fn wrong_variable(name: &str, value: &str, reason: &str) -> Failure {
    let shown: String = value.chars().take(80).collect();
    Failure::new(FailureCode::Environment, format!("{name} is '{shown}': {reason}"))
}

/// Source: specification, section "Parameters".
fn check_container(id: &str) -> Result<(), &'static str> {
    if id.len() > MAX_CONTAINER_BYTES {
        return Err("it is longer than 255 bytes");
    }
    if !id.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err("it has to begin with a letter or digit");
    }
    if !id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-')) {
        return Err("it may hold letters, digits, '_', '.' and '-' only");
    }
    Ok(())
}

/// `namespace/name` of the pod out of `CNI_ARGS`, where the runtime gives it. For people only, so never an error.
pub(crate) fn pod() -> Option<String> {
    pod_of(&std::env::var("CNI_ARGS").ok()?)
}

fn pod_of(args: &str) -> Option<String> {
    let value = |key| args.split(';').filter_map(|pair| pair.split_once('=')).find(|(k, _)| *k == key).map(|(_, v)| v);
    let pod = format!("{}/{}", value("K8S_POD_NAMESPACE")?, value("K8S_POD_NAME")?);
    let plain = pod.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'/'));
    (plain && pod.len() <= MAX_POD_BYTES).then_some(pod)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn container_ids_are_those_of_the_specification() {
        let cases = [("a", true), ("3f9.-_A", true), ("", false), ("-a", false), ("../x", false), ("a/b", false)];
        for (id, good) in cases {
            assert_eq!(check_container(id).is_ok(), good, "{id}");
        }
        assert!(check_container(&"a".repeat(255)).is_ok());
        assert!(check_container(&"a".repeat(300)).is_err());
    }

    #[test]
    fn pod_is_taken_from_args_if_it_is_plain() {
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=x";
        assert_eq!(pod_of(args).as_deref(), Some("shop/cart-0"));
        for args in ["", "K8S_POD_NAME=a", "K8S_POD_NAMESPACE=\u{1b};K8S_POD_NAME=a", ";;=;"] {
            assert_eq!(pod_of(args), None, "{args}");
        }
    }

    #[test]
    fn config_is_checked_and_foreign_keys_are_not() {
        let config = Config::parse(r#"{"name":"mesh","type":"mesh-cni","ipam":{"type":"x"},"mtu":1300}"#).unwrap();
        assert_eq!((config.mtu, config.mode), (Some(1300), Mode::Primary));
        assert_eq!(config.socket, Path::new(local::DEFAULT_SOCKET));
        for wrong in [r#"{"mtu":1279}"#, r#"{"mtu":"big"}"#, r#"{"socket":"run/x"}"#, r#"{"mode":"bridge"}"#, "3"] {
            assert_eq!(Config::parse(wrong).unwrap_err().code, FailureCode::Config, "{wrong}");
        }
    }

    #[test]
    fn missing_attachments_are_not_an_empty_list() {
        let parse = |text| Config::parse(text).unwrap().valid_attachments();
        assert!(parse("{}").is_err());
        assert!(parse(r#"{"cni.dev/valid-attachments":null}"#).is_err());
        assert!(parse(r#"{"cni.dev/valid-attachments":[{"containerID":"a"}]}"#).is_err());
        assert_eq!(parse(r#"{"cni.dev/valid-attachments":[]}"#).unwrap(), []);
        let one = parse(r#"{"cni.dev/attachments":[{"containerID":"a","ifname":"eth0"}]}"#).unwrap();
        assert_eq!(one[0].interface, "eth0");
    }
}
