//! `keyserver resume`: an operator accepts a store that is older than its keyserver was.

use std::io::Write as _;

use anyhow::Context as _;
use mesh_protocol::id::Position;

use crate::app;
use crate::config::Config;
use crate::directory::{History, layout, unix_now};
use crate::keys;
use crate::store::{Compare, Embedded, Operation, Store as _, Txn};
use crate::watermark::{Watermark, WatermarkFile};

/// Serials left out after a restore, for grants that the watermark did not hear of.
const SERIAL_GAP: u64 = 1_000;

/// Starts a new history (another epoch) from what the store holds, with serials above any that were given.
pub(crate) fn resume(config: &Config) -> anyhow::Result<()> {
    app::find_mesh(config)?;
    let path = config.store_path();
    let mut store = Embedded::open(&path).with_context(|| format!("open store {}", path.display()))?;
    let history = History::load(&store).context("read the directory")?;
    let file = WatermarkFile::in_dir(&config.dir);
    let given = file.read().ok().flatten().map_or(0, |mark| mark.serial);
    let serial = history.serial.max(given) + SERIAL_GAP;
    let epoch = u64::from_be_bytes(keys::random()?);
    let held = history.position.epoch.to_be_bytes().to_vec();
    store.txn(&Txn {
        compare: vec![Compare::Value(layout::EPOCH.to_vec(), held)],
        then: vec![
            Operation::Put(layout::EPOCH.to_vec(), epoch.to_be_bytes().to_vec()),
            Operation::Put(layout::SERIAL_FLOOR.to_vec(), serial.to_be_bytes().to_vec()),
            // Voided tokens and used ones would be open again: the copy does not know.
            Operation::Put(layout::TOKENS_SINCE.to_vec(), unix_now().to_be_bytes().to_vec()),
        ],
        ..Txn::default()
    })?;
    let position = Position { epoch, revision: history.position.revision };
    file.write(Watermark { serial, position }).context("write the watermark")?;
    let mut out = std::io::stdout();
    writeln!(out, "join tokens made so far are void")?;
    writeln!(out, "a new history begins at revision {}; serials go on from {serial}", position.revision)?;
    Ok(writeln!(out, "nodes revoked and enrolled since the copy was made are not in it: check 'meshctl node list'")?)
}
