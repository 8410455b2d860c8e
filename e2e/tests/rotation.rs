//! Keys rotate and nobody notices.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::capture::new_marker;
use mesh_e2e::mesh::scenario;
use mesh_e2e::traffic::Stream;
use mesh_e2e::{Mesh, wait};

/// Packets of the stream: a million, unless `MESH_E2E_PACKETS` says otherwise.
fn packets() -> u64 {
    std::env::var("MESH_E2E_PACKETS").ok().and_then(|count| count.parse().ok()).unwrap_or(1_000_000)
}

fn tunnel_epochs(mesh: &Mesh, node: &str, peer: &str) -> Result<(u64, u64)> {
    let peers = mesh.node(node).ctl_json(&["peers"])?;
    let peers = peers.get("peers").cloned().unwrap_or(peers);
    let peer = peers.as_array().into_iter().flatten().find(|found| found["name"] == peer).cloned();
    let tunnel = peer.context("peer unknown")?["tunnels"][0].clone();
    let epoch = |side: &str| tunnel[side].as_u64().context("no tunnel");
    Ok((epoch("local_epoch")?, epoch("remote_epoch")?))
}

/// Where east-1 sends what is for west-1, which has an IPv4 address and an IPv6 address.
fn endpoint(mesh: &Mesh) -> Result<serde_json::Value> {
    Ok(mesh.node("east-1").ctl_json(&["peers"])?["peers"][0]["endpoint"].clone())
}

#[test]
fn rotation_of_all_nodes_loses_no_packet_of_a_million() {
    scenario("rotate", &[("east-1", "east"), ("west-1", "west")], |mesh| {
        let marker = new_marker();
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        let total = packets();
        let rate = 10_000;
        let stream = Stream::start(&a.netns()?, &b.netns()?, b.v4(), rate, total, 64, marker)?;
        wait::until_true("the stream arrives", Duration::from_secs(10), || Ok(stream.arrived() > 1_000))?;
        let (mut epoch, endpoint) = (1, endpoint(mesh)?);
        while stream.sent() + u64::from(rate) * 10 < total {
            // Ten rotations over the stream: every packet of some seconds on each pair of keys.
            wait::until_true("its part of the stream is sent", Duration::from_secs(120), || {
                Ok(stream.sent() >= total / 10 * epoch || stream.sent() + u64::from(rate) * 10 >= total)
            })?;
            epoch += 1;
            mesh.admin(&["keys", "rotate", "--force", "--wait", "60s"])?;
            wait::until_true("packets use the new keys", Duration::from_secs(60), || {
                Ok(tunnel_epochs(mesh, "east-1", "west-1")? == (epoch, epoch))
            })?;
            let now = self::endpoint(mesh)?;
            ensure!(
                now == endpoint,
                "a rotation moved the tunnel from {endpoint} to {now}, which nothing was wrong with"
            );
        }
        let counts = stream.finish()?;
        println!("{counts:?} over {} rotations of both nodes", epoch - 1);
        ensure!(epoch > 1, "no rotation happened");
        let whole = counts.sent == total && counts.lost() == 0 && counts.duplicated == 0;
        ensure!(whole, "{counts:?}\n{}", dropped(mesh)?);
        Ok(())
    });
}

/// Who dropped something: the daemons by their own count, the kernel by its links' and sockets'.
fn dropped(mesh: &Mesh) -> Result<String> {
    let mut said = String::new();
    for name in ["east-1", "west-1"] {
        let node = mesh.node(name);
        let links = node.node.output("/usr/sbin/ip", &["-s", "link"])?;
        let sockets =
            node.node.output("/usr/bin/cat", &["/proc/net/snmp", "/proc/net/snmp6", "/proc/net/softnet_stat"])?;
        let udp: Vec<&str> = sockets.lines().filter(|line| line.contains("Udp") || line.contains("0000")).collect();
        said += &format!("{name}: {}\n{links}\n{}\n", node.status()?["dropped"], udp.join("\n"));
    }
    Ok(said)
}

#[test]
fn node_away_during_a_rotation_comes_back() {
    scenario("away", &[("east-1", "east"), ("west-1", "west")], |mesh| {
        let marker = new_marker();
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        mesh.node_mut("west-1").stop()?;
        mesh.admin(&["keys", "rotate", "--node", "east-1", "--wait", "60s"])?;
        // It starts from its disk and knows nothing of the rotation.
        mesh.kill_keyserver()?;
        mesh.node_mut("west-1").start()?;
        wait::until_true("traffic is back on the old key", Duration::from_secs(10), || {
            Ok(!mesh_e2e::traffic::ping(&b.netns()?, a.v4(), 1, marker)?.times.is_empty())
        })
    });
}

#[test]
fn one_node_rotates_by_its_own_socket() {
    scenario("local", &[("east-1", "east"), ("west-1", "west")], |mesh| {
        mesh.node("east-1").ctl(&["keys", "rotate", "--local"])?;
        let status = mesh.node("east-1").status()?;
        ensure!(status["keys"]["current"] == 2, "{status}");
        let again = mesh.node("east-1").ctl(&["keys", "rotate", "--local"]);
        ensure!(again.is_err(), "a second rotation within a day was not refused");
        Ok(())
    });
}
