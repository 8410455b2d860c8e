//! Tunnels have preshared keys from key offers, unless the mesh was made without; nothing makes them weaker.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::capture::new_marker;
use mesh_e2e::daemon::binary;
use mesh_e2e::mesh::scenario;
use mesh_e2e::traffic::ping;
use mesh_e2e::{Capture, Mesh, wait};
use serde_json::Value;

const PAIR: [(&str, &str); 2] = [("east-1", "east"), ("west-1", "west")];

fn peer_of(mesh: &Mesh, node: &str) -> Result<Value> {
    let peers = mesh.node(node).ctl_json(&["peers"])?;
    peers["peers"].get(0).cloned().context("no peer")
}

#[test]
fn a_new_mesh_is_post_quantum_and_says_so() {
    scenario("pq", &PAIR, |mesh| {
        let marker = new_marker();
        let capture = Capture::start(&mesh.lab, marker)?;
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        // New tunnels, while somebody listens.
        mesh.node_mut("west-1").stop()?;
        mesh.node_mut("west-1").start()?;
        wait::until_true("pods talk", Duration::from_secs(10), || {
            Ok(!ping(&a.netns()?, b.v4(), 1, marker)?.times.is_empty())
        })?;
        for node in ["east-1", "west-1"] {
            let peer = peer_of(mesh, node)?;
            ensure!(peer["post_quantum"] == true && peer["post_quantum_required"] == true, "{node}: {peer}");
            ensure!(mesh.node(node).status()?["peers_post_quantum"] == 1, "{node}");
            let table = mesh.node(node).ctl(&["peers"])?;
            ensure!(
                table.lines().next().is_some_and(|head| head.contains(" PQ ")) && table.contains(" yes "),
                "{table}"
            );
        }
        let seen = capture.stop()?;
        ensure!(seen.offers > 0, "{seen:?}");
        seen.assert_nothing_clear()
    });
}

#[test]
fn without_offers_there_is_no_tunnel_and_never_a_weaker_one() {
    scenario("pqcut", &PAIR, |mesh| {
        let marker = new_marker();
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        let nodes = ["east-1", "west-1"];
        for name in nodes {
            // 1188 bytes and the UDP header. Everything else passes: handshakes too.
            let rules = "table inet strip { chain in { type filter hook input priority 0; udp dport 7100-7107 udp length 1196 drop; }; }";
            // One by one, as on a plain card: offer and initiation go as one train otherwise.
            mesh.node(name).node.output("ethtool", &["-K", "uplink", "tx-udp-segmentation", "off"])?;
            mesh.node(name).node.output("nft", &["-f", &rule_file(mesh, name, rules)?])?;
        }
        for name in nodes {
            mesh.node_mut(name).kill9()?;
            mesh.node_mut(name).start()?;
        }
        let missing = |name: &str| -> Result<u64> {
            Ok(mesh.node(name).status()?["dropped"]["missing_key"].as_u64().unwrap_or(0))
        };
        wait::until_true("initiations without a key are dropped", Duration::from_secs(20), || {
            let _ = ping(&a.netns()?, b.v4(), 1, marker)?;
            Ok(missing("east-1")? + missing("west-1")? > 3)
        })?;
        ensure!(ping(&a.netns()?, b.v4(), 2, marker)?.times.is_empty(), "a packet passed");
        for name in nodes {
            let peer = peer_of(mesh, name)?;
            ensure!(peer["up"] == false && peer["post_quantum"] == false, "{name}: {peer}");
            ensure!(
                peer["tunnels"].as_array().is_some_and(|all| all.iter().all(|one| one["confirmed"] == false)),
                "{peer}"
            );
        }
        for name in nodes {
            mesh.node(name).node.output("nft", &["delete", "table", "inet", "strip"])?;
        }
        wait::until_true("pods talk again", Duration::from_secs(20), || {
            Ok(!ping(&a.netns()?, b.v4(), 1, marker)?.times.is_empty())
        })?;
        ensure!(peer_of(mesh, "east-1")?["post_quantum"] == true);
        Ok(())
    });
}

#[test]
fn a_mesh_made_without_has_plain_tunnels_and_sends_no_offer() {
    let mesh = Mesh::bare("pqoff").and_then(|mut mesh| off(&mut mesh).map(|()| mesh));
    mesh.unwrap_or_else(|error| panic!("{error:#}"));
}

fn off(mesh: &mut Mesh) -> Result<()> {
    let marker = new_marker();
    let directory = mesh.keyserver_directory();
    let directory = directory.to_str().context("a path in UTF-8")?;
    let node = mesh.keyserver_node().clone();
    let address = format!("{}:7443", node.v4());
    let init = ["init", "--dir", directory, "--name", "lab", "--address", &address, "--pq", "off"];
    node.output(binary("keyserver")?, &init)?;
    mesh.keep_admin_socket_here()?;
    mesh.start_keyserver()?;
    for cluster in ["east", "west"] {
        let pool = if cluster == "east" { "10.1.0.0/16" } else { "10.2.0.0/16" };
        mesh.admin(&["cluster", "add", cluster, "--pod-cidr", pool, "--node-prefix", "24"])?;
    }
    let capture = Capture::start(&mesh.lab, marker)?;
    for (name, cluster) in PAIR {
        mesh.add_node(name, cluster)?;
    }
    mesh.wait_settled()?;
    let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
    wait::until_true("pods talk", Duration::from_secs(10), || {
        Ok(!ping(&a.netns()?, b.v4(), 1, marker)?.times.is_empty())
    })?;
    let peer = peer_of(mesh, "east-1")?;
    ensure!(peer["up"] == true && peer["post_quantum"] == false && peer["post_quantum_required"] == false, "{peer}");
    let seen = capture.stop()?;
    ensure!(seen.offers == 0 && seen.wireguard[1] > 0, "{seen:?}");
    seen.assert_nothing_clear()
}

/// Writes nft rules where the lab removes them.
fn rule_file(mesh: &Mesh, node: &str, rules: &str) -> Result<String> {
    let path = mesh.lab.directory().join(format!("strip-{node}.nft"));
    std::fs::write(&path, rules)?;
    path.to_str().map(str::to_owned).context("a path in UTF-8")
}
