//! Nodes talk to each other inside their tunnels: news needs no keyserver, and nobody else has a say there.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::capture::new_marker;
use mesh_e2e::mesh::{Mesh, scenario};
use mesh_e2e::traffic::ping;
use mesh_e2e::wait;

/// UDP port on mesh addresses.
const PORT: u16 = 7190;

/// Cuts one node off from the keyserver, and waits until both ends noticed.
fn cut_off(mesh: &Mesh, name: &str) -> Result<()> {
    let keyserver = format!("{}/32", mesh.keyserver_node().v4());
    mesh.node(name).node.output("ip", &["route", "add", "blackhole", &keyserver])?;
    wait::until_true(&format!("{name} is cut off"), Duration::from_secs(40), || {
        let list = mesh.admin_json(&["node", "list"])?;
        let nodes = list["nodes"].as_array().context("no nodes")?;
        let online = nodes.iter().any(|node| node["name"] == name && node["connected"].is_string());
        Ok(!online && mesh.node(name).status()?["control"]["connected"] == false)
    })
}

fn knows(mesh: &Mesh, node: &str, peer: &str) -> Result<bool> {
    let peers = mesh.node(node).ctl_json(&["peers"])?;
    Ok(peers["peers"].as_array().context("no peers")?.iter().any(|known| known["name"] == peer))
}

#[test]
fn a_revocation_reaches_a_node_without_a_keyserver_and_pods_have_no_say() {
    scenario("exchange", &[("bad", "east"), ("near", "east"), ("far", "west")], |mesh| {
        let marker = new_marker();
        let (bad, near, far) = (mesh.pod("bad", "a")?, mesh.pod("near", "a")?, mesh.pod("far", "a")?);
        for pod in [&bad, &near] {
            wait::until_true("pods reach far", Duration::from_secs(20), || {
                Ok(!ping(&pod.netns()?, far.v4(), 1, marker)?.times.is_empty())
            })?;
        }
        wait::until_true("peers acknowledge each other's record", Duration::from_secs(40), || {
            let seq = mesh.node("near").status()?["keys"]["seq"].clone();
            let peers = mesh.node("near").ctl_json(&["peers"])?;
            Ok(peers["peers"].as_array().context("no peers")?.iter().all(|peer| peer["acknowledged_seq"] == seq))
        })?;
        closed_to_pods(mesh)?;

        cut_off(mesh, "far")?;
        ensure!(knows(mesh, "far", "bad")?, "far forgot a peer when it was cut off");
        mesh.admin(&["node", "revoke", "bad", "--reason", "test"])?;
        wait::until_true("far hears of it from near", Duration::from_secs(20), || Ok(!knows(mesh, "far", "bad")?))?;
        ensure!(ping(&bad.netns()?, far.v4(), 2, marker)?.times.is_empty(), "it still gets answers");
        ensure!(!ping(&near.netns()?, far.v4(), 3, marker)?.times.is_empty(), "the others are disturbed");
        // Checkpoints are passed on: exposure does not run while a peer hears from a keyserver.
        let age = || mesh.node("far").status()?["control"]["checkpoint_age"].as_u64().context("no age");
        wait::until_true("a checkpoint is passed on", Duration::from_secs(120), || Ok(age()? < 5))?;

        // It stays so over a restart without any keyserver.
        mesh.kill_keyserver()?;
        mesh.node_mut("far").kill9()?;
        mesh.node_mut("far").start()?;
        ensure!(!knows(mesh, "far", "bad")?, "far has it back after a restart");
        Ok(())
    });
}

/// A datagram of a pod to the port, on its own node and on another one, is dropped before anybody reads it.
fn closed_to_pods(mesh: &Mesh) -> Result<()> {
    let pod = mesh.pod("near", "prober")?;
    let dropped = || -> Result<u64> {
        let listed = mesh.node("near").node.output("nft", &["list", "table", "inet", "mesh"])?;
        let rule = listed.lines().find(|line| line.contains("no node speaks there")).context("no such rule")?;
        let packets = rule.split("packets ").nth(1).and_then(|rest| rest.split(' ').next()).context("no counter")?;
        Ok(packets.parse()?)
    };
    let before = dropped()?;
    for node in ["near", "far"] {
        let to = mesh.node(node).mesh_address(false)?;
        let source = pod.v4();
        pod.netns()?.run(move || -> std::io::Result<()> {
            let socket = std::net::UdpSocket::bind((source, PORT))?;
            socket.send_to(b"hello", (to, PORT)).map(|_| ())
        })??;
    }
    wait::until_true("both datagrams are dropped", Duration::from_secs(5), || Ok(dropped()? >= before + 2))
}
