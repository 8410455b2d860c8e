//! When this node rotates by itself. Computed from what is on disk, so that a restart, a stepped clock and a long time
//! switched off change nothing about the rule: an interval after the key in use was promoted, plus the node's own jitter.

use std::time::Duration;

use mesh_protocol::UnixSeconds;
use mesh_protocol::id::NodeId;
use serde::{Deserialize, Serialize};

use super::ring::RETIRE_PREVIOUS;

/// Shortest interval: a node may show 65,536 keys in its life, which an hourly rotation reaches after years.
pub(crate) const SHORTEST: Duration = Duration::from_secs(60 * 60);
/// Longest interval: beyond it `off` is meant.
pub(crate) const LONGEST: Duration = Duration::from_secs(366 * 24 * 60 * 60);
/// The jitter is below this part of the interval.
const JITTER_PART: u64 = 10;

/// Section `[keys]` of `meshd.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct KeysConfig {
    /// How long a tunnel key is used; `off` leaves it to operators. Up to a tenth is added, for each node its own, so
    /// that nodes do not all rotate at once.
    #[serde(with = "every")]
    pub(crate) rotate_every: Option<Duration>,
}

impl Default for KeysConfig {
    /// A day, which is also how long the previous key answers.
    fn default() -> Self {
        Self { rotate_every: Some(RETIRE_PREVIOUS) }
    }
}

impl KeysConfig {
    /// When the key of `epoch`, promoted at `promoted`, makes place for the next one, in seconds since 1970.
    pub(crate) fn due(&self, node: NodeId, epoch: u64, promoted: UnixSeconds) -> Option<UnixSeconds> {
        let every = self.rotate_every?.as_secs();
        let jitter = spread(node, epoch) % (every / JITTER_PART).max(1);
        Some(promoted.saturating_add(every).saturating_add(jitter))
    }

    /// Whether the interval is shorter than the previous key would answer, so that it has to give way.
    pub(crate) fn cuts_previous_short(&self) -> bool {
        self.rotate_every.is_some_and(|every| every < RETIRE_PREVIOUS)
    }
}

/// A number that differs from node to node and from epoch to epoch. Nothing secret: it only spreads load.
///
/// Source: the output function of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
fn spread(node: NodeId, epoch: u64) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *node.as_bytes();
    let mut mixed = u64::from_be_bytes([a, b, c, d, e, f, g, h]) ^ epoch;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// `"24h"` or `"off"`.
mod every {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(every: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        match every {
            Some(every) => serializer.collect_str(&humantime::format_duration(*every)),
            None => serializer.serialize_str("off"),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == "off" {
            return Ok(None);
        }
        let every = humantime::parse_duration(&text);
        every.map(Some).map_err(|error| D::Error::custom(format!("{error}: write \"24h\" or \"off\"")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3600;

    #[test]
    fn nodes_and_epochs_are_due_at_their_own_time_within_a_tenth() {
        let config = KeysConfig::default();
        let mut seen = std::collections::BTreeSet::new();
        for number in 0..40_u8 {
            for epoch in 1..5 {
                let mut id = [0; 32];
                id[0] = number;
                let due = config.due(NodeId(id), epoch, 1_000).expect("on");
                assert_eq!(config.due(NodeId(id), epoch, 1_000), Some(due), "the same after a restart");
                assert!((1_000 + 24 * HOUR..1_000 + 24 * HOUR + 24 * HOUR / 10).contains(&due), "{due}");
                seen.insert(due);
            }
        }
        assert!(seen.len() > 150, "only {} different times", seen.len());
        let off = KeysConfig { rotate_every: None };
        assert_eq!(off.due(NodeId([1; 32]), 1, 0), None);
        assert!(!off.cuts_previous_short() && !config.cuts_previous_short());
        assert!(KeysConfig { rotate_every: Some(SHORTEST) }.cuts_previous_short());
    }
}
