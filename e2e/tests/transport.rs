//! The keyserver's own key is replaced under traffic; nodes stay, also one that was away all the time.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_e2e::capture::new_marker;
use mesh_e2e::daemon::binary;
use mesh_e2e::mesh::scenario;
use mesh_e2e::traffic::Stream;
use mesh_e2e::{Mesh, wait};

const PATIENCE: Duration = Duration::from_secs(60);

fn rotate(mesh: &Mesh) -> Result<String> {
    let config = mesh.keyserver_directory().join("keyserver.toml");
    let config = config.to_string_lossy().into_owned();
    mesh.keyserver_node().output(binary("keyserver")?, &["keys", "rotate", "transport", "--config", &config])
}

fn key_file(mesh: &Mesh, name: &str) -> Option<String> {
    fs::read_to_string(mesh.keyserver_directory().join("keys").join(name)).ok()
}

fn wait_connected(mesh: &Mesh, node: &str, policy: u64) -> Result<()> {
    wait::until(&format!("{node} is connected, with policy {policy}"), PATIENCE, || {
        let status = mesh.node(node).status()?;
        ensure!(status["control"]["connected"] == true && status["policy_version"] == policy, "{status}");
        Ok(())
    })
}

#[test]
fn the_keyservers_key_is_replaced_under_traffic_and_a_node_that_was_away_follows() {
    scenario("transport", &[("east-1", "east"), ("west-1", "west"), ("onprem-1", "onprem")], |mesh| {
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        let token = mesh.token("east")?;
        let before = key_file(mesh, "transport");
        let policy = mesh.node("east-1").status()?["policy_version"].as_u64().unwrap();
        mesh.node_mut("onprem-1").stop()?;
        let netns = a.netns()?;
        wait::until_true("the pods reach each other", PATIENCE, || {
            Ok(!mesh_e2e::traffic::ping(&netns, b.v4(), 1, new_marker())?.times.is_empty())
        })?;
        let stream = Stream::start(&a.netns()?, &b.netns()?, b.v4(), 1_000, u64::MAX, 64, new_marker())?;
        wait::until_true("the stream arrives", PATIENCE, || Ok(stream.arrived() > 100))?;
        let said = rotate(mesh)?;
        ensure!(said.contains("2 of 2 connected nodes know it") && said.contains("onprem-1"), "{said}");
        // Cut off in the middle, the command is simply run again: it is the same key.
        let next = key_file(mesh, "transport.next");
        rotate(mesh)?;
        ensure!(next.is_some() && key_file(mesh, "transport.next") == next && key_file(mesh, "transport") == before);
        wait_connected(mesh, "east-1", policy + 1)?;
        mesh.kill_keyserver()?;
        mesh.start_keyserver()?;
        ensure!(key_file(mesh, "transport") == next, "the next key is in use");
        ensure!(key_file(mesh, "transport.next").is_none() && key_file(mesh, "transport.old").is_none());
        wait_connected(mesh, "east-1", policy + 2)?;
        wait_connected(mesh, "west-1", policy + 2)?;
        // It knows neither key nor policy; its peers do.
        mesh.node_mut("onprem-1").start()?;
        wait_connected(mesh, "onprem-1", policy + 2)?;
        // A token made before is still good for a node that comes now.
        let late = mesh.bare_node("late")?;
        late.join(&token)?;
        let counts = stream.stop()?;
        ensure!(counts.lost() == 0 && counts.duplicated == 0, "{counts:?}");
        Ok(())
    });
}

#[test]
fn a_keyserver_that_dies_while_it_changes_keys_goes_on_where_it_was() {
    scenario("transportcrash", &[("east-1", "east")], |mesh| {
        let keys = mesh.keyserver_directory().join("keys");
        let mut policy = mesh.node("east-1").status()?["policy_version"].as_u64().unwrap();
        // The old key noted and nothing else done; the next key in place too; and that file gone, the policy not changed yet.
        for done in 1..=3 {
            rotate(mesh)?;
            wait_connected(mesh, "east-1", policy + 1)?;
            mesh.kill_keyserver()?;
            let (current, next) = (keys.join("transport"), keys.join("transport.next"));
            let show = ["--json", "signer", "show", &current.to_string_lossy()].map(str::to_owned);
            let show: Vec<&str> = show.iter().map(String::as_str).collect();
            let shown: serde_json::Value =
                serde_json::from_str(&mesh.keyserver_node().output(binary("meshctl")?, &show)?)?;
            fs::write(keys.join("transport.old"), shown["key"].as_str().unwrap())?;
            if done >= 2 {
                fs::copy(&next, &current)?;
            }
            if done >= 3 {
                fs::remove_file(&next)?;
            }
            mesh.start_keyserver()?;
            policy += 2;
            wait_connected(mesh, "east-1", policy)?;
            ensure!(key_file(mesh, "transport.next").is_none() && key_file(mesh, "transport.old").is_none());
            let status = mesh.admin_json(&["status"])?;
            ensure!(status["keyserver"]["alarms"].as_array().is_some_and(Vec::is_empty), "{status}");
        }
        Ok(())
    });
}
