//! Daemons die, machines restart, somebody flushes the rules: nothing leaves in the clear, and it comes back.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::capture::{Marker, new_marker};
use mesh_e2e::mesh::scenario;
use mesh_e2e::traffic::{BulkServer, BulkTransfer, Stream, ping};
use mesh_e2e::{Capture, Mesh, Pod, wait};

const PAIR: [(&str, &str); 2] = [("east-1", "east"), ("west-1", "west")];

fn answered(from: &Pod, to: &Pod, marker: Marker) -> Result<bool> {
    Ok(!ping(&from.netns()?, to.v4(), 1, marker)?.times.is_empty())
}

fn pair(mesh: &Mesh) -> Result<(Pod, Pod)> {
    Ok((mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?))
}

#[test]
fn killed_meshd_is_back_within_a_second_without_a_keyserver_and_tcp_survives() {
    scenario("kill", &PAIR, |mesh| {
        let marker = new_marker();
        let (a, b) = pair(mesh)?;
        let capture = Capture::start(&mesh.lab, marker)?;
        let server = BulkServer::start(&b.netns()?, b.v4(), marker)?;
        let client = BulkTransfer::start(&a.netns()?, server.address(), u64::MAX, marker)?;
        let stream = Stream::start(&a.netns()?, &b.netns()?, b.v4(), 1_000, u64::MAX, 64, marker)?;
        wait::until_true("bytes arrive", Duration::from_secs(10), || Ok(server.received() > 1 << 20))?;
        mesh.kill_keyserver()?;
        for name in ["west-1", "east-1"] {
            mesh.node_mut(name).kill9()?;
            let start = Instant::now();
            mesh.node_mut(name).start()?;
            let arrived = stream.arrived();
            wait::until_true("packets arrive again", Duration::from_secs(5), || Ok(stream.arrived() > arrived + 5))?;
            let back = start.elapsed();
            println!("{name}: packets again {back:?} after the start");
            ensure!(back < Duration::from_secs(1), "{name}: back only after {back:?}");
        }
        let received = server.received();
        wait::until_true("the TCP transfer goes on", Duration::from_secs(15), || {
            Ok(server.received() > received + (1 << 20))
        })?;
        stream.stop()?;
        ensure!(client.stop()?.0 == server.finish()?, "bytes are missing");
        capture.stop()?.assert_nothing_clear()
    });
}

#[test]
fn nothing_is_in_the_clear_whatever_is_broken() {
    scenario("closed", &PAIR, |mesh| {
        let marker = new_marker();
        let (a, b) = pair(mesh)?;
        let capture = Capture::start(&mesh.lab, marker)?;
        let streams = [
            Stream::start(&a.netns()?, &b.netns()?, b.v4(), 2_000, u64::MAX, 64, marker)?,
            Stream::start(&a.netns()?, &b.netns()?, b.v6(), 2_000, u64::MAX, 64, marker)?,
            Stream::start(&b.netns()?, &a.netns()?, a.v4(), 2_000, u64::MAX, 64, marker)?,
        ];
        let node = mesh.node("east-1").node.clone();
        let breakages: [(&str, &[&str]); 6] = [
            ("/usr/sbin/ip", &["link", "delete", "mesh0"]),
            ("/usr/sbin/ip", &["link", "set", "mesh0", "down"]),
            ("/usr/sbin/nft", &["flush", "ruleset"]),
            ("/usr/sbin/ip", &["route", "flush", "table", "7100"]),
            ("/usr/sbin/ip", &["rule", "delete", "preference", "400"]),
            ("/usr/sbin/ip", &["-6", "rule", "delete", "preference", "400"]),
        ];
        for (program, args) in breakages {
            wait::until_true("traffic flows", Duration::from_secs(10), || answered(&a, &b, marker))?;
            node.output(program, args)?;
            let start = Instant::now();
            repaired(mesh).with_context(|| format!("after {} {}", program, args.join(" ")))?;
            println!("{} {}: repaired after {:?}", program, args.join(" "), start.elapsed());
            let arrived: Vec<u64> = streams.iter().map(Stream::arrived).collect();
            wait::until_true("all streams go on", Duration::from_secs(10), || {
                Ok(streams.iter().zip(&arrived).all(|(stream, before)| stream.arrived() > *before))
            })?;
        }
        mesh.node_mut("east-1").kill9()?;
        mesh.node_mut("east-1").start()?;
        mesh.node_mut("east-1").stop()?;
        mesh.node_mut("east-1").start()?;
        mesh.admin(&["keys", "rotate", "--wait", "60s"])?;
        // The pod goes while packets are on their way to it, and from it.
        b.detach()?;
        let sent = streams[0].sent();
        wait::until_true("packets go on to the gone pod", Duration::from_secs(10), || {
            Ok(streams[0].sent() > sent + 1_000)
        })?;
        for stream in streams {
            stream.stop()?;
        }
        capture.stop()?.assert_nothing_clear()
    });
}

/// Waits until device, rules, routes and filter of `east-1` are all there, as a person would look: at most two seconds.
fn repaired(mesh: &Mesh) -> Result<()> {
    let node = &mesh.node("east-1").node;
    wait::until("everything is back", Duration::from_secs(2), || {
        let link = node.output("/usr/sbin/ip", &["-o", "link", "show", "dev", "mesh0", "up"])?;
        ensure!(link.contains("mesh0"), "the device is not up");
        let rules = node.output("/usr/sbin/ip", &["rule"])? + &node.output("/usr/sbin/ip", &["-6", "rule"])?;
        ensure!(rules.matches("7100").count() >= 2, "rules: {rules}");
        let routes = node.output("/usr/sbin/ip", &["route", "show", "table", "7100"])?;
        ensure!(routes.contains("10.2.0.0/16 dev mesh0"), "routes: {routes}");
        ensure!(routes.contains("unreachable 10.2.0.0/16"), "routes: {routes}");
        node.output("/usr/sbin/nft", &["list", "table", "inet", "mesh"])?;
        Ok(())
    })
}

#[test]
fn pod_to_a_gone_pod_gets_an_error_and_nothing_leaves() {
    scenario("gone", &PAIR, |mesh| {
        let marker = new_marker();
        let (a, b) = pair(mesh)?;
        ensure!(answered(&a, &b, marker)? || answered(&a, &b, marker)?, "no traffic to begin with");
        let capture = Capture::start(&mesh.lab, marker)?;
        let address = b.v4();
        b.detach()?;
        ensure!(ping(&a.netns()?, address, 2, marker)?.times.is_empty(), "a gone pod answers");
        capture.stop()?.assert_nothing_clear()
    });
}

#[test]
fn pod_is_deleted_while_meshd_is_down_and_its_address_is_free_again() {
    scenario("del", &PAIR, |mesh| {
        let marker = new_marker();
        let (a, b) = pair(mesh)?;
        mesh.node_mut("west-1").kill9()?;
        let output = b.cni("DEL")?;
        ensure!(output.success, "DEL: {output:?}");
        let output = b.cni("DEL")?;
        ensure!(output.success, "DEL again: {output:?}");
        let refused = b.cni("ADD")?;
        ensure!(!refused.success && refused.json["code"] == 11, "ADD without meshd: {refused:?}");
        mesh.node_mut("west-1").start()?;
        wait::until_true("the lease is given back", Duration::from_secs(10), || {
            Ok(mesh.node("west-1").status()?["pods"] == 0)
        })?;
        let next = mesh.pod("west-1", "next")?;
        wait::until_true("the next pod is reached", Duration::from_secs(10), || answered(&a, &next, marker))
    });
}

#[test]
fn node_restarts_with_keyserver_down_and_keeps_its_addresses() {
    scenario("boot", &PAIR, |mesh| {
        let marker = new_marker();
        let a = mesh.pod("east-1", "a")?;
        let before = mesh.node("west-1").status()?;
        mesh.kill_keyserver()?;
        mesh.node_mut("west-1").stop()?;
        // A machine that boots has no device, rule, table or pod left.
        mesh.node("west-1").down()?;
        mesh.node_mut("west-1").start()?;
        let after = mesh.node("west-1").status()?;
        for key in ["node", "name", "addresses", "pod_cidrs"] {
            ensure!(before[key] == after[key], "{key}: {} became {}", before[key], after[key]);
        }
        let b = mesh.pod("west-1", "a")?;
        wait::until_true("traffic is back", Duration::from_secs(10), || answered(&a, &b, marker))
    });
}

#[test]
fn down_removes_what_is_ours_and_nothing_else() {
    scenario("down", &PAIR, |mesh| {
        let node = mesh.node("east-1").node.clone();
        node.output("/usr/sbin/nft", &["add", "table", "inet", "foreign"])?;
        node.output("/usr/sbin/ip", &["rule", "add", "preference", "300", "lookup", "300"])?;
        node.output("/usr/sbin/ip", &["route", "add", "198.51.100.0/24", "dev", "uplink"])?;
        mesh.node("east-1").down()?;
        let left = [
            node.output("/usr/sbin/ip", &["link"])?,
            node.output("/usr/sbin/ip", &["rule"])?,
            node.output("/usr/sbin/ip", &["-6", "rule"])?,
            node.output("/usr/sbin/ip", &["route", "show", "table", "all"])?,
            node.output("/usr/sbin/nft", &["list", "ruleset"])?,
        ]
        .concat();
        ensure!(!left.contains("mesh") && !left.contains("7100"), "left behind:\n{left}");
        for kept in ["table inet foreign", "lookup 300", "198.51.100.0/24"] {
            ensure!(left.contains(kept), "{kept} is gone:\n{left}");
        }
        Ok(())
    });
}
