//! The contract of [`Store`], run against each backend: a backend brings a function that opens an empty store.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::FileExt as _;

use super::{Compare, Embedded, Event, Operation, Range, Store, StoreError, Txn};

fn put(key: &str, value: &str) -> Operation {
    Operation::Put(key.into(), value.into())
}

fn write(store: &mut dyn Store, operations: Vec<Operation>) -> u64 {
    store.txn(&Txn { then: operations, ..Txn::default() }).unwrap().revision
}

fn values(store: &dyn Store, prefix: &str, at: Option<u64>) -> Vec<(String, String)> {
    let entries = store.range(&Range::prefix(prefix.as_bytes()), at, 100).unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    entries.into_iter().map(|entry| (text(entry.key), text(entry.value))).collect()
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Every promise of the trait.
fn contract(store: &mut dyn Store) {
    assert_eq!(store.revision().unwrap(), 0);
    assert_eq!(write(store, vec![put("a/1", "x"), put("a/2", "y"), put("b", "z")]), 1);
    assert_eq!(write(store, vec![put("a/1", "x2"), Operation::Delete("a/2".into())]), 2);
    assert_eq!(write(store, vec![Operation::Delete("nothing".into())]), 2, "what changes nothing has no revision");
    ranges_and_earlier_revisions(store);
    comparisons(store);
    watches(store);
    compaction(store);
}

fn ranges_and_earlier_revisions(store: &mut dyn Store) {
    assert_eq!(values(store, "a/", None), pairs(&[("a/1", "x2")]));
    assert_eq!(values(store, "a/", Some(1)), pairs(&[("a/1", "x"), ("a/2", "y")]));
    assert_eq!(store.range(&Range::key(b"a/1"), None, 9).unwrap()[0].mod_revision, 2);
    assert_eq!(store.range(&Range::prefix(b"a/"), Some(1), 1).unwrap().len(), 1, "the limit holds");
    assert!(matches!(store.range(&Range::key(b"b"), Some(9), 1), Err(StoreError::NoRevision { .. })));
}

fn comparisons(store: &mut dyn Store) {
    let absent = Compare::ModRevision("new".into(), 0);
    let txn = Txn { compare: vec![absent], then: vec![put("new", "1")], otherwise: vec![put("other", "1")] };
    assert!(store.txn(&txn).unwrap().succeeded);
    let second = store.txn(&txn).unwrap();
    assert!(!second.succeeded);
    assert_eq!(values(store, "other", None), pairs(&[("other", "1")]));
    let value = Compare::Value("new".into(), "1".into());
    let at = Compare::ModRevision("new".into(), 3);
    assert!(store.txn(&Txn { compare: vec![value, at], ..Txn::default() }).unwrap().succeeded);
}

fn watches(store: &mut dyn Store) {
    let seen = store.watch(&Range::prefix(b"a/"), 1, 100).unwrap();
    let event = |revision, key: &str, value: Option<&str>| Event {
        revision,
        key: key.into(),
        value: value.map(|value| value.as_bytes().to_vec()),
    };
    let all =
        [event(1, "a/1", Some("x")), event(1, "a/2", Some("y")), event(2, "a/1", Some("x2")), event(2, "a/2", None)];
    assert_eq!(seen, all);
    assert_eq!(store.watch(&Range::prefix(b"a/"), 2, 1).unwrap(), all[2..3]);
}

fn compaction(store: &mut dyn Store) {
    let before = store.range(&Range { start: vec![0], end: vec![255] }, None, 100).unwrap();
    store.compact(2).unwrap();
    assert_eq!(store.range(&Range { start: vec![0], end: vec![255] }, None, 100).unwrap(), before);
    assert_eq!(values(store, "a/", Some(2)), pairs(&[("a/1", "x2")]));
    assert!(matches!(store.range(&Range::key(b"b"), Some(1), 1), Err(StoreError::NoRevision { .. })));
    assert!(matches!(store.watch(&Range::prefix(b"a/"), 2, 1), Err(StoreError::NoRevision { .. })));
    assert!(store.watch(&Range::prefix(b"a/"), 3, 1).unwrap().is_empty());
}

#[test]
fn embedded_keeps_the_contract() {
    let folder = tempfile::tempdir().unwrap();
    contract(&mut Embedded::create(&folder.path().join("store")).unwrap());
}

#[test]
fn keys_with_any_bytes_keep_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Embedded::create(&folder.path().join("store")).unwrap();
    let keys: [&[u8]; 5] = [&[1], &[1, 0], &[1, 0, 0], &[1, 0, 255], &[1, 1]];
    let puts = keys.iter().map(|key| Operation::Put(key.to_vec(), key.to_vec())).collect();
    write(&mut store, puts);
    let found = store.range(&Range::prefix(&[1]), Some(1), 9).unwrap();
    assert_eq!(found.iter().map(|entry| entry.key.as_slice()).collect::<Vec<_>>(), keys);
}

#[test]
fn a_second_keyserver_is_locked_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let _first = Embedded::create(&path).unwrap();
    assert!(matches!(Embedded::open(&path), Err(StoreError::Locked(_))));
}

#[test]
fn damage_is_found_at_open() {
    let folder = tempfile::tempdir().unwrap();
    let good = folder.path().join("good");
    let mut store = Embedded::create(&good).unwrap();
    for number in 0..200 {
        write(&mut store, vec![put(&format!("key/{number}"), &"v".repeat(1000))]);
    }
    drop(store);
    assert!(Embedded::open(&good).is_ok());
    let length = std::fs::metadata(&good).unwrap().len();
    for (at, keep) in [length - 1, length - 4096, length / 2, 100].into_iter().enumerate() {
        let cut = folder.path().join(format!("cut{at}"));
        std::fs::copy(&good, &cut).unwrap();
        std::fs::File::options().write(true).open(&cut).unwrap().set_len(keep).unwrap();
        assert!(matches!(Embedded::open(&cut), Err(StoreError::Damaged { .. })), "cut to {keep} of {length}");
    }
    let flipped = folder.path().join("flipped");
    std::fs::copy(&good, &flipped).unwrap();
    let bytes = std::fs::read(&flipped).unwrap();
    let at = bytes.windows(100).rposition(|window| window.iter().all(|byte| *byte == b'v')).unwrap();
    let hits: Vec<usize> = (0..=at).rev().filter(|at| bytes[*at..].starts_with(&[b'v'; 100])).step_by(997).collect();
    let file = std::fs::File::options().write(true).open(&flipped).unwrap();
    for hit in hits {
        file.write_all_at(b"w", hit as u64).unwrap();
    }
    assert!(matches!(Embedded::open(&flipped), Err(StoreError::Damaged { .. })));
}
