//! Releases that meshd could not be told of, left on disk for it: one file each, whole or not there at all.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use mesh_protocol::local::{Attachment, RELEASED_DIR};

/// Queues a release. It is on disk when this returns; queuing it again changes nothing.
///
/// # Errors
/// Whatever the file system says. Nothing half-written is left under the final name.
pub(crate) fn queue(state_dir: &Path, attachment: &Attachment) -> io::Result<()> {
    let directory = state_dir.join(RELEASED_DIR);
    DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
    let name = attachment.file_name();
    let temporary = directory.join(format!(".{name}.{}", std::process::id()));
    let outcome = write(&temporary, attachment).and_then(|()| fs::rename(&temporary, directory.join(name)));
    if outcome.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    outcome?;
    File::open(&directory)?.sync_all()
}

fn write(path: &Path, attachment: &Attachment) -> io::Result<()> {
    let text = serde_json::to_vec(attachment).map_err(io::Error::from)?;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(&text)?;
    file.sync_all()
}
