//! Thousands of peers that are known and say nothing.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod lab;

use std::{
    fmt::Write as _,
    fs, thread,
    time::{Duration, Instant},
};

use lab::{Device, Kind, Lab};

/// Resident memory in MiB.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

/// How often its threads have begun to wait: one that wakes up has to.
fn waits(pid: u32) -> u64 {
    let task = |entry: std::io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(entry.ok()?.path().join("status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?.trim().parse::<u64>().ok()
    };
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().filter_map(task).sum()
}

#[test]
fn they_cost_little_memory_and_no_time() {
    let lab = Lab::new();
    for (count, most) in [(1_000u32, 30), (10_000, 64)] {
        let device = Device::start(&lab.a, &Kind::MeshWg);
        device.ip("link set {} up");
        let mut request = format!("set=1\nprivate_key={}\n", "11".repeat(32));
        for n in 0..count {
            let [_, a, b, c] = n.to_be_bytes();
            writeln!(request, "public_key={n:064x}\nendpoint=192.0.2.{c}:{}", 1_000 + n).unwrap();
            writeln!(request, "allowed_ip=10.{a}.{b}.{c}/32\nallowed_ip=fd00::{n:x}/128").unwrap();
        }
        assert_eq!(device.uapi(&format!("{request}\n")), "errno=0\n\n");
        assert_eq!(device.uapi("get=1\n\n").matches("public_key=").count(), count as usize);
        let memory = resident(device.pid());
        eprintln!("{count} peers: {memory} MiB");
        assert!(memory <= most, "{memory} MiB with {count} peers");
        // Whatever goes on after the last operation ends; then a second without a single wake-up has to come.
        let deadline = Instant::now() + lab::PATIENCE;
        loop {
            let before = waits(device.pid());
            thread::sleep(Duration::from_secs(1));
            if waits(device.pid()) == before {
                break;
            }
            assert!(Instant::now() < deadline, "it wakes up again and again");
        }
    }
}
