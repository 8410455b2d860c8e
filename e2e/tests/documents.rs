//! Documents say what the sources say: metrics, drop reasons, alarms, links between pages.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("read {path}: {error}"))
}

/// First cells of the tables below a heading, without backticks.
fn first_cells(page: &str, heading: &str) -> BTreeSet<String> {
    let start = page.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no heading '{heading}'"));
    let section = &page[start + heading.len() + 2..];
    let end = section.find("\n## ").unwrap_or(section.len());
    let cell = |line: &str| line.strip_prefix("| `")?.split('`').next().map(str::to_owned);
    section[..end].lines().filter_map(cell).collect()
}

/// Every literal between double quotes that follows `before` in `source`.
fn quoted_after(source: &str, before: &str) -> BTreeSet<String> {
    source.split(before).skip(1).filter_map(|rest| rest.split('"').next()).map(str::to_owned).collect()
}

#[test]
fn every_drop_reason_is_explained() {
    let source = read("dataplane/src/drop_reason.rs");
    let list = source.split("drop_reasons! {").last().unwrap().split("\n}").next().unwrap();
    let reasons = quoted_after(list, " = \"");
    assert!(reasons.len() > 20, "the list is not where it was: {reasons:?}");
    assert_eq!(first_cells(&read("docs/metrics.md"), "## Reasons"), reasons);
}

/// Metrics explained below a heading, without what the text format adds to counters.
fn explained(heading: &str) -> BTreeSet<String> {
    let names = first_cells(&read("docs/metrics.md"), heading);
    names.iter().map(|name| name.trim_end_matches("_total").to_owned()).collect()
}

#[test]
fn every_metric_is_explained() {
    let meshd = read("meshd/src/metrics.rs");
    let meshd = quoted_after(meshd.split("#[cfg(test)]").next().unwrap(), "\"mesh_");
    assert_eq!(explained("## meshd"), meshd.iter().map(|name| format!("mesh_{name}")).collect());
    let keyserver = quoted_after(&read("keyserver/src/metrics.rs"), ".register(\"");
    assert_eq!(explained("## keyserver"), keyserver.iter().map(|name| format!("mesh_keyserver_{name}")).collect());
    assert!(meshd.len() > 10 && keyserver.len() > 10, "they are not where they were");
}

#[test]
fn every_alarm_says_what_to_do() {
    let mut alarms = quoted_after(&read("meshd/src/directory/alarms.rs"), ": &str = \"");
    for file in ["meshd/src/app.rs", "meshd/src/app/follow.rs"] {
        alarms.extend(quoted_after(&read(file), "alarms.set(\""));
    }
    assert!(alarms.len() > 12, "they are not where they were: {alarms:?}");
    assert_eq!(first_cells(&read("docs/operating.md"), "## Alarms"), alarms);
}

#[test]
fn tests_that_the_threat_model_names_exist() {
    let page = read("docs/security.md");
    let named: BTreeSet<(&str, &str)> =
        page.split('`').skip(1).step_by(2).filter_map(|code| code.split_once("::")).collect();
    assert!(named.len() > 30, "they are not where they were: {named:?}");
    let lost = named.iter().filter(|(file, test)| {
        let source = fs::read_to_string(root().join(format!("{file}.rs"))).unwrap_or_default();
        let is_test = |before: &str| before.lines().rev().take(4).any(|line| line.contains("test]"));
        let at = source.find(&format!("fn {test}("));
        // A property test has its attribute inside the macro, as any other.
        !at.is_some_and(|at| is_test(&source[..at]))
    });
    assert_eq!(lost.collect::<Vec<_>>(), Vec::<&(&str, &str)>::new(), "no such tests");
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut pages = Vec::new();
    markdown(&root(), &mut pages);
    assert!(pages.len() > 10);
    let mut broken = Vec::new();
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            if !link.contains("://") && !file.is_empty() && !page.parent().unwrap().join(file).exists() {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "links to nowhere:\n  {}", broken.join("\n  "));
}

/// Our own pages: the top, `docs` and below, `configs`.
fn markdown(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() && ["docs", "adr"].contains(&name.as_str()) {
            markdown(&path, into);
        } else if name.ends_with(".md") {
            into.push(path);
        }
    }
}
