//! The shipped configurations, judged by the daemons themselves.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use mesh_e2e::daemon::binary;

/// What `program check-config` says of a file with this text.
fn check(program: &str, text: &str) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("shipped.toml");
    fs::write(&file, text).unwrap();
    run(program, &file)
}

fn run(program: &str, file: &Path) -> Output {
    Command::new(binary(program).expect("build the programs first: make build"))
        .arg("check-config")
        .arg(file)
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

#[test]
fn daemons_take_their_files_as_shipped_and_with_every_default_shown() {
    for (program, text) in [("meshd", mesh_configs::MESHD_TOML), ("keyserver", mesh_configs::KEYSERVER_TOML)] {
        for text in [text.to_owned(), mesh_configs::with_defaults_shown(text)] {
            let output = check(program, &text);
            assert!(output.status.success(), "{program}: {}: {}\n{text}", output.status, said(&output));
        }
    }
}

#[test]
fn a_wrong_key_is_refused_with_its_line_and_exit_code_78() {
    for (program, text) in [("meshd", mesh_configs::MESHD_TOML), ("keyserver", mesh_configs::KEYSERVER_TOML)] {
        let output = check(program, &format!("{text}\nno_such_key = 1\n"));
        assert_eq!(output.status.code(), Some(78), "{program}: {}", said(&output));
        let line = text.lines().count() + 2;
        assert!(said(&output).contains(&format!("shipped.toml:{line}:")), "{program}: {}", said(&output));
        assert!(said(&output).contains("no_such_key"), "{program}: {}", said(&output));
    }
}

#[test]
fn a_missing_file_is_a_matter_of_configuration() {
    for program in ["meshd", "keyserver"] {
        let output = run(program, Path::new("/nonexistent/mesh.toml"));
        assert_eq!(output.status.code(), Some(78), "{program}: {}", said(&output));
        assert!(said(&output).contains("/nonexistent/mesh.toml"), "{program}: {}", said(&output));
    }
}
