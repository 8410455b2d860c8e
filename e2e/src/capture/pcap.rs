//! Captured frames as a file for tcpdump or Wireshark.
//!
//! Source of the format: <https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-04.html>.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};

/// Set to a directory, it makes every capture leave a file there.
pub(super) const DIRECTORY: &str = "MESH_LAB_PCAP";
/// A file ends here: enough to look at, not enough to fill a disk.
const LIMIT_BYTES: usize = 256 << 20;
/// Microsecond time stamps, Ethernet frames.
const MAGIC: u32 = 0xa1b2_c3d4;
const ETHERNET: u32 = 1;
const LONGEST_FRAME: u32 = 128 << 10;

/// A file being written.
#[derive(Debug)]
pub(super) struct Pcap {
    file: BufWriter<File>,
    written: usize,
}

impl Pcap {
    /// Opens `NAME.pcap` in the directory of [`DIRECTORY`]; `None` if that is not set.
    pub(super) fn from_environment(name: &str) -> Result<Option<Self>> {
        let Some(directory) = std::env::var_os(DIRECTORY) else { return Ok(None) };
        Self::create(&Path::new(&directory).join(format!("{name}.pcap"))).map(Some)
    }

    fn create(path: &Path) -> Result<Self> {
        let mut file = BufWriter::new(File::create(path).with_context(|| format!("make {}", path.display()))?);
        file.write_all(&MAGIC.to_ne_bytes())?;
        file.write_all(&[2_u16, 4].map(u16::to_ne_bytes).concat())?;
        file.write_all(&[0, 0, LONGEST_FRAME, ETHERNET].map(u32::to_ne_bytes).concat())?;
        Ok(Self { file, written: 0 })
    }

    /// Adds a frame that was just read.
    pub(super) fn add(&mut self, frame: &[u8]) -> Result<()> {
        self.written += 16 + frame.len();
        if self.written > LIMIT_BYTES {
            return Ok(());
        }
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let length = frame.len() as u32;
        let header = [time.as_secs() as u32, time.subsec_micros(), length, length];
        self.file.write_all(&header.map(u32::to_ne_bytes).concat())?;
        Ok(self.file.write_all(frame)?)
    }

    /// Writes what is still in memory.
    pub(super) fn finish(mut self) -> Result<()> {
        Ok(self.file.flush()?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn frames_stand_behind_a_header() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.pcap");
        let mut pcap = Pcap::create(&path).unwrap();
        pcap.add(&[7; 60]).unwrap();
        pcap.finish().unwrap();
        let bytes = std::fs::read(path).unwrap();
        assert_eq!(bytes.len(), 24 + 16 + 60);
        assert_eq!(bytes[20..24], ETHERNET.to_ne_bytes());
        assert_eq!(bytes[32..36], 60_u32.to_ne_bytes());
        assert!(bytes.ends_with(&[7; 60]));
    }
}
