//! The demo: the main job of Mesh on this machine, in network namespaces, by the commands a user types.
//!
//! `DEMO_EXIT=1` ends it by itself; otherwise it stays up to look around until Ctrl-C. The exit code is 0 only if every
//! step held.

use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_e2e::capture::{Marker, new_marker};
use mesh_e2e::report::Report;
use mesh_e2e::traffic::{BulkServer, BulkTransfer, HttpServer, Stream, http_get, ping};
use mesh_e2e::wait;
use mesh_e2e::{Capture, Mesh, Pod};
use nix::sys::signal::{SigSet, Signal};

/// Nodes and their clusters; each of the first four gets two pods.
const NODES: [(&str, &str); 5] =
    [("east-1", "east"), ("east-2", "east"), ("west-1", "west"), ("west-2", "west"), ("onprem-1", "onprem")];
const BULK_BYTES: u64 = 256 << 20;

fn main() -> ExitCode {
    // Before any thread starts: all of them leave these signals to `wait_for_interrupt`.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    if let Err(error) = signals.thread_block() {
        eprintln!("demo: block signals: {error}");
        return ExitCode::FAILURE;
    }
    let mut report = Report::default();
    println!("Mesh on this machine: a keyserver, two clusters and an on-prem machine, in network namespaces.");
    match run(&mut report, &signals) {
        Ok(()) if report.all_held() => ExitCode::SUCCESS,
        Ok(()) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(report: &mut Report, signals: &SigSet) -> Result<()> {
    let marker = new_marker();
    let mut demo = set_up(report)?;
    let capture = Capture::start(&demo.mesh.lab, marker)?;
    reach(report, &demo, marker);
    bulk(report, &demo, marker);
    rotate(report, &demo, marker);
    without_keyserver(report, &mut demo, marker);
    revoke(report, &demo, marker);
    report.section("What the underlay saw");
    report.step("clear text on the underlay", || {
        let seen = capture.stop()?;
        seen.assert_nothing_clear()?;
        let [_, initiations, responses, _, data] = seen.wireguard;
        ensure!(initiations > 0 && responses > 0 && data > 0, "no WireGuard was seen: {seen:?}");
        let total = seen.total();
        Ok(format!("0 of {total} frames; WireGuard: {initiations} initiations, {responses} responses, {data} data"))
    });
    show(&demo)?;
    report.close();
    if std::env::var_os("DEMO_EXIT").is_none() {
        invite(&demo);
        signals.wait().context("wait for Ctrl-C")?;
        println!("\nRemoving everything.");
    }
    Ok(())
}

struct Demo {
    mesh: Mesh,
    pods: Vec<Pod>,
}

impl Demo {
    fn pod(&self, label: &str) -> Result<&Pod> {
        self.pods.iter().find(|pod| pod.label() == label).with_context(|| format!("no pod {label}"))
    }
}

fn set_up(report: &mut Report) -> Result<Demo> {
    report.section("Set up");
    let mut mesh = None;
    report.step("keyserver init, run; three clusters", || {
        let made = Mesh::new("demo")?;
        let directory = made.keyserver_directory().display().to_string();
        mesh = Some(made);
        Ok(directory)
    });
    let mut mesh = mesh.context("without a keyserver there is nothing to show")?;
    for (name, cluster) in NODES {
        report.step(&format!("{name}: token, meshd join, meshd run"), || {
            let at = mesh.add_node(name, cluster)?;
            let status = mesh.nodes[at].status()?;
            Ok(format!("pods {}", list(&status["pod_cidrs"])))
        });
    }
    report.step("every node knows every other", || mesh.wait_settled().map(|()| String::new()));
    let mut pods = Vec::new();
    report.step("two pods on each Kubernetes node (mesh-cni ADD)", || {
        for (node, _) in NODES.iter().filter(|(_, cluster)| *cluster != "onprem") {
            for name in ["a", "b"] {
                pods.push(mesh.pod(node, name)?);
            }
        }
        let shown: Vec<String> = pods.iter().take(3).map(|pod| format!("{} {}", pod.label(), pod.v4())).collect();
        Ok(format!("{}, ..", shown.join(", ")))
    });
    Ok(Demo { mesh, pods })
}

fn reach(report: &mut Report, demo: &Demo, marker: Marker) {
    report.section("Pods reach each other (IPv4, IPv6)");
    for (title, to) in [("same node", "east-1/b"), ("same cluster", "east-2/a"), ("other cluster", "west-1/a")] {
        report.step(&format!("east-1/a to {to}, {title}"), || {
            let (from, to) = (demo.pod("east-1/a")?, demo.pod(to)?);
            Ok(format!("{}, {}", echo(from, to.v4(), marker)?, echo(from, to.v6(), marker)?))
        });
    }
    report.step("east-1/a to the on-prem machine", || {
        let machine = demo.mesh.node("onprem-1");
        let from = demo.pod("east-1/a")?;
        let (v4, v6) = (machine.mesh_address(false)?, machine.mesh_address(true)?);
        Ok(format!("{}, {}", echo(from, v4, marker)?, echo(from, v6, marker)?))
    });
    report.step("HTTP from east-1/a to west-2/b", || {
        let (from, to) = (demo.pod("east-1/a")?, demo.pod("west-2/b")?);
        let secret: String = marker.iter().map(|byte| char::from(*byte % 26 + b'a')).collect();
        let server = HttpServer::start(&to.netns()?, to.v4(), format!("hello from west-2/b, {secret}\n"))?;
        let body = http_get(&from.netns()?, server.address(), &secret)?;
        ensure!(body.contains(&secret), "another body: {body}");
        Ok(format!("\"{}\"", body.split(',').next().unwrap_or_default()))
    });
}

fn bulk(report: &mut Report, demo: &Demo, marker: Marker) {
    report.section("Bulk transfer between clusters");
    report.step("256 MiB east-2/a to west-1/b, every byte checked", || {
        let (from, to) = (demo.pod("east-2/a")?, demo.pod("west-1/b")?);
        let server = BulkServer::start(&to.netns()?, to.v4(), marker)?;
        let client = BulkTransfer::start(&from.netns()?, server.address(), BULK_BYTES, marker)?;
        let (bytes, time) = client.finish()?;
        ensure!(server.finish()? == bytes, "bytes are missing");
        Ok(format!("{:.0} Mbit/s", bytes as f64 * 8.0 / time.as_secs_f64() / 1e6))
    });
}

fn rotate(report: &mut Report, demo: &Demo, marker: Marker) {
    report.section("Rotation of every node's keys under load");
    report.step("meshctl keys rotate, packets counted", || {
        let (from, to) = (demo.pod("east-1/b")?, demo.pod("west-1/a")?);
        let stream = Stream::start(&from.netns()?, &to.netns()?, to.v4(), 5_000, u64::MAX, 200, marker)?;
        wait::until_true("the stream arrives", Duration::from_secs(10), || Ok(stream.arrived() > 100))?;
        let start = Instant::now();
        demo.mesh.admin(&["keys", "rotate", "--wait", "60s"])?;
        let time = start.elapsed();
        wait::until_true("the stream uses the new keys", Duration::from_secs(60), || on_second_keys(demo))?;
        let counts = stream.stop()?;
        ensure!(counts.lost() == 0 && counts.duplicated == 0, "{counts:?}");
        let sent = counts.sent;
        Ok(format!("5 nodes in {} ms; {sent} packets, 0 lost, 0 duplicated", time.as_millis()))
    });
}

/// Whether the first east node sends to the first west node on keys of epoch 2 at both ends.
fn on_second_keys(demo: &Demo) -> Result<bool> {
    let peers = demo.mesh.node("east-1").ctl_json(&["peers"])?;
    let peers = peers.get("peers").cloned().unwrap_or(peers);
    let peer = peers.as_array().into_iter().flatten().find(|peer| peer["name"] == "west-1").cloned();
    let peer = peer.context("east-1 does not know west-1")?;
    let tunnel = &peer["tunnels"][0];
    Ok(tunnel["local_epoch"].as_u64() == Some(2) && tunnel["remote_epoch"].as_u64() == Some(2))
}

fn without_keyserver(report: &mut Report, demo: &mut Demo, marker: Marker) {
    report.section("Without a keyserver");
    report.step("keyserver killed, packets counted", || {
        let (from, to) = (demo.pod("east-1/a")?.netns()?, demo.pod("west-2/a")?.clone());
        let stream = Stream::start(&from, &to.netns()?, to.v4(), 2_000, 6_000, 200, marker)?;
        demo.mesh.kill_keyserver()?;
        let counts = stream.finish()?;
        ensure!(counts.lost() == 0, "{counts:?}");
        Ok(format!("{} packets, 0 lost", counts.sent))
    });
    report.step("meshd killed and started, traffic is back", || {
        let (from, to) = (demo.pod("east-1/a")?.netns()?, demo.pod("west-2/a")?.clone());
        demo.mesh.node_mut("west-2").kill9()?;
        let start = Instant::now();
        demo.mesh.node_mut("west-2").start()?;
        wait::until_true("an echo", Duration::from_secs(10), || {
            Ok(!ping(&from, to.v4(), 1, marker)?.times.is_empty())
        })?;
        Ok(format!("{} ms after the start", start.elapsed().as_millis()))
    });
    report.step("keyserver started again, nodes come back", || {
        demo.mesh.start_keyserver()?;
        wait::until_true("all nodes are connected", Duration::from_secs(60), || {
            let nodes = demo.mesh.admin_json(&["node", "list"])?;
            let nodes = nodes.get("nodes").cloned().unwrap_or(nodes);
            let connected = nodes.as_array().into_iter().flatten().filter(|node| node["connected"].is_string()).count();
            Ok(connected == NODES.len())
        })?;
        Ok(format!("{} connected", NODES.len()))
    });
}

fn revoke(report: &mut Report, demo: &Demo, marker: Marker) {
    report.section("Revocation");
    report.step("meshctl node revoke east-2, 1,000 packets/s", || {
        let (from, to) = (demo.pod("east-2/b")?, demo.pod("west-1/b")?);
        let stream = Stream::start(&from.netns()?, &to.netns()?, to.v4(), 1_000, u64::MAX, 64, marker)?;
        wait::until_true("the stream arrives", Duration::from_secs(10), || Ok(stream.arrived() > 100))?;
        let start = Instant::now();
        let told = demo.mesh.admin(&["node", "revoke", "east-2", "--reason", "shown in the demo"])?;
        let returned = start.elapsed();
        let mut last = (stream.arrived(), start.elapsed());
        while start.elapsed() < returned + Duration::from_millis(1_500) {
            let arrived = stream.arrived();
            if arrived != last.0 {
                last = (arrived, start.elapsed());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        stream.stop()?;
        ensure!(last.1 < Duration::from_secs(1), "packets arrived for {:?}", last.1);
        let line = told.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().trim();
        Ok(format!("last packet accepted after {} ms; {line}", last.1.as_millis()))
    });
    report.step("east-2 is refused, the others go on", || {
        let (from, to) = (demo.pod("east-2/b")?, demo.pod("west-1/b")?);
        if !ping(&from.netns()?, to.v4(), 2, marker)?.times.is_empty() {
            bail!("a revoked node still gets an answer");
        }
        echo(demo.pod("east-1/a")?, to.v4(), marker)
    });
}

fn show(demo: &Demo) -> Result<()> {
    println!("\n== meshctl status, on east-1\n{}", demo.mesh.node("east-1").ctl(&["status"])?);
    println!("== meshctl peers, on east-1\n{}", demo.mesh.node("east-1").ctl(&["peers"])?);
    Ok(())
}

fn invite(demo: &Demo) {
    let node = demo.mesh.node("east-1");
    let directory = mesh_e2e::daemon::binary("meshctl").map(|path| path.display().to_string()).unwrap_or_default();
    println!("\nLook around (Ctrl-C removes everything):");
    println!("  ip netns exec {} {directory} --socket {} peers", node.node.netns_name(), node.socket().display());
    if let Some(pod) = demo.pods.first() {
        println!("  nsenter --net={} ip address", pod.netns_path());
    }
    println!("  files and logs: {}", demo.mesh.lab.directory().display());
}

fn echo(from: &Pod, to: IpAddr, marker: Marker) -> Result<String> {
    // The first packet may have to wait for the handshake.
    let first = ping(&from.netns()?, to, 1, marker)?;
    let echo = ping(&from.netns()?, to, 5, marker)?;
    ensure!(
        first.times.len() + echo.times.len() >= 5 && echo.times.len() == 5,
        "{to}: {} of 5 answered",
        echo.times.len()
    );
    let median = echo.median().unwrap_or_default();
    Ok(format!("{to} {} us", median.as_micros()))
}

fn list(value: &serde_json::Value) -> String {
    let items = value.as_array().into_iter().flatten().filter_map(|item| item.as_str());
    items.collect::<Vec<_>>().join(", ")
}
