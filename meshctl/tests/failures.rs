//! What goes wrong: the message says what was tried, on what, and what to do; the exit code says which kind.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "tests")]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;

use support::{Desk, Ran};

#[track_caller]
fn fails(ran: &Ran, code: i32, parts: &[&str]) {
    assert_eq!(ran.code, code, "{ran:?}");
    assert_eq!(ran.out, "", "nothing but results goes to standard output");
    for part in parts {
        assert!(ran.err.contains(part), "'{part}' is missing: {ran:?}");
    }
}

#[test]
fn a_missing_socket_is_named_and_so_is_the_remedy() {
    let desk = Desk::new();
    let node = desk.path("meshd.sock").display().to_string();
    fails(&desk.run("peers"), 1, &["cannot reach meshd", &node, "systemctl start meshd"]);
    fails(&desk.run("token list"), 1, &["cannot reach the keyserver", "--admin-socket"]);
    fails(&desk.run("status"), 1, &["cannot reach meshd", "no keyserver at"]);
    let ran = desk.run("routes --json");
    let error: serde_json::Value = serde_json::from_str(&ran.err).unwrap();
    assert_eq!(error["error"]["code"], "no-socket");
}

#[test]
fn a_socket_left_behind_is_told_from_a_missing_one() {
    let desk = Desk::new();
    drop(UnixListener::bind(desk.path("meshd.sock")).unwrap());
    fails(&desk.run("peers"), 1, &["nobody listens at"]);
    fails(&desk.run("status"), 1, &["nobody listens at"]);
}

#[test]
fn a_path_that_cannot_be_a_socket_is_a_configuration_error() {
    let desk = Desk::new();
    fs::write(desk.path("meshd.sock"), "").unwrap();
    fails(&desk.run("peers"), 78, &["file of another kind"]);
    fails(&desk.run(&format!("peers --socket /{}", "x".repeat(200))), 78, &["longer than 107 bytes"]);
    fails(&desk.run("peers --socket /dev/null/meshd.sock"), 78, &["not a directory"]);
}

#[test]
fn a_user_who_may_not_open_the_socket_is_told_who_may() {
    let desk = Desk::new().node("");
    fs::set_permissions(desk.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(desk.path("meshd.sock"), fs::Permissions::from_mode(0o600)).unwrap();
    if !nix::unistd::Uid::effective().is_root() {
        panic!("this test drops root's rights, so it needs them: run it as root");
    }
    // The nobody of the test may not be able to run the binary where it was built.
    let copy = desk.path("meshctl");
    // Copied by a process of its own: a child that another test forks meanwhile would hold our writable descriptor, and
    // the kernel runs no file that is open for writing (ETXTBSY).
    let copied = std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_meshctl")).arg(&copy).status().unwrap();
    assert!(copied.success());
    let mut command = std::process::Command::new(copy);
    let output =
        command.args(["peers", "--socket"]).arg(desk.path("meshd.sock")).uid(65534).gid(65534).output().unwrap();
    fails(&Ran::of(&output), 1, &["not permitted to open", "run as root"]);
}

#[test]
fn a_refusal_is_passed_on_with_its_code() {
    let reply = "{\"reply\":\"error\",\"code\":\"unknown-node\",\"message\":\"no node is called n7\"}\n";
    let desk = Desk::new().node(reply);
    fails(&desk.run("ping n7"), 1, &["meshd refused: no node is called n7"]);
    let error: serde_json::Value = serde_json::from_str(&desk.run("ping n7 --json").err).unwrap();
    assert_eq!(error["error"]["code"], "unknown-node");
    let reply = "{\"reply\":\"error\",\"code\":\"conflict\",\"message\":\"10.1.0.0/16 is held by east\"}\n";
    fails(&Desk::new().keyserver(reply).run("cluster add west --pod-cidr 10.1.0.0/16"), 1, &["held by east"]);
}

#[test]
fn bytes_that_are_no_reply_are_refused() {
    fails(&Desk::new().node("{\"reply\":\"peers\",\"peers\":[").run("peers"), 1, &["closed the connection"]);
    fails(&Desk::new().node("").run("peers"), 1, &["closed the connection"]);
    fails(&Desk::new().node("hello\n").run("peers"), 1, &["does not understand"]);
    fails(&Desk::new().node("{\"reply\":\"done\"}\n").run("peers"), 1, &["another question"]);
    fails(&Desk::new().node(vec![b'['; 2 << 20]).run("peers"), 1, &["longer than 1048576 bytes"]);
    let deep = format!("{}\n", "[".repeat(100_000));
    fails(&Desk::new().node(deep).run("peers"), 1, &["does not understand"]);
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let desk = Desk::new();
    for words in [
        "",
        "frobnicate",
        "ping n1 -c 0",
        "ping n1 -c 1001",
        "cluster add East --pod-cidr 10.1.0.0/16",
        "cluster add east --pod-cidr 10.1.2.3/16",
        "cluster add east",
        "token create --cluster east --ttl 0s",
        "token create --cluster east --uses 0",
        "keys rotate --local --node n1",
        "node revoke n1 --wait forever",
    ] {
        let ran = desk.run(words);
        assert_eq!(ran.code, 2, "{words}: {ran:?}");
        assert!(ran.err.contains("Usage") || ran.err.contains("--help"), "{words}: {ran:?}");
    }
}
