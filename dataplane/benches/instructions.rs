//! Instructions of each part of a packet's way, counted by valgrind: the same whatever else the machine does.
//!
//! Each part is run twice, a few and a few more times, in a process of its own; the difference is what it takes, without
//! what comes before and after. valgrind shows programs an older processor, so these are not the instructions that run
//! without it; ratios carry over.
#![allow(missing_docs, reason = "a bench")]

mod ways;

use std::{
    env,
    hint::black_box,
    process::{Command, Stdio},
};

use mesh_dataplane::packet::flow::FlowHash;
use ways::{Aead, Joiner, Lookup, Pair, TRAIN, Train};

const FEW: u64 = 200;
const MORE: u64 = 1_200;

/// A part: its name, packets each time, what has to be taken off, and what it is compared with.
struct Part {
    name: &'static str,
    /// Count only inside this function, while that other part runs.
    inside: Option<(&'static str, &'static str)>,
    packets: usize,
    less: Option<&'static str>,
    base: Option<&'static str>,
}

const fn part(name: &'static str, less: Option<&'static str>, base: Option<&'static str>) -> Part {
    Part { name, inside: None, packets: 1, less, base }
}

/// The tunnel within a lane.
const fn tunnel(name: &'static str, function: &'static str, lane: &'static str, base: &'static str) -> Part {
    Part { inside: Some((function, lane)), ..part(name, None, Some(base)) }
}

const SEAL: &str = "--toggle-collect=*peer::tunnel::Tunnel::seal*";
const OPEN: &str = "--toggle-collect=*peer::tunnel::Tunnel::open*";

const PARTS: &[Part] = &[
    part("aead seal 64", None, None),
    tunnel("tunnel seal 64", SEAL, "lane seal 64", "aead seal 64"),
    part("lane seal 64", None, Some("aead seal 64")),
    part("aead open 64", Some("aead seal 64"), None),
    tunnel("tunnel open 64", OPEN, "lane open 64", "aead open 64"),
    part("lane open 64", Some("lane seal 64"), Some("aead open 64")),
    part("aead seal 1420", None, None),
    tunnel("tunnel seal 1420", SEAL, "lane seal 1420", "aead seal 1420"),
    part("lane seal 1420", None, Some("aead seal 1420")),
    part("aead open 1420", Some("aead seal 1420"), None),
    tunnel("tunnel open 1420", OPEN, "lane open 1420", "aead open 1420"),
    part("lane open 1420", Some("lane seal 1420"), Some("aead open 1420")),
    Part { packets: TRAIN, ..part("segment", None, None) },
    Part { packets: TRAIN, ..part("segment and seal", None, Some("aead seal 1420")) },
    Part { packets: TRAIN, ..part("coalesce", None, None) },
    part("prefix of 10000 peers", None, None),
    part("lane of a flow", None, None),
];

fn main() {
    let args: Vec<String> = env::args().collect();
    if let [_, verb, name, count] = &args[..]
        && verb == "run"
    {
        return run(name, count.parse().expect("a number"));
    }
    if Command::new("valgrind").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("valgrind is not installed: no instructions are counted");
        return;
    }
    println!("{:<24} {:>14} {:>10}", "", "instructions", "to aead");
    let mut known: Vec<(&str, f64)> = Vec::new();
    for Part { name, inside, packets, less, base } in PARTS {
        let (option, run) = inside.map_or((None, *name), |(option, run)| (Some(option), run));
        let whole = (count(run, MORE, option) - count(run, FEW, option)) / (MORE - FEW) as f64 / *packets as f64;
        if whole == 0.0 {
            println!("{name:<24} {:>14}", "inlined");
            continue;
        }
        let of = |name: &str| known.iter().find(|(other, _)| *other == name).map_or(0.0, |(_, value)| *value);
        let value = whole - less.map_or(0.0, of);
        let ratio = base.map(|base| format!("{:.3}", value / of(base))).unwrap_or_default();
        println!("{name:<24} {value:>14.0} {ratio:>10}");
        known.push((name, value));
    }
}

/// Instructions of this program as it runs a part so many times.
fn count(name: &str, times: u64, option: Option<&str>) -> f64 {
    let own = env::current_exe().expect("this program has a path");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .args(option)
        .arg(own)
        .args(["run", name, &times.to_string()])
        .output()
        .expect("start valgrind");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{name}: {text}");
    let collected = text.lines().find_map(|line| line.split_once("Collected : ")).expect("a number of instructions");
    collected.1.trim().parse().expect("a number of instructions")
}

fn run(name: &str, times: u64) {
    let mut words = name.split(' ');
    let first = words.next().unwrap_or_default();
    let len = name.rsplit(' ').next().and_then(|len| len.parse().ok());
    let opens = words.next() == Some("open");
    match (first, len) {
        ("aead", Some(len)) => aead(len, opens, times),
        ("lane", Some(len)) => lane(len, opens, times),
        _ => other(name, times),
    }
}

fn aead(len: usize, opens: bool, times: u64) {
    let (mut aead, mut buffer) = (Aead::new(), vec![1; len + 16]);
    for _ in 0..times {
        aead.seal(black_box(&mut buffer));
        if opens {
            aead.open(black_box(&mut buffer), 0);
        }
    }
}

fn lane(len: usize, opens: bool, times: u64) {
    let (mut pair, mut packet) = (Pair::new(), ways::datagram(len));
    for _ in 0..times {
        assert_eq!(pair.seal(black_box(&mut packet), len), 1);
        if opens {
            assert_eq!(pair.open_all(), 1);
        }
    }
}

fn other(name: &str, times: u64) {
    let repeat = |mut work: Box<dyn FnMut() -> usize>| {
        for _ in 0..times {
            black_box(work());
        }
    };
    match name {
        "segment" => {
            let mut train = Train::new();
            repeat(Box::new(move || train.cut()));
        }
        "segment and seal" => {
            let (mut pair, mut train) = (Pair::new(), Train::new());
            repeat(Box::new(move || pair.seal_train(&mut train)));
        }
        "coalesce" => {
            let mut joiner = Joiner::new();
            repeat(Box::new(move || joiner.join()));
        }
        "prefix of 10000 peers" => {
            let mut lookup = Lookup::new();
            repeat(Box::new(move || usize::from(lookup.next().is_some())));
        }
        "lane of a flow" => {
            let (hash, packet) = (FlowHash::new([3; 16]), ways::datagram(64));
            repeat(Box::new(move || ways::lane_of(&hash, &packet)));
        }
        _ => panic!("no part is called {name}"),
    }
}
