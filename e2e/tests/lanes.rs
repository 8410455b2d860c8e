//! Nodes of several lanes: flows spread over them, and go by lane 0 where a port is closed.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_e2e::capture::new_marker;
use mesh_e2e::mesh::scenario;
use mesh_e2e::traffic::{BulkServer, BulkTransfer};
use mesh_e2e::{Mesh, MeshNode, Pod, wait};

/// Enough flows that both lanes have some, but for one case in 2^23.
const FLOWS: usize = 24;

/// Starts the node anew with so many lanes, or with what is the default.
fn restart(node: &mut MeshNode, lanes: Option<u8>) -> Result<()> {
    node.stop()?;
    let text = std::fs::read_to_string(node.config())?;
    let text = text.split("\n[device]").next().unwrap_or_default().to_owned();
    let device = lanes.map(|lanes| format!("\n[device]\nlanes = {lanes}\n")).unwrap_or_default();
    std::fs::write(node.config(), text + &device)?;
    node.start()
}

/// Bytes over many streams, each checked.
fn flows(a: &Pod, b: &Pod) -> Result<()> {
    let marker = new_marker();
    for n in 0..FLOWS {
        let server = BulkServer::start(&b.netns()?, if n % 2 == 0 { b.v4() } else { b.v6() }, marker)?;
        let client = BulkTransfer::start(&a.netns()?, server.address(), 100_000, marker)?;
        ensure!(client.finish()?.0 == server.finish()?, "bytes are missing");
    }
    Ok(())
}

/// What `meshctl peers` of a node says of its one peer.
fn peer(node: &MeshNode) -> Result<serde_json::Value> {
    Ok(node.ctl_json(&["peers"])?["peers"][0].clone())
}

fn lanes_of(node: &MeshNode) -> Result<u64> {
    Ok(node.status()?["device"]["lanes"].as_u64().unwrap_or_default())
}

#[test]
fn flows_spread_over_lanes_and_go_by_lane_0_where_a_port_is_closed() {
    scenario("lanes", &[("east-1", "east"), ("west-1", "west")], |mesh| {
        for name in ["east-1", "west-1"] {
            restart(mesh.node_mut(name), Some(2))?;
        }
        mesh.wait_settled()?;
        let [east, west] = ["east-1", "west-1"].map(|name| mesh.node(name));
        ensure!((lanes_of(east)?, lanes_of(west)?) == (2, 2), "lanes: {}", east.status()?["device"]);
        // Each hears of the other's lanes by its record.
        wait::until_true("both know of two lanes", Duration::from_secs(20), || {
            Ok(peer(east)?["lanes"] == 2 && peer(west)?["lanes"] == 2)
        })?;
        flows(&mesh.pod("east-1", "a")?, &mesh.pod("west-1", "a")?)?;
        let seen = peer(east)?;
        for lane in [0, 1] {
            let used = |tunnel: &&serde_json::Value| tunnel["lane"] == lane && tunnel["confirmed"] == true;
            ensure!(seen["tunnels"].as_array().is_some_and(|all| all.iter().any(|tunnel| used(&tunnel))), "{seen}");
        }
        ensure!(seen["blocked_lanes"].as_array().is_some_and(Vec::is_empty), "{seen}");
        let stray: u64 = east.status()?["dropped"]["wrong_lane"].as_u64().unwrap_or_default();
        ensure!(stray == 0, "{stray} handshakes reached another lane than theirs");
        Ok(())
    });
}

#[test]
fn a_closed_port_is_shown_and_costs_no_packet() {
    scenario("blocked", &[("east-1", "east"), ("west-1", "west")], |mesh| {
        let nft = |mesh: &Mesh, args: &[&str]| mesh.node("west-1").node.output("/usr/sbin/nft", args).map(drop);
        nft(mesh, &["add", "table", "inet", "closed"])?;
        nft(mesh, &["add", "chain", "inet", "closed", "in", "{ type filter hook prerouting priority -400 ; }"])?;
        nft(mesh, &["add", "rule", "inet", "closed", "in", "udp", "dport", "7101", "drop"])?;
        for name in ["east-1", "west-1"] {
            restart(mesh.node_mut(name), Some(2))?;
        }
        mesh.wait_settled()?;
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        flows(&a, &b)?;
        let east = mesh.node("east-1");
        wait::until_true("the pair of lanes is shown as blocked", Duration::from_secs(20), || {
            Ok(peer(east)?["blocked_lanes"] == serde_json::json!([{ "local": 1, "remote": 1 }]))
        })?;
        let text = east.ctl(&["peers"])?;
        ensure!(text.contains("1-1 blocked: by lane 0"), "{text}");
        flows(&a, &b)
    });
}
