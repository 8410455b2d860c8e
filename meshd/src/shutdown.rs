//! Stopping: at the first signal gently, at the second at once.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

/// Why the daemon stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// SIGTERM or SIGINT: everything stays in place.
    Signal,
    /// `meshd down`: everything of ours is taken off the host.
    Down,
}

/// Asks the daemon to stop, and tells whoever asks that it does.
#[derive(Debug, Clone)]
pub(crate) struct Shutdown {
    reason: watch::Sender<Option<Reason>>,
}

impl Shutdown {
    /// Nobody asked yet.
    pub(crate) fn new() -> Self {
        Self { reason: watch::Sender::new(None) }
    }

    /// Asks. The first reason counts, but `Down` beats `Signal`.
    pub(crate) fn begin(&self, reason: Reason) {
        self.reason.send_modify(|known| {
            if known.is_none() || reason == Reason::Down {
                *known = Some(reason);
            }
        });
    }

    /// Waits until somebody asked.
    ///
    /// # Cancel safety
    /// May be dropped and called again.
    pub(crate) async fn begun(&self) -> Reason {
        let mut reason = self.reason.subscribe();
        let asked = reason.wait_for(Option::is_some).await.map(|known| *known);
        asked.ok().flatten().unwrap_or(Reason::Signal)
    }
}

/// Listens for SIGTERM and SIGINT from now on; must be called inside a tokio runtime.
///
/// # Errors
/// The system refused a handler.
pub(crate) fn listen(shutdown: Shutdown) -> io::Result<tokio::task::JoinHandle<()>> {
    let terminate = signal(SignalKind::terminate())?;
    let interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::spawn(wait(terminate, interrupt, shutdown)))
}

async fn wait(mut terminate: Signal, mut interrupt: Signal, shutdown: Shutdown) {
    let mut next = async || {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    let name = next().await;
    info!(signal = name, "stopping; device, routes and filter stay");
    shutdown.begin(Reason::Signal);
    let name = next().await;
    warn!(signal = name, "second signal, stopping at once");
    std::process::exit(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn down_beats_a_signal_and_the_other_way_round_does_not() {
        let shutdown = Shutdown::new();
        shutdown.begin(Reason::Signal);
        assert_eq!(shutdown.begun().await, Reason::Signal);
        shutdown.begin(Reason::Down);
        shutdown.begin(Reason::Signal);
        assert_eq!(shutdown.begun().await, Reason::Down);
    }
}
