//! A rotation in waves goes on when anything in it is killed, and every node rotates exactly once.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::capture::new_marker;
use mesh_e2e::mesh::scenario;
use mesh_e2e::{Mesh, wait};
use serde_json::Value;

const NODES: [(&str, &str); 3] = [("east-1", "east"), ("west-1", "west"), ("onprem-1", "onprem")];
const PATIENCE: Duration = Duration::from_secs(60);

fn job(mesh: &Mesh) -> Result<Value> {
    let shown = mesh.admin_json(&["keys", "status"])?;
    Ok(shown["jobs"][0].clone())
}

fn wait_done(mesh: &Mesh) -> Result<Value> {
    wait::until("the rotation is over", PATIENCE, || {
        let job = job(mesh)?;
        ensure!(job["state"] == "done", "{job}");
        Ok(job)
    })
}

/// Every node is at this epoch, neither before it nor beyond.
fn all_are_at(mesh: &Mesh, epoch: u64) -> Result<()> {
    for node in &mesh.nodes {
        let current = node.status()?["keys"]["current"].as_u64().context("no epoch")?;
        ensure!(current == epoch, "{} is at epoch {current}", node.node.name());
    }
    Ok(())
}

fn pods_reach_each_other(mesh: &Mesh, pods: &[mesh_e2e::Pod]) -> Result<()> {
    for (from, to) in pods.iter().zip(pods.iter().cycle().skip(1)) {
        let netns = from.netns()?;
        wait::until_true("a pod reaches the next one", PATIENCE, || {
            Ok(!mesh_e2e::traffic::ping(&netns, to.v4(), 1, new_marker())?.times.is_empty())
        })
        .with_context(|| mesh.logs())?;
    }
    Ok(())
}

#[test]
fn a_rotation_in_waves_survives_the_end_of_every_daemon() {
    scenario("job", &NODES, |mesh| {
        let pods: Vec<_> = NODES.iter().map(|(node, _)| mesh.pod(node, "a")).collect::<Result<_>>()?;
        pods_reach_each_other(mesh, &pods)?;
        // Which daemon dies at which moment: after the order, and after each wave is promoted.
        for round in 0..4_u64 {
            let expected = round + 2;
            let ordered = mesh.admin_json(&["keys", "rotate", "--all", "--force", "--wave", "34%", "--wait", "1s"]);
            // What is not through within a second is no failure of the job.
            drop(ordered);
            match round {
                0 => {
                    mesh.kill_keyserver()?;
                    mesh.start_keyserver()?;
                }
                1 => {
                    for (node, _) in NODES {
                        mesh.node_mut(node).kill9()?;
                        mesh.node_mut(node).start()?;
                    }
                }
                2 => {
                    mesh.node_mut("west-1").kill9()?;
                    mesh.kill_keyserver()?;
                    mesh.start_keyserver()?;
                    mesh.node_mut("west-1").start()?;
                }
                _ => {}
            }
            let over = wait_done(mesh)?;
            ensure!(over["total"] == 3 && over["confirmed"] == 3, "{over}");
            all_are_at(mesh, expected)?;
            pods_reach_each_other(mesh, &pods)?;
        }
        Ok(())
    });
}

#[test]
fn a_node_away_for_several_rotations_comes_back_and_is_asked_then() {
    scenario("longaway", &NODES[..2], |mesh| {
        let pods: Vec<_> = NODES[..2].iter().map(|(node, _)| mesh.pod(node, "a")).collect::<Result<_>>()?;
        mesh.node_mut("west-1").stop()?;
        // Its peer's key of before is wiped by the second one: as if it had been away for days.
        for _ in 0..3 {
            mesh.admin(&["keys", "rotate", "--node", "east-1", "--force", "--wait", "60s"])?;
        }
        let waiting = mesh.admin_json(&["keys", "rotate", "--wait", "5s"]);
        ensure!(waiting.is_err(), "east-1 has to refuse without force: {waiting:?}");
        let held = job(mesh)?;
        ensure!(held["state"] == "waiting" && held["offline"] == 1 && held["failed"][0]["node"] == "east-1", "{held}");
        mesh.node_mut("west-1").start()?;
        pods_reach_each_other(mesh, &pods)?;
        let over = wait_done(mesh)?;
        ensure!(over["confirmed"] == 1, "{over}");
        ensure!(mesh.node("west-1").status()?["keys"]["current"] == 2, "it was asked when it came");
        let local = mesh.node("east-1").ctl_json(&["keys", "status", "--local"])?;
        ensure!(local["current"] == 4 && local["rotates_in"].as_u64().is_some_and(|left| left > 23 * 3600), "{local}");
        wait::until("the peer follows", PATIENCE, || {
            let local = mesh.node("east-1").ctl_json(&["keys", "status", "--local"])?;
            let peer = &local["peers"][0];
            ensure!(peer["phase"] == "confirmed" || peer["phase"] == "retired", "{local}");
            Ok(())
        })
    });
}
