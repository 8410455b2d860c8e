//! Without news for as long as the policy allows, a node closes its tunnels, and says how much is left until then.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::capture::new_marker;
use mesh_e2e::mesh::{MeshNode, scenario};
use mesh_e2e::traffic::ping;
use mesh_e2e::wait;
use mesh_protocol::id::sha256;

/// What the first policy of a mesh says unless told otherwise, in seconds.
const EXPOSURE: u32 = 7 * 86_400;
/// What the node has left when it starts again: a little more than it takes to see that all works.
const LEFT: u32 = 30;

/// Lets a stopped node have run for so long without a checkpoint: the file that counts it, over restarts.
fn has_run_for(node: &MeshNode, seconds: u32) -> Result<()> {
    let mut bytes = b"mesh runtime 1\n".to_vec();
    // { 0: seconds, 1: wall clock 0, 2: nobody was up, 3: no endpoints }
    bytes.extend([&[0xa4, 0x00, 0x1a][..], &seconds.to_be_bytes(), &[0x01, 0x00, 0x02, 0x80, 0x03, 0x80]].concat());
    let check = sha256(&[&bytes]);
    bytes.extend(check);
    Ok(std::fs::write(node.node.directory().join("state/runtime"), bytes)?)
}

#[test]
fn tunnels_close_when_exposure_ends_and_open_with_the_next_checkpoint() {
    scenario("exposure", &[("a", "east"), ("b", "west")], |mesh| {
        let marker = new_marker();
        let (pod_a, pod_b) = (mesh.pod("a", "p")?, mesh.pod("b", "p")?);
        let reaches = || Ok(!ping(&pod_b.netns()?, pod_a.v4(), 1, marker)?.times.is_empty());
        wait::until_true("b reaches a", Duration::from_secs(20), reaches)?;
        mesh.kill_keyserver()?;
        mesh.node_mut("a").stop()?;
        has_run_for(mesh.node("a"), EXPOSURE - LEFT)?;
        mesh.node_mut("a").start()?;
        let control = || -> Result<(u64, u64)> {
            let status = mesh.node("a").status()?;
            let control = &status["control"];
            let number = |field: &str| control[field].as_u64().with_context(|| format!("no {field}"));
            Ok((number("exposure")?, number("exposure_left")?))
        };
        let (bound, left) = control()?;
        ensure!(bound == u64::from(EXPOSURE) && left <= u64::from(LEFT), "bound {bound}, left {left}");
        let text = mesh.node("a").ctl(&["status"])?;
        ensure!(text.contains("tunnels close after"), "{text}");
        wait::until_true("b reaches a while it lasts", Duration::from_secs(20), reaches)?;
        wait::until_true("the tunnels are closed", Duration::from_secs(120), || Ok(!reaches()? && control()?.1 == 0))?;
        let up = mesh.node("a").status()?["peers_up"].clone();
        ensure!(up == 0, "{up} peers are up");
        mesh.start_keyserver()?;
        wait::until_true("a checkpoint opens them", Duration::from_secs(60), reaches)?;
        Ok(())
    });
}
