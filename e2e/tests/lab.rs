//! The lab itself: it connects, it sees, it leaves nothing behind.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use mesh_e2e::capture::new_marker;
use mesh_e2e::traffic::{BulkServer, BulkTransfer, Stream, ping};
use mesh_e2e::{Capture, Lab, wait};
use mesh_hostnet::netns;

#[test]
fn nodes_reach_each_other_and_clear_text_is_seen() {
    let mut lab = Lab::new("clear").unwrap();
    let (a, b) = (lab.node("a").unwrap(), lab.node("b").unwrap());
    let marker = new_marker();
    let capture = Capture::start(&lab, marker).unwrap();
    for address in [b.v4().into(), b.v6().into()] {
        let echo = ping(&a.netns().unwrap(), address, 2, marker).unwrap();
        assert_eq!(echo.times.len(), 2, "{address}: {echo:?}");
    }
    let stream =
        Stream::start(&a.netns().unwrap(), &b.netns().unwrap(), b.v4().into(), 5_000, 1_000, 100, marker).unwrap();
    let counts = stream.finish().unwrap();
    assert_eq!((counts.sent, counts.lost(), counts.duplicated), (1_000, 0, 0), "{counts:?}");
    let seen = capture.stop().unwrap();
    assert!(seen.marked >= 1_008, "{seen:?}");
    assert!(seen.assert_nothing_clear().is_err());
}

#[test]
fn bulk_bytes_are_checked() {
    let mut lab = Lab::new("bulk").unwrap();
    let (a, b) = (lab.node("a").unwrap(), lab.node("b").unwrap());
    let marker = new_marker();
    let server = BulkServer::start(&b.netns().unwrap(), b.v4().into(), marker).unwrap();
    let client = BulkTransfer::start(&a.netns().unwrap(), server.address(), 3_000_000, marker).unwrap();
    assert_eq!(client.finish().unwrap().0, 3_000_000);
    assert_eq!(server.finish().unwrap(), 3_000_000);
}

#[test]
fn a_panic_leaves_nothing_behind() {
    let panicked = std::panic::catch_unwind(|| {
        let mut lab = Lab::new("panic").unwrap();
        let node = lab.node("a").unwrap();
        std::panic::panic_any((node.netns_name().to_owned(), lab.directory().to_owned()));
    });
    let (name, logs) = *panicked.unwrap_err().downcast::<(String, std::path::PathBuf)>().unwrap();
    // The logs stay, for whoever looks for the reason: that is this test, and it is done.
    std::fs::remove_dir_all(logs).unwrap();
    assert!(!netns::list_named().unwrap().contains(&name));
}

#[test]
fn a_killed_process_leaves_nothing_behind() {
    // The process to be killed is this test itself, run once more with a lab to hold.
    if std::env::var_os("MESH_LAB_HOLD").is_some() {
        let mut lab = Lab::new("killed").unwrap();
        let node = lab.node("a").unwrap();
        let mut child = node.command("sleep").unwrap().arg("1000").spawn().unwrap();
        println!("HELD {} {}", node.netns_name(), child.id());
        child.wait().unwrap();
    }
    let mut held = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_process_leaves_nothing_behind", "--nocapture"])
        .env("MESH_LAB_HOLD", "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(held.stdout.take().unwrap()).lines();
    let line = lines.find_map(|line| Some(line.unwrap().split_once("HELD ")?.1.to_owned())).unwrap();
    let (name, child) = line.split_once(' ').unwrap();
    assert!(netns::list_named().unwrap().contains(&name.to_owned()));
    held.kill().unwrap();
    held.wait().unwrap();
    wait::until_true("namespace and process are gone", Duration::from_secs(20), || {
        let running = std::fs::read_to_string(format!("/proc/{child}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
        Ok(!running && !netns::list_named()?.contains(&name.to_owned()))
    })
    .unwrap();
}
