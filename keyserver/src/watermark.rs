//! How far this keyserver ever got, in a file outside of its store: a store that was restored from a copy is found to be
//! behind it, and nothing is written until `keyserver resume`.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use mesh_protocol::id::Position;

/// The highest numbers an acknowledged change had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Watermark {
    /// Serial of a grant.
    pub(crate) serial: u64,
    /// Position of the directory.
    pub(crate) position: Position,
}

/// The file that holds it.
#[derive(Debug)]
pub(crate) struct WatermarkFile(PathBuf);

impl WatermarkFile {
    /// In the keyserver's directory.
    pub(crate) fn in_dir(dir: &Path) -> Self {
        Self(dir.join("watermark"))
    }

    /// Reads it; `None` if there is none.
    pub(crate) fn read(&self) -> std::io::Result<Option<Watermark>> {
        let text = match std::fs::read_to_string(&self.0) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let numbers: Vec<u64> = text.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        match numbers.as_slice() {
            [serial, epoch, revision] => {
                Ok(Some(Watermark { serial: *serial, position: Position { epoch: *epoch, revision: *revision } }))
            }
            _ => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "three numbers expected")),
        }
    }

    /// Replaces it. On return it survives a power cut.
    pub(crate) fn write(&self, mark: Watermark) -> std::io::Result<()> {
        let Watermark { serial, position } = mark;
        let new = self.0.with_extension("new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(format!("{serial} {} {}\n", position.epoch, position.revision).as_bytes())?;
        file.sync_data()?;
        std::fs::rename(&new, &self.0)?;
        match self.0.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    }
}
