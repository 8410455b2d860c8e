//! What fuzzing found, and seeds for it, are judged without harm.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use mesh_wg::{
    interface::Interface,
    uapi::{Parser, Request},
};

#[test]
fn the_corpus_is_harmless() {
    let mut count = 0;
    for file in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/uapi")).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        let (mut parser, mut interface) = (Parser::default(), Interface::default());
        for line in bytes.split(|byte| *byte == b'\n') {
            if let Ok(Some(Request::Set(change))) = parser.line(line) {
                interface.apply(change);
            }
        }
        count += 1;
    }
    assert!(count > 0);
}
