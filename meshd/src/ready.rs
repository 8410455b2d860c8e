//! Ready is a set of named things that must all have happened.

use std::collections::BTreeSet;
use std::sync::Arc;

use sd_notify::NotifyState;
use tokio::sync::watch;
use tracing::{info, warn};

/// The things that are still waited for.
#[derive(Debug, Clone)]
pub(crate) struct Ready {
    waiting: Arc<watch::Sender<BTreeSet<&'static str>>>,
}

/// One thing that is waited for, until it is dropped.
#[derive(Debug)]
pub(crate) struct Guard {
    name: &'static str,
    waiting: Arc<watch::Sender<BTreeSet<&'static str>>>,
}

impl Ready {
    /// Nothing is waited for yet.
    pub(crate) fn new() -> Self {
        Self { waiting: Arc::new(watch::Sender::new(BTreeSet::new())) }
    }

    /// Waits for one more thing.
    pub(crate) fn guard(&self, name: &'static str) -> Guard {
        self.waiting.send_modify(|waiting| {
            waiting.insert(name);
        });
        Guard { name, waiting: Arc::clone(&self.waiting) }
    }

    /// What is still waited for.
    pub(crate) fn waiting_for(&self) -> Vec<String> {
        self.waiting.borrow().iter().map(|name| (*name).to_owned()).collect()
    }

    /// Waits until nothing is waited for, then tells the service manager.
    pub(crate) async fn announce(&self) {
        let mut waiting = self.waiting.subscribe();
        // It cannot close: `self` holds the sender.
        let _ = waiting.wait_for(BTreeSet::is_empty).await;
        info!("ready");
        notify(&[NotifyState::Ready, NotifyState::Status("carrying packets")]);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.waiting.send_modify(|waiting| {
            waiting.remove(self.name);
        });
    }
}

/// Tells the service manager that we are stopping.
pub(crate) fn announce_stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(states: &[NotifyState<'_>]) {
    // Without a service manager there is nobody to tell.
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return;
    }
    if let Err(error) = sd_notify::notify(states) {
        warn!(%error, "cannot tell the service manager");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_when_all_guards_are_dropped() {
        let ready = Ready::new();
        let (a, b) = (ready.guard("records loaded"), ready.guard("TUN up"));
        assert_eq!(ready.waiting_for(), ["TUN up", "records loaded"]);
        drop(a);
        assert_eq!(ready.waiting_for(), ["TUN up"]);
        let announced = tokio::spawn({
            let ready = ready.clone();
            async move { ready.announce().await }
        });
        drop(b);
        assert!(announced.await.is_ok());
    }
}
