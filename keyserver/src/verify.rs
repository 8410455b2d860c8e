//! `keyserver verify`: is the store what was written?

use std::collections::HashMap;
use std::io::Write as _;

use anyhow::{Context as _, bail};

use crate::app;
use crate::config::Config;
use crate::directory::layout;
use crate::metrics::Metrics;
use crate::store::{Embedded, Entry, Event, Range, Store, StoreError};

/// Checks pages, the store's own bookkeeping, and every signature of the history.
pub(crate) fn verify(config: &Config, json: bool) -> anyhow::Result<()> {
    app::find_mesh(config)?;
    let path = config.store_path();
    let store = Embedded::open(&path).with_context(|| format!("open store {}", path.display()))?;
    let changes = compare_with_log(&store)?;
    drop(store);
    let (metrics, _) = Metrics::new();
    let directory = app::load(config, metrics)?;
    let status = directory.status();
    let mut out = std::io::stdout();
    if json {
        let document = serde_json::json!({
            "mesh_id": status.mesh_id, "position": status.position, "nodes": status.nodes, "alarms": status.alarms,
        });
        return Ok(writeln!(out, "{document}")?);
    }
    writeln!(out, "store {}: good", path.display())?;
    writeln!(out, "  revision {}, {changes} changes, {} nodes", status.position.revision, status.nodes)?;
    for alarm in status.alarms {
        writeln!(out, "  {alarm}")?;
    }
    Ok(())
}

/// What the log of changes and the versions say has to be what the map of newest values says; gives how many there are.
fn compare_with_log(store: &dyn Store) -> anyhow::Result<usize> {
    let range = Range::prefix(layout::HISTORY);
    let logged = match store.watch(&range, 1, usize::MAX) {
        Err(StoreError::NoRevision { oldest, .. }) => store.watch(&range, oldest, usize::MAX),
        other => other,
    };
    let logged = logged.context("read the log of the store")?;
    let held = store.range(&range, None, usize::MAX).context("read the store")?;
    let versions =
        store.range(&range, Some(store.revision()?), usize::MAX).context("read the versions in the store")?;
    let by_key: HashMap<&[u8], &Entry> = held.iter().map(|entry| (entry.key.as_slice(), entry)).collect();
    let same = |event: &Event| {
        let entry = by_key.get(event.key.as_slice());
        entry.is_some_and(|entry| entry.mod_revision == event.revision && event.value.as_ref() == Some(&entry.value))
    };
    if versions != held || !logged.iter().all(same) {
        bail!("the store contradicts itself: restore a copy, then run 'keyserver resume'");
    }
    Ok(held.len())
}
