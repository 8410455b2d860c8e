//! The bench measures what it says, and leaves nothing behind. How fast anything is, is no matter here.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use mesh_e2e::bench::results::Results;
use mesh_e2e::{daemon, wait};
use mesh_hostnet::netns;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn bench() -> Command {
    Command::new(env!("CARGO_BIN_EXE_bench"))
}

/// Runs it, short; gives its results and what it printed.
fn run(args: &[&str]) -> (Results, String) {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("results.json");
    let output = bench().args(["run", "--quick", "--secs", "0.3", "--out"]).arg(&out).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    (Results::read(&out).unwrap(), text)
}

fn assert_measured(results: &Results, candidate: &str, link: &str, figures: &[(&str, &str)]) {
    for (test, figure) in figures {
        let values = results.values(candidate, link, test, figure);
        assert_eq!(values.len(), 1, "{candidate} {link} {test} {figure}: {:#?}", results.samples);
        assert!(values[0] > 0.0, "{candidate} {link} {test} {figure}: {values:?}");
    }
}

const LOADS: &[(&str, &str)] = &[
    ("ping", "idle_p50_us"),
    ("ping", "flood_p50_us"),
    ("rr", "per_second"),
    ("tcp1", "mbit_per_second"),
    ("tcp4", "mbit_per_second"),
    ("udp1400", "packets_per_second"),
    ("udp64", "packets_per_second"),
    ("start", "first_packet_ms"),
];

const OF_DAEMONS: &[(&str, &str)] = &[
    ("start", "start_ms"),
    ("start", "rss_loaded_mib"),
    ("peers", "1000_rss_mib"),
    ("peers", "10000_rss_mib"),
    ("peers", "10000_mbit_per_second"),
];

#[test]
fn every_test_gives_a_figure_for_the_bare_link_and_for_mesh() {
    // `cargo build --workspace --bins` builds it; `cargo test -p` of this crate alone does not.
    let mesh = daemon::binary("mesh-wg").ok();
    let mut args = vec!["--link", "trains", "--only"];
    let path = mesh.as_ref().map(|path| path.display().to_string());
    match &path {
        Some(path) => args.extend(["bare,mesh", "--mesh-wg", path]),
        None => args.push("bare"),
    }
    let (results, text) = run(&args);
    assert_measured(&results, "bare", "trains", LOADS);
    if mesh.is_some() {
        assert_measured(&results, "mesh", "trains", LOADS);
        assert_measured(&results, "mesh", "trains", OF_DAEMONS);
        assert!(text.contains("RSS loaded, MiB [trains]\n  mesh "), "{text}");
    }
    assert!(text.contains("TCP 1 stream, Mbit/s [trains]\n  bare "), "{text}");
}

#[test]
fn a_link_without_offload_and_markdown() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("results.json");
    let run = ["run", "--quick", "--secs", "0.3", "--only", "bare", "--link", "wire", "--tests", "tcp1", "--out"];
    assert!(bench().args(run).arg(&out).stdout(Stdio::null()).status().unwrap().success());
    assert_measured(&Results::read(&out).unwrap(), "bare", "wire", &[("tcp1", "machine_cpu_s_per_gb")]);
    let output = bench().arg("report").arg(&out).arg("--markdown").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("| TCP 1 stream, Mbit/s | "), "{text}");
}

#[test]
fn candidates_that_are_all_up_are_sampled_in_turn() {
    let Ok(mesh) = daemon::binary("mesh-wg") else { return eprintln!("skipped: mesh-wg is not built") };
    let path = mesh.display().to_string();
    let (results, text) = run(&[
        "--together",
        "--only",
        "bare,mesh",
        "--mesh-wg",
        &path,
        "--link",
        "wire",
        "--tests",
        "rr",
        "--rounds",
        "3",
    ]);
    for candidate in ["bare", "mesh"] {
        assert_eq!(results.values(candidate, "wire", "rr", "per_second").len(), 3, "{candidate}: {text}");
    }
    let order: Vec<_> = results.samples.iter().map(|sample| sample.candidate.as_str()).collect();
    assert_eq!(order, ["bare", "mesh", "mesh", "bare", "bare", "mesh"], "none always follows the same neighbour");

    let alone = bench().args(["run", "--together", "--tests", "start"]).output().unwrap();
    assert!(!alone.status.success());
    assert!(String::from_utf8_lossy(&alone.stderr).contains("`start` needs a daemon of its own"), "{alone:?}");
}

#[test]
fn an_interrupted_run_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = bench()
        .args(["run", "--only", "bare", "--tests", "tcp1", "--secs", "600", "--wait-quiet", "0", "--out"])
        .arg(directory.path().join("results.json"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = child.id();
    let prefix = format!("mt{pid}-");
    let own = || netns::list_named().unwrap().into_iter().filter(|name| name.starts_with(&prefix)).count();
    wait::until_true("both links are there", Duration::from_secs(20), || Ok(own() == 6)).unwrap();
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGINT).unwrap();
    let status = wait::until("it ends", Duration::from_secs(20), || {
        child.try_wait()?.ok_or_else(|| anyhow::anyhow!("it still runs"))
    });
    assert_eq!(status.unwrap().code(), Some(1));
    assert_eq!(own(), 0);
    for root in ["/sys/fs/cgroup/cpuacct", "/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        assert!(!Path::new(root).join(format!("mesh-bench-{pid}")).exists());
    }
}

#[test]
fn what_cannot_be_is_refused_in_a_sentence() {
    for (args, message) in [
        (&["run", "--only", "nobody"][..], "no candidate nobody; there are bare"),
        (&["run", "--mesh-wg", "/nowhere/mesh-wg", "--only", "mesh"], "mesh cannot be had here"),
        (&["run", "--secs", "0"], "--secs 0: give 0.1 to 3600"),
        (&["report", "/nowhere/results.json"], "read /nowhere/results.json"),
    ] {
        let output = bench().args(args).output().unwrap();
        assert!(!output.status.success());
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(message), "{args:?}: {text}");
    }
}
