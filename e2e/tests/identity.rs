//! A node's identity key is replaced: the node stays who it is, and nobody notices.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::capture::new_marker;
use mesh_e2e::daemon::binary;
use mesh_e2e::mesh::{MeshNode, scenario};
use mesh_e2e::traffic::{Stream, ping};
use mesh_e2e::{Mesh, Pod, wait};
use serde_json::Value;

const NODES: [(&str, &str); 3] = [("a", "east"), ("b", "west"), ("c", "onprem")];
const PATIENCE: Duration = Duration::from_secs(60);

fn file(node: &MeshNode, name: &str) -> PathBuf {
    node.node.directory().join("state").join(name)
}

/// Who the node is to others, which must not change.
fn who(node: &MeshNode) -> Result<Value> {
    let status = node.status()?;
    let keys = ["node", "name", "cluster", "addresses", "pod_cidrs"];
    Ok(keys.iter().map(|key| status[*key].clone()).collect())
}

fn key(node: &MeshNode) -> Result<String> {
    Ok(node.status()?["identity"]["key"].as_str().context("no identity key")?.to_owned())
}

/// Waits until another key than `before` is in use, and the one before is gone.
fn wait_settled(node: &MeshNode, before: &str) -> Result<()> {
    wait::until("the new identity key is settled", PATIENCE, || {
        let identity = node.status()?["identity"].clone();
        let settled = identity["phase"] == "settled" && identity["next"].is_null() && identity["key"] != before;
        ensure!(settled, "{identity}");
        Ok(())
    })?;
    ensure!(!file(node, "identity-next").exists(), "the next key is still beside");
    Ok(())
}

fn reaches(from: &Pod, to: &Pod) -> Result<()> {
    let netns = from.netns()?;
    wait::until_true("a pod reaches the other", PATIENCE, || {
        Ok(!ping(&netns, to.v4(), 1, new_marker())?.times.is_empty())
    })
}

#[test]
fn an_identity_key_is_replaced_without_a_lost_packet() {
    scenario("identity", &NODES, |mesh| {
        let (a, b) = (mesh.pod("a", "p")?, mesh.pod("b", "p")?);
        reaches(&a, &b)?;
        let (before, first) = (who(mesh.node("a"))?, fs::read(file(mesh.node("a"), "identity"))?);
        let there = Stream::start(&a.netns()?, &b.netns()?, b.v4(), 2_000, u64::MAX, 64, new_marker())?;
        let back = Stream::start(&b.netns()?, &a.netns()?, a.v4(), 2_000, u64::MAX, 64, new_marker())?;
        wait::until_true("the streams arrive", PATIENCE, || Ok(there.arrived() > 1_000 && back.arrived() > 1_000))?;
        for _ in 0..3 {
            let from = key(mesh.node("a"))?;
            let told = mesh.node("a").ctl_json(&["keys", "rotate", "--identity"])?;
            ensure!(told["from"] == from.as_str() && told["phase"] == "settled" && told["done"] == true, "{told}");
            ensure!(told["peers"].as_u64() >= Some(1) && told["confirmed"] == told["peers"], "{told}");
            ensure!(told["to"] == key(mesh.node("a"))?.as_str() && told["to"] != told["from"], "{told}");
            let sent = there.sent();
            wait::until_true("packets pass on", PATIENCE, || Ok(there.arrived() > sent + 2_000))?;
        }
        for counts in [there.stop()?, back.stop()?] {
            println!("{counts:?} over 3 changes of the identity key");
            ensure!(counts.lost() == 0 && counts.duplicated == 0, "{counts:?}");
        }
        ensure!(who(mesh.node("a"))? == before, "it is another node now");
        ensure!(mesh.node("a").status()?["keys"]["current"] == 1, "the tunnels' keys changed");
        let second = fs::read(file(mesh.node("a"), "identity"))?;
        ensure!(second.len() == 32 && second != first, "the first key is still on disk");
        ensure!(!file(mesh.node("a"), "identity-next").exists(), "the next key is still beside");
        told_and_on_record(mesh)?;

        // From disk, with the keyserver down: this node, and one that has only heard of it.
        mesh.kill_keyserver()?;
        for name in ["a", "b"] {
            mesh.node_mut(name).kill9()?;
            mesh.node_mut(name).start()?;
            reaches(&a, &b)?;
            reaches(&b, &a)?;
        }
        ensure!(who(mesh.node("a"))? == before, "it came back as another node");

        // A node that joins sees the newest only.
        mesh.start_keyserver()?;
        mesh.add_node("d", "east")?;
        mesh.wait_settled()?;
        let d = mesh.pod("d", "p")?;
        reaches(&d, &a)
    });
}

fn told_and_on_record(mesh: &Mesh) -> Result<()> {
    let log = mesh.admin(&["audit", "export"])?;
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("\"action\":\"rotate-identity\"")).collect();
    ensure!(lines.len() == 3 && lines.iter().all(|line| line.contains("\"actor\":\"node a\"")), "{lines:?}");
    mesh.admin(&["audit", "verify", "--live"])?;
    for node in ["a", "b", "c"] {
        let alarms = mesh.node(node).ctl_json(&["audit"])?["alarms"].to_string();
        ensure!(alarms == "[]", "alarms on {node}: {alarms}");
    }
    let text = mesh.node("a").ctl(&["status"])?;
    ensure!(text.contains(&format!("key {}", &key(mesh.node("a"))?[..8])), "{text}");
    Ok(())
}

/// Which daemon dies when.
#[derive(Debug, Clone, Copy)]
enum Death {
    Node(&'static str),
    Keyserver(&'static str),
    NodeWithoutKeyserver,
}

#[test]
fn an_identity_key_is_replaced_over_the_end_of_every_daemon() {
    scenario("identkill", &NODES[..2], |mesh| {
        let (a, b) = (mesh.pod("a", "p")?, mesh.pod("b", "p")?);
        reaches(&a, &b)?;
        let before = who(mesh.node("a"))?;
        let deaths = [
            Death::Node("identity-next"),
            Death::Node("membership"),
            Death::Node("keys"),
            Death::Node("identity"),
            Death::Keyserver("identity-next"),
            Death::Keyserver("membership"),
            Death::NodeWithoutKeyserver,
        ];
        for death in deaths {
            one_death(mesh, death).with_context(|| format!("{death:?}"))?;
            ensure!(who(mesh.node("a"))? == before, "{death:?}: it is another node now");
            reaches(&a, &b)?;
            reaches(&b, &a)?;
        }
        let alarms = mesh.node("b").ctl_json(&["audit"])?["alarms"].to_string();
        ensure!(!alarms.contains("directory-refused") && !alarms.contains("equivocation"), "{alarms}");
        Ok(())
    });
}

fn one_death(mesh: &mut Mesh, death: Death) -> Result<()> {
    let first = key(mesh.node("a"))?;
    if matches!(death, Death::NodeWithoutKeyserver) {
        mesh.kill_keyserver()?;
    }
    let watched = match death {
        Death::Node(name) | Death::Keyserver(name) => file(mesh.node("a"), name),
        Death::NodeWithoutKeyserver => file(mesh.node("a"), "identity-next"),
    };
    let identity = file(mesh.node("a"), "identity");
    let (held, old) = (fs::read(&watched).ok(), fs::read(&identity)?);
    let mut command = mesh.node("a").node.command(binary("meshctl")?)?;
    command.arg("--socket").arg(mesh.node("a").socket()).args(["keys", "rotate", "--identity"]);
    let mut command = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    wait::until_true("the moment, or the end", PATIENCE, || {
        let now = fs::read(&watched).ok();
        Ok((now.is_some() && now != held) || fs::read(&identity)? != old)
    })?;
    // Whatever comes of it comes without the command, too.
    command.kill()?;
    command.wait()?;
    match death {
        Death::Node(_) => {
            mesh.node_mut("a").kill9()?;
            mesh.node_mut("a").start()?;
        }
        Death::Keyserver(_) => {
            mesh.kill_keyserver()?;
            mesh.start_keyserver()?;
        }
        Death::NodeWithoutKeyserver => {
            mesh.node_mut("a").kill9()?;
            mesh.node_mut("a").start()?;
            let identity = mesh.node("a").status()?["identity"].clone();
            ensure!(identity["phase"] == "asking" && identity["key"] == first.as_str(), "{identity}");
            let text = mesh.node("a").ctl(&["keys", "rotate", "--identity", "--wait", "1s"]).unwrap_err().to_string();
            ensure!(text.contains("goes on by itself"), "{text}");
            mesh.start_keyserver()?;
        }
    }
    wait_settled(mesh.node("a"), &first)
}

#[test]
fn a_keyserver_from_before_the_change_learns_of_it_from_the_node() {
    scenario("identback", &NODES[..2], |mesh| {
        let first = key(mesh.node("a"))?;
        let (store, copy) = (mesh.keyserver_directory().join("store.redb"), mesh.keyserver_directory().join("copy"));
        mesh.kill_keyserver()?;
        fs::copy(&store, &copy)?;
        mesh.start_keyserver()?;
        mesh.node("a").ctl(&["keys", "rotate", "--identity"])?;
        wait_settled(mesh.node("a"), &first)?;
        mesh.kill_keyserver()?;
        fs::copy(&copy, &store)?;
        mesh.start_keyserver()?;
        // By its own word: what the node says may be of the session before.
        let connected = |mesh: &Mesh| {
            wait::until("the node has a session", PATIENCE, || {
                let nodes = mesh.admin_json(&["node", "list"])?["nodes"].clone();
                let found = nodes.as_array().into_iter().flatten().find(|node| node["name"] == "a").cloned();
                ensure!(found.as_ref().is_some_and(|node| node["connected"].is_string()), "{nodes}");
                Ok(())
            })
        };
        connected(mesh)?;
        mesh.kill_keyserver()?;
        let config = mesh.keyserver_directory().join("keyserver.toml").display().to_string();
        mesh.keyserver_node().output(binary("keyserver")?, &["resume", "--config", &config])?;
        mesh.start_keyserver()?;
        connected(mesh)?;
        wait::until_true("its record is known again", PATIENCE, || {
            Ok(mesh.node("a").status()?["keys"]["published"] == true)
        })?;
        let log = mesh.admin(&["audit", "export"])?;
        ensure!(log.contains("\"action\":\"rotate-identity\""), "the change is not in the store again: {log}");
        let (a, b) = (mesh.pod("a", "p")?, mesh.pod("b", "p")?);
        reaches(&a, &b)
    });
}
