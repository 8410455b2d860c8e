//! The embedded backend: one redb file, one keyserver.
//!
//! ```text
//! current   key                             -> mod revision ‖ value
//! versions  escaped key ‖ revision          -> 1 ‖ value, or 0 for a removal
//! log       revision ‖ number within it     -> key
//! meta      "revision", "compacted"         -> u64
//! ```
//!
//! Numbers are big-endian, so that their order is that of the bytes. Every commit is one fdatasync; a commit that fails
//! leaves redb refusing everything until the file is opened again, which [`Store::recover`] does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use redb::{
    Database, DatabaseError, ReadTransaction, ReadableDatabase as _, ReadableTable, StorageError, TableDefinition,
    WriteTransaction,
};

use super::{Compare, Entry, Event, Operation, Outcome, Range, Store, StoreError, Txn};

type Bytes = TableDefinition<'static, &'static [u8], &'static [u8]>;

const CURRENT: Bytes = TableDefinition::new("current");
const VERSIONS: Bytes = TableDefinition::new("versions");
const LOG: Bytes = TableDefinition::new("log");
const META: Bytes = TableDefinition::new("meta");

const REVISION: &[u8] = b"revision";
const COMPACTED: &[u8] = b"compacted";

/// A [`Store`] in one file.
pub(crate) struct Embedded {
    path: PathBuf,
    /// Absent between a failed commit and a successful [`Store::recover`].
    database: Option<Database>,
}

impl Embedded {
    /// Makes a new store. The caller saw to it that the file is not there.
    pub(crate) fn create(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(|error| open_error(path, error))?;
        let write = database.begin_write().map_err(io)?;
        for table in [CURRENT, VERSIONS, LOG, META] {
            write.open_table(table).map_err(io)?;
        }
        write.commit().map_err(io)?;
        Ok(Self { path: path.to_owned(), database: Some(database) })
    }

    /// Opens a store and checks every page's checksum.
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let mut database = open_file(path)?;
        // redb was written to survive its own files; where it asserts on bytes that are not, that is damage too.
        let check = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| database.check_integrity()));
        match check {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return Err(damaged(path, "a checksum does not match")),
            Ok(Err(error)) => return Err(open_error(path, error)),
            Err(_) => return Err(damaged(path, "its pages contradict each other")),
        }
        let store = Self { path: path.to_owned(), database: Some(database) };
        store.revision()?;
        Ok(store)
    }

    fn database(&self) -> Result<&Database, StoreError> {
        self.database.as_ref().ok_or_else(|| StoreError::Io("an earlier write failed".to_owned()))
    }

    fn read(&self) -> Result<ReadTransaction, StoreError> {
        self.database()?.begin_read().map_err(|error| self.failed(error))
    }

    fn failed(&self, error: impl Into<redb::Error>) -> StoreError {
        match error.into() {
            redb::Error::Corrupted(reason) => damaged(&self.path, &reason),
            other => StoreError::Io(other.to_string()),
        }
    }

    fn write<T>(&mut self, work: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>) -> Result<T, StoreError> {
        let attempt = || -> Result<T, redb::Error> {
            let database = self.database.as_ref().ok_or(redb::Error::PreviousIo)?;
            let write = database.begin_write()?;
            let result = work(&write)?;
            write.commit()?;
            Ok(result)
        };
        attempt().map_err(|error| {
            let error = self.failed(error);
            self.database = None;
            error
        })
    }

    fn bounds(&self, read: &ReadTransaction) -> Result<(u64, u64), StoreError> {
        let meta = read.open_table(META).map_err(|error| self.failed(error))?;
        let number = |key| number(&meta, key).map_err(|error| self.failed(error));
        Ok((number(COMPACTED)?, number(REVISION)?))
    }
}

impl Store for Embedded {
    fn revision(&self) -> Result<u64, StoreError> {
        Ok(self.bounds(&self.read()?)?.1)
    }

    fn range(&self, range: &Range, at: Option<u64>, limit: usize) -> Result<Vec<Entry>, StoreError> {
        let read = self.read()?;
        let Some(at) = at else {
            return current(&read, range, limit).map_err(|error| self.failed(error));
        };
        let (oldest, newest) = self.bounds(&read)?;
        if at < oldest || at > newest {
            return Err(StoreError::NoRevision { asked: at, oldest, newest });
        }
        as_of(&read, range, at, limit).map_err(|error| self.failed(error))
    }

    fn txn(&mut self, txn: &Txn) -> Result<Outcome, StoreError> {
        self.write(|write| {
            let mut succeeded = true;
            for compare in &txn.compare {
                succeeded &= holds(write, compare)?;
            }
            let operations = if succeeded { &txn.then } else { &txn.otherwise };
            Ok(Outcome { succeeded, revision: apply(write, operations)? })
        })
    }

    fn watch(&self, range: &Range, from: u64, limit: usize) -> Result<Vec<Event>, StoreError> {
        let read = self.read()?;
        let (oldest, newest) = self.bounds(&read)?;
        if from <= oldest && oldest > 0 {
            return Err(StoreError::NoRevision { asked: from, oldest: oldest + 1, newest });
        }
        events(&read, range, from, limit).map_err(|error| self.failed(error))
    }

    fn compact(&mut self, revision: u64) -> Result<(), StoreError> {
        let (oldest, newest) = self.bounds(&self.read()?)?;
        if revision > newest {
            return Err(StoreError::NoRevision { asked: revision, oldest, newest });
        }
        if revision <= oldest { Ok(()) } else { self.write(|write| compact(write, revision)) }
    }

    fn recover(&mut self) -> Result<(), StoreError> {
        if self.database.is_none() {
            self.database = Some(open_file(&self.path)?);
        }
        Ok(())
    }
}

fn open_file(path: &Path) -> Result<Database, StoreError> {
    let open = std::panic::catch_unwind(|| Database::open(path));
    open.map_err(|_| damaged(path, "its header contradicts its length"))?.map_err(|error| open_error(path, error))
}

fn open_error(path: &Path, error: DatabaseError) -> StoreError {
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
            StoreError::Locked(path.display().to_string())
        }
        DatabaseError::Storage(StorageError::Io(error))
            if error.kind() != std::io::ErrorKind::InvalidData && error.kind() != std::io::ErrorKind::UnexpectedEof =>
        {
            StoreError::Io(format!("{}: {error}", path.display()))
        }
        other => damaged(path, &other.to_string()),
    }
}

fn damaged(path: &Path, reason: &str) -> StoreError {
    StoreError::Damaged { path: path.display().to_string(), reason: reason.to_owned() }
}

fn io(error: impl std::fmt::Display) -> StoreError {
    StoreError::Io(error.to_string())
}

fn number(table: &impl ReadableTable<&'static [u8], &'static [u8]>, key: &[u8]) -> Result<u64, redb::Error> {
    let found = table.get(key)?;
    let bytes = found.as_ref().and_then(|found| found.value().try_into().ok());
    Ok(bytes.map_or(0, u64::from_be_bytes))
}

/// Splits a leading number off; 0 where the bytes are too short, which no write of ours leaves.
fn leading(bytes: &[u8]) -> (u64, &[u8]) {
    bytes.split_first_chunk().map_or((0, bytes), |(number, rest)| (u64::from_be_bytes(*number), rest))
}

/// Keys keep their order, and none is the start of another: 0 becomes 0 255, the end is 0 1.
fn escaped(key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(key.len() + 10);
    for byte in key {
        out.push(*byte);
        if *byte == 0 {
            out.push(255);
        }
    }
    out.extend([0, 1]);
    out
}

fn unescaped(version: &[u8]) -> Option<(Vec<u8>, u64)> {
    let (escaped, revision) = version.split_last_chunk::<8>()?;
    let mut key = Vec::with_capacity(escaped.len());
    let mut rest = escaped.strip_suffix(&[0, 1])?.iter();
    while let Some(byte) = rest.next() {
        key.push(*byte);
        if *byte == 0 {
            rest.next();
        }
    }
    Some((key, u64::from_be_bytes(*revision)))
}

fn version_key(key: &[u8], revision: u64) -> Vec<u8> {
    [escaped(key).as_slice(), &revision.to_be_bytes()].concat()
}

fn current(read: &ReadTransaction, range: &Range, limit: usize) -> Result<Vec<Entry>, redb::Error> {
    let table = read.open_table(CURRENT)?;
    let mut entries = Vec::new();
    for item in table.range(range.start.as_slice()..range.end.as_slice())?.take(limit) {
        let (key, stored) = item?;
        let (mod_revision, value) = leading(stored.value());
        entries.push(Entry { key: key.value().to_vec(), value: value.to_vec(), mod_revision });
    }
    Ok(entries)
}

fn as_of(read: &ReadTransaction, range: &Range, at: u64, limit: usize) -> Result<Vec<Entry>, redb::Error> {
    let table = read.open_table(VERSIONS)?;
    let mut entries = BTreeMap::new();
    for item in table.range(escaped(&range.start).as_slice()..escaped(&range.end).as_slice())? {
        let (version, stored) = item?;
        let Some((key, mod_revision)) = unescaped(version.value()) else { continue };
        if mod_revision > at {
            continue;
        }
        match stored.value() {
            [1, value @ ..] => entries.insert(key, (value.to_vec(), mod_revision)),
            _ => entries.remove(&key),
        };
    }
    let entry = |(key, (value, mod_revision))| Entry { key, value, mod_revision };
    Ok(entries.into_iter().map(entry).take(limit).collect())
}

fn events(read: &ReadTransaction, range: &Range, from: u64, limit: usize) -> Result<Vec<Event>, redb::Error> {
    let (log, versions) = (read.open_table(LOG)?, read.open_table(VERSIONS)?);
    let mut events = Vec::new();
    for item in log.range(from.to_be_bytes().as_slice()..)? {
        let (at, key) = item?;
        let (revision, key) = (leading(at.value()).0, key.value().to_vec());
        if key < range.start || key >= range.end {
            continue;
        }
        let stored = versions.get(version_key(&key, revision).as_slice())?;
        let value = match stored.as_ref().map(|stored| stored.value()) {
            Some([1, value @ ..]) => Some(value.to_vec()),
            _ => None,
        };
        events.push(Event { revision, key, value });
        if events.len() == limit {
            break;
        }
    }
    Ok(events)
}

fn holds(write: &WriteTransaction, compare: &Compare) -> Result<bool, redb::Error> {
    let table = write.open_table(CURRENT)?;
    Ok(match compare {
        Compare::ModRevision(key, revision) => {
            table.get(key.as_slice())?.map_or(0, |stored| leading(stored.value()).0) == *revision
        }
        Compare::Value(key, value) => {
            table.get(key.as_slice())?.is_some_and(|stored| leading(stored.value()).1 == value.as_slice())
        }
    })
}

/// Writes at the next revision; one key at most once, the last operation on it counts.
fn apply(write: &WriteTransaction, operations: &[Operation]) -> Result<u64, redb::Error> {
    let mut meta = write.open_table(META)?;
    let (mut current, mut versions, mut log) =
        (write.open_table(CURRENT)?, write.open_table(VERSIONS)?, write.open_table(LOG)?);
    let held = number(&meta, REVISION)?;
    let revision = held + 1;
    let mut last = BTreeMap::new();
    for operation in operations {
        match operation {
            Operation::Put(key, value) => last.insert(key, Some(value)),
            Operation::Delete(key) => last.insert(key, None),
        };
    }
    let mut count = 0_u32;
    for (key, value) in last {
        match value {
            Some(value) => {
                current.insert(key.as_slice(), [&revision.to_be_bytes(), value.as_slice()].concat().as_slice())?;
                versions.insert(version_key(key, revision).as_slice(), [&[1], value.as_slice()].concat().as_slice())?;
            }
            None if current.remove(key.as_slice())?.is_none() => continue,
            None => {
                versions.insert(version_key(key, revision).as_slice(), [0].as_slice())?;
            }
        }
        log.insert([revision.to_be_bytes().as_slice(), &count.to_be_bytes()].concat().as_slice(), key.as_slice())?;
        count += 1;
    }
    if count == 0 {
        return Ok(held);
    }
    meta.insert(REVISION, revision.to_be_bytes().as_slice())?;
    Ok(revision)
}

fn compact(write: &WriteTransaction, revision: u64) -> Result<(), redb::Error> {
    let (mut meta, mut versions, mut log) =
        (write.open_table(META)?, write.open_table(VERSIONS)?, write.open_table(LOG)?);
    log.retain_in(..(revision + 1).to_be_bytes().as_slice(), |_, _| false)?;
    // Of each key the newest version up to `revision` stays, unless it is a removal.
    let mut stale = Vec::new();
    let mut newest: Option<(Vec<u8>, Vec<u8>, bool)> = None;
    for item in versions.iter()? {
        let (version, stored) = item?;
        let Some((key, at)) = unescaped(version.value()) else { continue };
        if newest.as_ref().is_some_and(|(held, _, removal)| *held != key && *removal) {
            stale.extend(newest.take().map(|(_, version, _)| version));
        }
        if at > revision {
            continue;
        }
        let removal = stored.value().first() != Some(&1);
        let before = newest.replace((key.clone(), version.value().to_vec(), removal));
        stale.extend(before.filter(|(held, _, _)| *held == key).map(|(_, version, _)| version));
    }
    stale.extend(newest.filter(|(_, _, removal)| *removal).map(|(_, version, _)| version));
    for version in stale {
        versions.remove(version.as_slice())?;
    }
    meta.insert(COMPACTED, revision.to_be_bytes().as_slice())?;
    Ok(())
}
