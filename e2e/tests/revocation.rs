//! A revoked node is gone.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use anyhow::ensure;
use mesh_e2e::capture::new_marker;
use mesh_e2e::mesh::scenario;
use mesh_e2e::traffic::{Stream, ping};
use mesh_e2e::wait;

#[test]
fn revoked_node_is_cut_off_within_a_second_for_good() {
    scenario("revoke", &[("east-1", "east"), ("east-2", "east"), ("west-1", "west")], |mesh| {
        let marker = new_marker();
        let (bad, good, target) = (mesh.pod("east-2", "a")?, mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        let stream = Stream::start(&bad.netns()?, &target.netns()?, target.v4(), 1_000, u64::MAX, 64, marker)?;
        wait::until_true("the stream arrives", Duration::from_secs(10), || Ok(stream.arrived() > 100))?;
        let start = Instant::now();
        mesh.admin(&["node", "revoke", "east-2", "--reason", "test"])?;
        let mut last = (stream.arrived(), Duration::ZERO);
        while start.elapsed() < Duration::from_secs(4) {
            if stream.arrived() != last.0 {
                last = (stream.arrived(), start.elapsed());
            }
            std::thread::yield_now();
        }
        stream.stop()?;
        println!("last packet accepted {:?} after the command began", last.1);
        ensure!(last.1 < Duration::from_secs(1), "packets were accepted for {:?}", last.1);

        // It may not come back by restarting, nor enrol again, and the others do not care.
        mesh.node_mut("east-2").kill9()?;
        let bad_node = mesh.node("east-2");
        let state = bad_node.node.directory().join("state");
        // Its membership is forgotten, its identity kept: the keyserver has to say no.
        std::fs::remove_file(state.join("membership"))?;
        std::fs::remove_file(state.join("directory"))?;
        let again = bad_node.join(&mesh.token("east")?);
        ensure!(again.as_ref().is_err_and(|error| error.to_string().contains("revoked")), "enrolled again: {again:?}");
        ensure!(ping(&bad.netns()?, target.v4(), 2, marker)?.times.is_empty(), "it still gets answers");
        ensure!(ping(&good.netns()?, target.v4(), 3, marker)?.times.len() >= 2, "the others are disturbed");

        // Nor after everybody restarts from disk without a keyserver.
        mesh.kill_keyserver()?;
        mesh.node_mut("west-1").kill9()?;
        mesh.node_mut("west-1").start()?;
        let peers = mesh.node("west-1").ctl_json(&["peers"])?.to_string();
        ensure!(!peers.contains("east-2"), "west-1 has it back after a restart: {peers}");
        Ok(())
    });
}
