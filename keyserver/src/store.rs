//! Where the keyserver keeps what must survive: a flat map of bytes with one revision counter, in etcd's terms.
//!
//! A transaction compares, then does one of two lists of operations; each that writes raises the revision by one. A range
//! may be read as of an earlier revision, and changes may be followed from one. One contract (`suite`) is run against
//! each backend.
//!
//! Calls block: the [writer](crate::writer) thread is the only caller.

mod embedded;
#[cfg(test)]
mod suite;

pub(crate) use embedded::Embedded;

/// The store refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum StoreError {
    /// Another process has it open.
    #[error("store {0} is in use by another keyserver")]
    Locked(String),
    /// Bytes on disk are not what was written.
    #[error("store {path} is damaged ({reason}): restore a copy, then run 'keyserver resume'")]
    Damaged {
        /// Its file.
        path: String,
        /// What was found.
        reason: String,
    },
    /// The device does not take or give bytes.
    #[error("store does not write or read: {0}")]
    Io(String),
    /// A revision was asked for that is compacted away, or not there yet.
    #[error("revision {asked} of the store is not there: it holds {oldest} to {newest}")]
    NoRevision {
        /// Asked for.
        asked: u64,
        /// The oldest there is.
        oldest: u64,
        /// The newest there is.
        newest: u64,
    },
}

/// What a transaction compares first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Compare {
    /// The key was last written at this revision; 0: it is not there.
    ModRevision(Vec<u8>, u64),
    /// The key has this value.
    Value(Vec<u8>, Vec<u8>),
}

/// One step of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Sets a key.
    Put(Vec<u8>, Vec<u8>),
    /// Removes a key, if it is there.
    Delete(Vec<u8>),
}

/// Compare, then one of two.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Txn {
    /// All have to hold for `then`.
    pub(crate) compare: Vec<Compare>,
    /// Done if they do.
    pub(crate) then: Vec<Operation>,
    /// Done if not.
    pub(crate) otherwise: Vec<Operation>,
}

/// How a transaction went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The comparisons held.
    pub(crate) succeeded: bool,
    /// The store's revision after it.
    pub(crate) revision: u64,
}

/// A key as a range shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The key.
    pub(crate) key: Vec<u8>,
    /// Its value.
    pub(crate) value: Vec<u8>,
    /// Revision that wrote it.
    pub(crate) mod_revision: u64,
}

/// A change as a watch shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// Revision that made it.
    pub(crate) revision: u64,
    /// The key.
    pub(crate) key: Vec<u8>,
    /// Its new value; absent: it was removed.
    pub(crate) value: Option<Vec<u8>>,
}

/// Which keys: from `start` on, below `end`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Range {
    /// First key.
    pub(crate) start: Vec<u8>,
    /// First key that is not part of it.
    pub(crate) end: Vec<u8>,
}

impl Range {
    /// All keys that start with `prefix`, which is not empty and does not end in 255.
    pub(crate) fn prefix(prefix: &[u8]) -> Self {
        let mut end = prefix.to_vec();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        Self { start: prefix.to_vec(), end }
    }

    /// Exactly one key.
    pub(crate) fn key(key: &[u8]) -> Self {
        Self { start: key.to_vec(), end: [key, &[0]].concat() }
    }
}

/// A store with one revision counter.
pub(crate) trait Store: Send {
    /// The newest revision; 0 for an empty store.
    fn revision(&self) -> Result<u64, StoreError>;

    /// At most `limit` keys of `range` in order, as they are, or as they were at revision `at`.
    fn range(&self, range: &Range, at: Option<u64>, limit: usize) -> Result<Vec<Entry>, StoreError>;

    /// Compares and writes; when it returns, what it wrote survives a power cut. An error says nothing about whether it
    /// was written: call [`Self::recover`] and look.
    fn txn(&mut self, txn: &Txn) -> Result<Outcome, StoreError>;

    /// At most `limit` changes in `range` from revision `from` on, in order.
    fn watch(&self, range: &Range, from: u64, limit: usize) -> Result<Vec<Event>, StoreError>;

    /// Forgets what was overwritten or removed before `revision`; ranges as of it and later stay possible.
    fn compact(&mut self, revision: u64) -> Result<(), StoreError>;

    /// Makes the store usable again after an error, if the device is.
    fn recover(&mut self) -> Result<(), StoreError>;
}

/// Reads one key.
pub(crate) fn get(store: &dyn Store, key: &[u8]) -> Result<Option<Entry>, StoreError> {
    Ok(store.range(&Range::key(key), None, 1)?.pop())
}
