//! A path that becomes too narrow without a word: transfers go on, and it climbs back.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::capture::new_marker;
use mesh_e2e::mesh::scenario;
use mesh_e2e::traffic::{BulkServer, BulkTransfer, Stream};
use mesh_e2e::{Mesh, wait};
use mesh_hostnet::Handle;
use mesh_hostnet::link::LinkChange;
use serde_json::Value;

/// What a stalled transfer may cost.
const STALL: Duration = Duration::from_secs(3);
/// What a search may take, on a busy machine.
const SEARCH: Duration = Duration::from_secs(15);
/// Until a wider path is looked for again, with the search.
const CLIMB: Duration = Duration::from_secs(45);

#[test]
fn a_transfer_survives_a_path_that_shrinks_to_1280_ipv4() {
    shrink("pmtu4", false);
}

#[test]
fn a_transfer_survives_a_path_that_shrinks_to_1280_ipv6() {
    shrink("pmtu6", true);
}

fn shrink(name: &str, v6_underlay: bool) {
    scenario(name, &[("east-1", "east"), ("west-1", "west")], |mesh| {
        for node in ["east-1", "west-1"] {
            prepare(mesh, node, v6_underlay)?;
        }
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        let marker = new_marker();
        let (mut servers, mut transfers) = (Vec::new(), Vec::new());
        for to in [b.v4(), b.v6()] {
            let server = BulkServer::start(&b.netns()?, to, marker)?;
            transfers.push(BulkTransfer::start(&a.netns()?, server.address(), u64::MAX, marker)?);
            servers.push(server);
        }
        let found = wait_for(mesh, "confirmed", SEARCH, |path| path["state"] == "confirmed")?;
        let endpoint = found["endpoint"].as_str().unwrap_or_default();
        ensure!(endpoint.starts_with('[') == v6_underlay, "{found}");
        let header = if v6_underlay { 80 } else { 60 };
        ensure!(found["path_mtu"] == 1420 + header && found["inner_mtu"] == 1420, "{found}");
        wait::until_true("both transfers run", SEARCH, || {
            Ok(servers.iter().all(|server| server.received() > 1 << 20))
        })?;

        set_mtu(mesh, 1280)?;
        let stalls = longest_stalls(&servers, Duration::from_secs(8));
        println!("{name}: longest stalls over IPv4 and IPv6: {stalls:?}");
        ensure!(stalls.iter().all(|stall| *stall < STALL), "transfers stalled: {stalls:?}");
        let found = wait_for(mesh, "a black hole", SEARCH, |path| path["state"] == "black-hole")?;
        ensure!((1272..=1280).contains(&found["path_mtu"].as_u64().unwrap_or(0)), "{found}");
        ensure!(found["inner_mtu"] == 1280 && found["black_holes"].as_u64() >= Some(1), "{found}");
        // What a link has to carry at least, 1280 bytes with headers: it goes in pieces. The flow may be on a lane that has yet to
        // find out, within three seconds of five.
        for (to, headers) in [(b.v4(), 28), (b.v6(), 48)] {
            let stream = Stream::start(&a.netns()?, &b.netns()?, to, 50, 250, 1280 - headers, marker)?;
            let counts = stream.finish()?;
            ensure!(counts.received >= 80, "most of 250 datagrams to {to} are missing: {counts:?}");
        }

        set_mtu(mesh, 1500)?;
        let wide_again = |path: &Value| path["inner_mtu"] == 1420 && path["black_holes"].as_u64() >= Some(1);
        wait_for(mesh, "wide again", CLIMB, |path| path["state"] == "confirmed" && wide_again(path))?;
        for (transfer, server) in transfers.into_iter().zip(servers) {
            ensure!(transfer.stop()?.0 == server.finish()?, "bytes are missing");
        }
        Ok(())
    });
}

/// Makes a link carry datagrams one by one, as a NIC does: trains pass whatever the MTU. With IPv6 alone, if so wanted.
fn prepare(mesh: &Mesh, name: &str, v6_underlay: bool) -> Result<()> {
    let node = &mesh.node(name).node;
    node.output("ethtool", &["-K", "uplink", "gso", "off", "tso", "off", "tx-udp-segmentation", "off"])?;
    if v6_underlay {
        for line in [
            "add table inet only6",
            "add chain inet only6 out { type filter hook output priority 0; }",
            "add rule inet only6 out meta nfproto ipv4 udp dport 7100-7107 drop",
        ] {
            node.output("nft", &[line])?;
        }
    }
    Ok(())
}

/// Sets the MTU of the other end of the first node's link. That node goes on sending what its own end allows, and what is too
/// large is dropped there without a word; so it is on the way back.
fn set_mtu(mesh: &Mesh, mtu: u32) -> Result<()> {
    let host = mesh.node("east-1").node.v4().octets()[3];
    mesh.lab.router()?.run(|| -> Result<()> {
        let mut handle = Handle::open()?;
        let port = handle.link_by_name(&format!("port{host}"))?.map(|link| link.index);
        handle.change_link(port.unwrap_or_default(), &LinkChange::new().mtu(mtu))?;
        Ok(())
    })?
}

/// The longest time in which nothing arrived, for each transfer.
fn longest_stalls(servers: &[BulkServer], time: Duration) -> Vec<Duration> {
    let start = Instant::now();
    let mut stalls = vec![(0, start, Duration::ZERO); servers.len()];
    while start.elapsed() < time {
        std::thread::sleep(Duration::from_millis(5));
        for ((received, since, longest), server) in stalls.iter_mut().zip(servers) {
            let now = server.received();
            if now > *received {
                (*received, *since) = (now, Instant::now());
            }
            *longest = (*longest).max(since.elapsed());
        }
    }
    stalls.into_iter().map(|(_, _, longest)| longest).collect()
}

/// A path from the first node to the second, of one of the lanes, once it is as wanted. A lane without traffic does not look.
fn wait_for(mesh: &Mesh, what: &str, limit: Duration, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    wait::until(&format!("a path is {what}"), limit, || {
        let report = mesh.node("east-1").ctl_json(&["path", "west-1"])?;
        let found = report["paths"].as_array().context("no paths")?.iter().find(|path| wanted(path));
        found.cloned().with_context(|| report.to_string())
    })
}
