//! TOML, JSON and sysusers files are well formed and say what the programs rely on.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;

use serde_json::json;
use toml::Table;

/// Files that TOML parsers and people read: as shipped, and with every default taken in.
fn both(text: &str) -> (Table, Table) {
    (text.parse().unwrap(), mesh_configs::with_defaults_shown(text).parse().unwrap())
}

/// Every key in it, `section.key`.
fn keys(table: &Table) -> Vec<String> {
    table
        .iter()
        .flat_map(|(name, value)| match value.as_table() {
            Some(section) => section.keys().map(|key| format!("{name}.{key}")).collect(),
            None => vec![name.clone()],
        })
        .collect()
}

#[test]
fn daemons_files_parse_with_and_without_the_defaults_shown() {
    for text in [mesh_configs::MESHD_TOML, mesh_configs::KEYSERVER_TOML] {
        let (shipped, shown) = both(text);
        assert!(keys(&shown).len() > keys(&shipped).len(), "no default is shown");
    }
}

#[test]
fn every_key_has_a_comment_above() {
    for text in [mesh_configs::MESHD_TOML, mesh_configs::KEYSERVER_TOML] {
        for paragraph in text.split("\n\n") {
            let holds_key = paragraph.lines().any(|line| !line.starts_with("# ") && line.contains(" = "));
            let explains = paragraph.lines().any(|line| line.starts_with("# "));
            assert!(!holds_key || explains, "keys without a word about them:\n{paragraph}");
        }
    }
}

#[test]
fn fixed_numbers_are_those_of_the_documents() {
    let (_, meshd) = both(mesh_configs::MESHD_TOML);
    assert_eq!(meshd["device"]["port"].as_integer(), Some(7100));
    assert_eq!(meshd["device"]["name"].as_str(), Some("mesh0"));
    assert_eq!(meshd["host"]["table"].as_integer(), Some(7100));
    assert_eq!(meshd["host"]["rule_preference"].as_integer(), Some(400));
    assert_eq!(meshd["host"]["route_protocol"].as_integer(), Some(71));
    assert_eq!(meshd["host"]["mark"].as_integer(), Some(0x40));
    let metrics: SocketAddr = meshd["metrics"]["listen"].as_str().unwrap().parse().unwrap();
    assert!(metrics.ip().is_loopback());
}

#[test]
fn conflist_is_one_that_old_and_new_runtimes_take() {
    let conflist: serde_json::Value = serde_json::from_str(mesh_configs::CONFLIST).unwrap();
    assert_eq!(conflist["cniVersion"], "1.0.0", "libcni 1.1 knows nothing newer");
    assert_eq!(conflist["cniVersions"], json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    assert_eq!(conflist["name"], "mesh");
    assert_eq!(conflist["plugins"][0]["type"], "mesh-cni", "the file name of the plugin");
}

#[test]
fn sysusers_names_the_users_and_groups_of_the_units() {
    let lines: Vec<&str> = mesh_configs::SYSUSERS.lines().filter(|line| !line.starts_with('#')).collect();
    assert!(lines.iter().any(|line| line.starts_with("g mesh ")));
    let user = mesh_configs::KEYSERVER_SERVICE.lines().find_map(|line| line.strip_prefix("User=")).unwrap();
    assert!(lines.iter().any(|line| line.starts_with(&format!("u {user} "))));
}
