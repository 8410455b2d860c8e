//! What somebody has to look at: raised when it is first seen, gone when it is over.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use mesh_protocol::local::Alarm;
use tracing::warn;

/// All alarms of this process. At most [`MAX_MESSAGES`] a name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Alarms {
    raised: Arc<Mutex<BTreeMap<(&'static str, String), Instant>>>,
}

/// Messages kept for one name; more say the same about others.
const MAX_MESSAGES: usize = 32;

impl Alarms {
    /// These are the messages of `name` now; none means that it is over.
    pub(crate) fn set(&self, name: &'static str, messages: impl IntoIterator<Item = String>) {
        let messages: Vec<String> = messages.into_iter().take(MAX_MESSAGES).collect();
        let now = Instant::now();
        let mut raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
        raised.retain(|(known, message), _| *known != name || messages.contains(message));
        for message in messages {
            raised.entry((name, message)).or_insert_with_key(|(name, message)| {
                warn!(alarm = name, error = message.as_str(), "alarm");
                now
            });
        }
    }

    /// As the local API tells them.
    pub(crate) fn list(&self, now: Instant) -> Vec<Alarm> {
        let raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
        let alarm = |((name, message), since): (&(&'static str, String), &Instant)| Alarm {
            name: (*name).to_owned(),
            message: message.clone(),
            age: now.saturating_duration_since(*since).as_secs(),
        };
        raised.iter().map(alarm).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alarm_keeps_its_age_until_it_is_over() {
        let alarms = Alarms::default();
        alarms.set("host-network", Some("no route".into()));
        alarms.set("prefix-conflict", Some("both".into()));
        let since: Vec<Instant> =
            alarms.raised.lock().unwrap_or_else(PoisonError::into_inner).values().copied().collect();
        alarms.set("host-network", Some("no route".into()));
        let again: Vec<Instant> =
            alarms.raised.lock().unwrap_or_else(PoisonError::into_inner).values().copied().collect();
        assert_eq!(since, again);
        alarms.set("host-network", None);
        let names: Vec<String> = alarms.list(Instant::now()).into_iter().map(|alarm| alarm.name).collect();
        assert_eq!(names, ["prefix-conflict"]);
    }
}
