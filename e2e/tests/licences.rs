//! What may be linked into Mesh: every crate's licence, source and name against `deny.toml`, on any machine. The advisory
//! database is cargo-deny's part: `make audit`.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod workspace;

use std::collections::BTreeSet;
use std::fs;

use toml::Table;

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

#[test]
fn every_licence_is_allowed() {
    let deny = deny();
    let allowed: BTreeSet<&str> = strings(&deny, "licenses", "allow");
    let refused: Vec<String> = workspace::metadata()
        .packages
        .iter()
        .filter(|package| !package.license.as_deref().is_some_and(|licence| covered(licence, &allowed)))
        .map(|package| {
            format!("{} {}: {}", package.name, package.version, package.license.as_deref().unwrap_or("no licence"))
        })
        .collect();
    assert!(refused.is_empty(), "not covered by deny.toml:\n  {}", refused.join("\n  "));
}

#[test]
fn every_allowed_licence_is_needed() {
    let deny = deny();
    let allowed = strings(&deny, "licenses", "allow");
    let packages = workspace::metadata().packages;
    for dropped in &allowed {
        let fewer: BTreeSet<&str> = allowed.iter().copied().filter(|licence| licence != dropped).collect();
        let needed = packages
            .iter()
            .filter_map(|package| package.license.as_deref())
            .any(|licence| covered(licence, &allowed) && !covered(licence, &fewer));
        assert!(needed, "nothing needs {dropped} any more: take it out of deny.toml");
    }
}

#[test]
fn every_crate_comes_from_crates_io() {
    let foreign: Vec<String> = workspace::metadata()
        .packages
        .iter()
        .filter_map(|package| Some((package, package.source.as_ref()?)))
        .filter(|(_, source)| source.repr != CRATES_IO)
        .map(|(package, source)| format!("{} {} from {source}", package.name, package.version))
        .collect();
    assert!(foreign.is_empty(), "not from crates.io:\n  {}", foreign.join("\n  "));
}

#[test]
fn banned_crates_are_absent() {
    let deny = deny();
    let banned: BTreeSet<&str> =
        deny["bans"]["deny"].as_array().unwrap().iter().map(|ban| ban["crate"].as_str().unwrap()).collect();
    assert!(banned.contains("nftables"), "deny.toml lists bans");
    let packages = workspace::metadata().packages;
    let found: Vec<&str> =
        packages.iter().map(|package| package.name.as_str()).filter(|name| banned.contains(name)).collect();
    assert!(found.is_empty(), "banned by deny.toml: {}", found.join(", "));
}

#[test]
fn expressions_are_judged_as_spdx_means_them() {
    let allowed: BTreeSet<&str> = ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"].into();
    for licence in [
        "MIT",
        "GPL-3.0-only OR MIT",
        "GPL-3.0-only/MIT",
        "MIT AND ISC",
        "MIT AND (GPL-3.0-only OR ISC)",
        "Apache-2.0 WITH LLVM-exception",
        "GPL-3.0-only AND BSL-1.0 OR ISC",
    ] {
        assert!(covered(licence, &allowed), "{licence}");
    }
    for licence in [
        "GPL-3.0-only",
        "MIT AND GPL-3.0-only",
        "Apache-2.0",
        "(MIT OR ISC) AND MPL-2.0",
        "",
        "MIT OR",
        "(MIT",
        "MIT ISC",
    ] {
        assert!(!covered(licence, &allowed), "{licence}");
    }
}

fn deny() -> Table {
    fs::read_to_string(workspace::root().join("deny.toml")).unwrap().parse().unwrap()
}

fn strings<'a>(table: &'a Table, section: &str, key: &str) -> BTreeSet<&'a str> {
    table[section][key].as_array().unwrap().iter().map(|value| value.as_str().unwrap()).collect()
}

/// Whether an SPDX expression holds with `allowed` alone; an expression that does not parse does not hold.
///
/// `AND` binds stronger than `OR` (SPDX 2.3, annex D); `/` is the older spelling of `OR`.
fn covered(expression: &str, allowed: &BTreeSet<&str>) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    let held = any_of(&mut words, allowed);
    held == Some(true) && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any_of(words: &mut Words<'_>, allowed: &BTreeSet<&str>) -> Option<bool> {
    let mut held = all_of(words, allowed)?;
    while words.next_if_eq(&"OR").is_some() {
        held |= all_of(words, allowed)?;
    }
    Some(held)
}

fn all_of(words: &mut Words<'_>, allowed: &BTreeSet<&str>) -> Option<bool> {
    let mut held = one(words, allowed)?;
    while words.next_if_eq(&"AND").is_some() {
        held &= one(words, allowed)?;
    }
    Some(held)
}

fn one(words: &mut Words<'_>, allowed: &BTreeSet<&str>) -> Option<bool> {
    let word = words.next()?;
    if word == "(" {
        let held = any_of(words, allowed)?;
        return (words.next()? == ")").then_some(held);
    }
    if words.next_if_eq(&"WITH").is_some() {
        return Some(allowed.contains(format!("{word} WITH {}", words.next()?).as_str()));
    }
    Some(allowed.contains(word))
}
