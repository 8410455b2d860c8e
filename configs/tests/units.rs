//! The systemd units: accepted by systemd itself without a word, and as closed as they claim.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Output};

use mesh_configs::UNITS;

/// A folder with all units, whose programs are replaced by one that exists here.
fn installed(name: &str) -> Vec<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let write = |(file, text): &(&str, &str)| {
        let path = folder.join(file);
        let start = value(text, "ExecStart").unwrap();
        let program = start.split(' ').next().unwrap();
        fs::write(&path, text.replace(program, "/bin/true")).unwrap();
        path
    };
    UNITS.iter().map(write).collect()
}

fn systemd_analyze(arguments: &[&str], units: &[PathBuf]) -> Output {
    let run = Command::new("systemd-analyze").args(arguments).args(units).env("SYSTEMD_LOG_LEVEL", "warning").output();
    run.unwrap_or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => panic!("systemd-analyze is missing: make setup, or apt-get install systemd"),
        _ => panic!("start systemd-analyze: {error}"),
    })
}

/// Value of the last `key=` of a unit.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().rev().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
}

fn words<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).flat_map(str::split_whitespace).collect()
}

#[test]
fn systemd_accepts_every_unit_without_a_word() {
    let units = installed("verify");
    let output = systemd_analyze(&["verify", "--man=no"], &units);
    let said = String::from_utf8_lossy(&output.stderr);
    fs::remove_dir_all(units[0].parent().unwrap()).unwrap();
    assert!(output.status.success() && said.trim().is_empty(), "systemd-analyze verify: {}\n{said}", output.status);
}

#[test]
fn a_wrong_key_would_be_noticed() {
    let units = installed("wrong");
    let text = fs::read_to_string(&units[2]).unwrap().replace("ProtectSystem=", "ProtectSytem=");
    fs::write(&units[2], text).unwrap();
    let output = systemd_analyze(&["verify", "--man=no"], &units);
    fs::remove_dir_all(units[0].parent().unwrap()).unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("ProtectSytem"));
}

#[test]
fn exposure_is_what_systemd_calls_ok() {
    let units = installed("security");
    for (unit, most) in units.iter().zip(["20", "32", "32"]) {
        let threshold = format!("--threshold={most}");
        let output =
            systemd_analyze(&["security", "--offline=yes", "--no-pager", &threshold], std::slice::from_ref(unit));
        let report = String::from_utf8_lossy(&output.stdout).into_owned();
        let verdict = report.lines().last().unwrap_or_default().to_owned();
        assert!(output.status.success(), "{}: more than {most} of 100: {verdict}", unit.display());
    }
    fs::remove_dir_all(units[0].parent().unwrap()).unwrap();
}

#[test]
fn guard_stands_before_the_network_and_meshd_comes_after_it() {
    let guard = mesh_configs::MESH_GUARD_SERVICE;
    assert!(words(guard, "Before").contains(&"network-pre.target"));
    assert!(words(guard, "Wants").contains(&"network-pre.target"), "passive target: somebody has to want it");
    assert!(words(guard, "After").contains(&"nftables.service"), "it flushes everything when it starts");
    assert_eq!(value(guard, "DefaultDependencies"), Some("no"), "else it waits for basic.target");
    assert_eq!(value(guard, "Type"), Some("oneshot"));
    assert_eq!(value(guard, "RemainAfterExit"), Some("yes"));
    let meshd = mesh_configs::MESHD_SERVICE;
    assert!(words(meshd, "Wants").contains(&"mesh-guard.service"));
    assert!(words(meshd, "After").contains(&"mesh-guard.service"));
    assert!(!meshd.contains("Requires=network-online.target") && !meshd.contains("After=network-online.target"));
}

#[test]
fn meshd_may_do_what_it_has_to() {
    let meshd = mesh_configs::MESHD_SERVICE;
    assert_eq!(value(meshd, "Type"), Some("notify"));
    assert_eq!(value(meshd, "RuntimeDirectoryPreserve"), Some("yes"), "mesh-cni finds the path during a restart");
    assert_eq!(value(meshd, "StateDirectoryMode"), Some("0700"));
    assert!(words(meshd, "CapabilityBoundingSet").contains(&"CAP_NET_ADMIN"));
    assert!(words(meshd, "CapabilityBoundingSet").contains(&"CAP_NET_RAW"));
    assert!(words(meshd, "CapabilityBoundingSet").contains(&"CAP_BPF"), "several lanes need the steering program");
    assert!(words(meshd, "SystemCallFilter").contains(&"bpf"), "and the call that loads it");
    assert_eq!(value(meshd, "DeviceAllow"), Some("/dev/net/tun rw"));
    assert_eq!(value(meshd, "PrivateDevices"), None, "would hide /dev/net/tun");
    assert_eq!(value(meshd, "ProtectKernelTunables"), None, "would make /proc/sys/net read-only");
    assert!(words(meshd, "RestrictAddressFamilies").contains(&"AF_NETLINK"));
}

#[test]
fn keyserver_is_nobody_with_one_folder() {
    let keyserver = mesh_configs::KEYSERVER_SERVICE;
    assert_eq!(value(keyserver, "Type"), Some("notify"));
    assert_eq!(value(keyserver, "User"), Some("mesh-keyserver"));
    assert_eq!(words(keyserver, "CapabilityBoundingSet"), Vec::<&str>::new());
    assert_eq!(value(keyserver, "ProtectSystem"), Some("strict"));
    assert_eq!(words(keyserver, "ReadWritePaths"), ["/etc/mesh-keyserver"]);
    assert_eq!(value(keyserver, "RuntimeDirectoryMode"), Some("0700"));
}

#[test]
fn a_wrong_configuration_is_not_retried_for_ever() {
    for unit in [mesh_configs::MESHD_SERVICE, mesh_configs::KEYSERVER_SERVICE] {
        assert_eq!(words(unit, "RestartPreventExitStatus"), ["2", "78"]);
    }
}
