//! Releases that `mesh-cni` queued while `meshd` was down: one small file each.

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use mesh_protocol::local::{Attachment, RELEASED_DIR};
use nix::fcntl::OFlag;
use tracing::warn;

use crate::state_dir::StateDir;

/// Files taken in one round: the rest waits for the next.
const MAX_FILES: usize = 10_000;
/// Longest file.
const MAX_BYTES: u64 = 64 * 1024;

/// One file of the directory.
#[derive(Debug)]
pub(super) struct Release {
    /// Where it lies.
    pub(super) path: PathBuf,
    /// Whose lease; `None` if it cannot be read, then it is only in the way.
    pub(super) attachment: Option<Attachment>,
    /// When it was queued, in seconds since 1970.
    pub(super) queued: u64,
}

/// All queued releases. A directory that is not there holds none.
pub(super) fn read(state: &StateDir) -> Vec<Release> {
    let Ok(entries) = fs::read_dir(state.path_of(RELEASED_DIR)) else { return Vec::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path())).take(MAX_FILES);
    // Others are still being written: they get their name when they are whole.
    let whole = paths.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    whole.filter_map(|path| read_one(&path)).collect()
}

/// Removes files whose leases are given back on disk.
pub(super) fn remove(paths: &[PathBuf]) {
    for path in paths {
        if let Err(error) = fs::remove_file(path) {
            warn!(path = %path.display(), %error, "cannot remove a queued release");
        }
    }
}

fn read_one(path: &Path) -> Option<Release> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path);
    let file =
        opened.inspect_err(|error| warn!(path = %path.display(), %error, "cannot read a queued release")).ok()?;
    let metadata = file.metadata().ok().filter(fs::Metadata::is_file)?;
    let queued = metadata.modified().ok()?.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let attachment =
        parse(file).filter(|attachment| path.file_name().is_some_and(|name| *name == *attachment.file_name()));
    if attachment.is_none() {
        warn!(path = %path.display(), "a queued release makes no sense and is dropped");
    }
    Some(Release { path: path.to_owned(), attachment, queued })
}

fn parse(file: File) -> Option<Attachment> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}
