//! Who may know whom. Arrows between crates come from `cargo metadata`, homes of libraries and of `unsafe` from the sources.
//! ARCHITECTURE.md says why.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod workspace;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The only arrows there may be, of any kind: dependency, build or test.
const ARROWS: &[(&str, &[&str])] = &[
    ("keyserver", &["mesh-protocol"]),
    ("mesh-cni", &["mesh-hostnet", "mesh-protocol"]),
    ("mesh-configs", &[]),
    ("mesh-dataplane", &[]),
    ("mesh-e2e", &["mesh-configs", "mesh-hostnet", "mesh-protocol"]),
    ("mesh-hostnet", &[]),
    ("mesh-protocol", &[]),
    ("mesh-wg", &["mesh-dataplane", "mesh-hostnet"]),
    ("meshctl", &["mesh-protocol"]),
    ("meshd", &["mesh-dataplane", "mesh-hostnet", "mesh-protocol"]),
];

/// Libraries that one place hides from the rest: start of the crate's name in code, and where it may be named.
const HOMES: &[(&str, &[&str])] = &[
    ("boringtun", &["dataplane/src/peer.rs", "dataplane/src/peer/"]),
    ("redb", &["keyserver/src/store.rs", "keyserver/src/store/"]),
    ("netlink_", &["hostnet/src/"]),
    ("rtnetlink", &["hostnet/src/"]),
    ("tun_tap", &["dataplane/src/tun.rs", "dataplane/src/tun/"]),
    ("quinn", &["keyserver/", "meshd/src/control"]),
];

/// Where `unsafe` may be written.
const UNSAFE: &[&str] =
    &["dataplane/src/tun.rs", "dataplane/src/tun/", "dataplane/src/udp.rs", "dataplane/src/udp/", "hostnet/src/"];

#[test]
fn crates_know_only_those_they_may() {
    let metadata = workspace::metadata();
    let members: BTreeSet<&str> = metadata.workspace_packages().iter().map(|package| package.name.as_str()).collect();
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    assert_eq!(members, allowed.keys().copied().collect(), "a crate came or went: say here whom it may know");

    let mut forbidden = Vec::new();
    for package in metadata.workspace_packages() {
        for dependency in &package.dependencies {
            let name = dependency.name.as_str();
            if members.contains(name) && !allowed[package.name.as_str()].contains(&name) {
                forbidden.push(format!("{} -> {name} ({:?})", package.name, dependency.kind));
            }
        }
    }
    assert!(forbidden.is_empty(), "arrows that may not be:\n  {}", forbidden.join("\n  "));
}

#[test]
fn libraries_are_named_at_home_only() {
    let mut strays = Vec::new();
    for_each_code_line(|file, number, code| {
        for (library, homes) in HOMES {
            if names(code, library) && !homes.iter().any(|home| file.starts_with(home)) {
                strays.push(format!("{file}:{number}: {library} belongs into {}", homes.join(" or ")));
            }
        }
    });
    assert!(strays.is_empty(), "libraries away from home:\n  {}", strays.join("\n  "));
}

#[test]
fn unsafe_is_written_at_the_kernel_only() {
    let mut strays = Vec::new();
    for_each_code_line(|file, number, code| {
        let found =
            ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "allow(unsafe_code", "expect(unsafe_code"];
        if found.iter().any(|word| code.contains(word)) && !UNSAFE.iter().any(|home| file.starts_with(home)) {
            strays.push(format!("{file}:{number}: {}", code.trim()));
        }
    });
    assert!(strays.is_empty(), "unsafe outside {}:\n  {}", UNSAFE.join(", "), strays.join("\n  "));
}

#[test]
fn a_library_is_recognised_as_a_path_and_not_as_a_part_of_a_word() {
    assert!(names("use boringtun::noise::Tunn;", "boringtun"));
    assert!(names("    let tunnel = boringtun::x25519::PublicKey::from(bytes);", "boringtun"));
    assert!(names("use netlink_sys::Socket;", "netlink_"));
    assert!(!names("let stored = from_redb_bytes(value);", "redb"));
    assert!(!names("spawn(\"boringtun-cli\")", "boringtun"));
}

/// Whether `code` has a path that begins with a crate whose name begins with `library`.
fn names(code: &str, library: &str) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(library).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let rest = code[at..].trim_start_matches(part_of_word);
        let whole =
            library.ends_with('_') || code[at + library.len()..].chars().next().is_none_or(|c| !part_of_word(c));
        let used = code.trim_start().starts_with("use ") || code.contains("extern crate");
        before.is_none_or(|c| !part_of_word(c))
            && whole
            && (rest.starts_with("::") || (used && rest.starts_with([';', ' ', ','])))
    })
}

/// Hands over every line of Rust in the workspace's crates that is not a comment, this file excepted.
fn for_each_code_line(mut judge: impl FnMut(&str, usize, &str)) {
    let root = workspace::root();
    let mut files = Vec::new();
    for member in workspace::metadata().workspace_packages() {
        let folder = member.manifest_path.parent().unwrap().as_std_path().to_owned();
        for part in ["src", "tests", "benches", "examples"] {
            rust_files(&folder.join(part), &mut files);
        }
    }
    assert!(files.len() > 20, "the sources are not where they were: {} files", files.len());
    for path in files {
        let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        if name == "e2e/tests/layering.rs" {
            continue;
        }
        for (index, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            judge(&name, index + 1, code);
        }
    }
}

fn rust_files(folder: &Path, into: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}
