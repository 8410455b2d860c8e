//! A mesh whose keyserver can grant nothing: roots and issuers sign elsewhere, in files.
#![allow(clippy::unwrap_used, reason = "tests")]

mod desk;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use desk::{Strict, run_waiting};
use mesh_e2e::capture::new_marker;
use mesh_e2e::mesh::SETTLE;
use mesh_e2e::traffic::ping;
use mesh_e2e::wait;
use serde_json::Value;

#[test]
fn a_strict_mesh_is_made_joined_and_changed_by_files() {
    let mut strict = Strict::new("strict").unwrap_or_else(|error| panic!("make the mesh: {error:#}"));
    if let Err(error) = lifecycle(&mut strict) {
        eprintln!("{}", strict.mesh.logs());
        panic!("strict: {error:#}");
    }
}

fn lifecycle(strict: &mut Strict) -> Result<()> {
    let status = strict.mesh.admin_json(&["status"])?;
    ensure!(status["keyserver"]["trust"] == "strict", "{status}");
    refuses_to_grant(strict)?;
    two_nodes_join(strict)?;
    an_identity_key_waits_for_its_issuer(strict)?;
    a_revoked_node_comes_back_by_its_issuer(strict)?;
    no_key_that_grants_is_here(strict)?;
    second_issuer(strict)?;
    root_is_rotated(strict)?;
    removed_issuer_is_refused(strict)?;
    a_revoker_elsewhere_cuts_off(strict)
}

fn refuses_to_grant(strict: &Strict) -> Result<()> {
    for (args, reason) in [
        (&["token", "create", "--cluster", "east"][..], "issuer"),
        (&["cluster", "add", "west", "--pod-cidr", "10.2.0.0/16"], "policy propose"),
    ] {
        let error = format!("{:#}", strict.mesh.admin(args).unwrap_err());
        ensure!(error.contains(reason) || error.contains("issuer"), "{args:?}: {error}");
    }
    Ok(())
}

fn two_nodes_join(strict: &mut Strict) -> Result<()> {
    let token = strict.token("east", "issuer-a", "2")?;
    for name in ["n1", "n2"] {
        let mut node = strict.mesh.bare_node(name)?;
        let text = node.join_with(&token, &["--node-name", name, "--no-wait"])?;
        ensure!(text.contains("waits for its grant"), "{text}");
        run_waiting(&mut node)?;
        strict.mesh.nodes.push(node);
    }
    strict.wait_pending(2)?;

    // Either side may die meanwhile: nobody types anything again.
    strict.mesh.kill_keyserver()?;
    strict.mesh.start_keyserver()?;
    let node = strict.mesh.node_mut("n1");
    node.kill9()?;
    run_waiting(node)?;
    strict.wait_pending(2)?;
    strict.grant("issuer-a")?;
    for name in ["n1", "n2"] {
        strict.mesh.node_mut(name).daemon.as_mut().context("no daemon")?.wait_ready()?;
        let waiting = strict.mesh.node(name).node.directory().join("state/waiting");
        ensure!(!waiting.exists(), "{name} keeps its token");
    }
    strict.mesh.wait_settled()?;
    let (one, two) = (strict.mesh.pod("n1", "a")?, strict.mesh.pod("n2", "a")?);
    wait::until("pods reach each other", SETTLE, || {
        let arrived = ping(&one.netns()?, two.v4(), 2, new_marker())?.times.len();
        ensure!(arrived >= 1, "{arrived} of 2 pings");
        Ok(())
    })
}

fn an_identity_key_waits_for_its_issuer(strict: &mut Strict) -> Result<()> {
    let identity = |strict: &Strict| Ok::<_, anyhow::Error>(strict.mesh.node("n1").status()?["identity"].clone());
    let told = strict.mesh.node("n1").ctl_json(&["keys", "rotate", "--identity"])?;
    ensure!(told["phase"] == "waiting" && told["done"] == false, "{told}");
    ensure!(identity(strict)?["key"] == told["from"] && identity(strict)?["next"] == told["to"], "{told}");

    // It is in the store and on the node's disk, and nobody types anything again.
    strict.mesh.kill_keyserver()?;
    strict.mesh.start_keyserver()?;
    strict.mesh.node_mut("n1").kill9()?;
    strict.mesh.node_mut("n1").start()?;
    let listed = strict.mesh.admin_json(&["grant", "list-pending"])?;
    ensure!(listed["pending"][0]["identity"] == told["to"] && listed["pending"][0]["name"] == "n1", "{listed}");
    wait::until("it waits again", SETTLE, || {
        let identity = identity(strict)?;
        ensure!(identity["phase"] == "waiting" && identity["key"] == told["from"], "{identity}");
        Ok(())
    })?;
    strict.grant("issuer-a")?;
    wait::until("the new key is in use", SETTLE, || {
        let identity = identity(strict)?;
        ensure!(identity["phase"] == "settled" && identity["key"] == told["to"], "{identity}");
        Ok(())
    })?;
    strict.wait_pending(0)?;
    let memory = fs::read_to_string(strict.desk.path("issuer-a.memory"))?;
    ensure!(memory.contains(told["to"].as_str().context("no key")?), "the issuer does not remember it: {memory}");
    let (one, two) = (strict.mesh.pod("n1", "c")?, strict.mesh.pod("n2", "c")?);
    wait::until_true("pods reach each other with the new key", SETTLE, || {
        Ok(!ping(&one.netns()?, two.v4(), 2, new_marker())?.times.is_empty())
    })
}

fn a_revoked_node_comes_back_by_its_issuer(strict: &mut Strict) -> Result<()> {
    let key = strict.desk.path("revoker");
    strict.mesh.admin(&["node", "revoke", "n2", "--reason", "lost", "--signer", &key])?;
    let (one, two) = (strict.mesh.pod("n1", "d")?, strict.mesh.pod("n2", "d")?);
    let reaches = || Ok(!ping(&one.netns()?, two.v4(), 2, new_marker())?.times.is_empty());
    ensure!(!reaches()?, "n1 reaches a revoked node");
    let told = strict.mesh.admin(&["node", "restore", "n2"])?;
    ensure!(told.contains("n2 waits for issuer") && told.contains("--restore n2"), "{told}");
    let waits = strict.mesh.admin_json(&["grant", "list-pending"])?;
    ensure!(waits["pending"][0]["restoration"] == true && waits["pending"][0]["name"] == "n2", "{waits}");
    // It survives a crash, and nobody signs it by the way.
    strict.mesh.kill_keyserver()?;
    strict.mesh.start_keyserver()?;
    let unseen = format!("{:#}", strict.sign_grants("issuer-a", "unseen").unwrap_err());
    ensure!(unseen.contains("it is revoked") && unseen.contains("--restore n2"), "{unseen}");
    ensure!(!reaches()?, "n1 reaches a node that only waits");
    let (pending, signed, key) =
        (strict.desk.path("pending"), strict.desk.path("restored"), strict.desk.path("issuer-a"));
    let sign = ["grant", "sign", &pending, "--signer", &key, "--out", &signed, "--mesh-id", &strict.mesh_id, "--yes"];
    strict.desk.run(&[&sign[..], &["--restore", "n2"]].concat())?;
    strict.mesh.admin(&["grant", "import", &signed])?;
    strict.wait_pending(0)?;
    wait::until_true("n1 reaches it again", Duration::from_secs(60), reaches)
}

/// Looks at every byte of the keyserver's disk for each key of the desk, in every form it is written in.
fn no_key_that_grants_is_here(strict: &Strict) -> Result<()> {
    let mut files = Vec::new();
    collect(&strict.mesh.keyserver_directory(), &mut files)?;
    let names: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
    ensure!(!names.iter().any(|name| name.contains("/keyserver/keys/") && !name.ends_with("/transport")), "{names:?}");
    ensure!(files.len() >= 3, "only {names:?}");
    for key in ["root-1", "root-2", "root-3", "issuer-a", "revoker"] {
        let text = fs::read_to_string(strict.desk.path(key))?.trim().to_owned();
        let raw: Vec<u8> =
            (0..32).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16)).collect::<Result<_, _>>()?;
        for file in &files {
            let bytes = fs::read(file)?;
            let found = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
            ensure!(!found(text.as_bytes()) && !found(&raw), "{key} is in {}", file.display());
        }
    }
    Ok(())
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() { collect(&entry.path(), files)? } else { files.push(entry.path()) }
    }
    Ok(())
}

fn second_issuer(strict: &mut Strict) -> Result<()> {
    let issuer = strict.desk.key("issuer-b")?;
    let changes = ["--add-issuer", &issuer, "--add-cluster", "west=10.2.0.0/16"];
    let files = strict.propose("issuer", &changes, &["root-2", "root-3"])?;
    let one = format!("{:#}", strict.mesh.admin(&["policy", "import", &files[0]]).unwrap_err());
    ensure!(one.contains("1 of 2"), "one signature of two was enough: {one}");
    strict.mesh.admin(&["policy", "import", &files[0], &files[1]])?;

    // Each issuer in its own clusters only.
    let foreign = format!("{:#}", strict.token("west", "issuer-a", "1").unwrap_err());
    ensure!(foreign.contains("cluster west is of issuer"), "{foreign}");
    let mut node = strict.mesh.bare_node("w1")?;
    node.join_with(&strict.token("west", "issuer-b", "1")?, &["--node-name", "w1", "--no-wait"])?;
    run_waiting(&mut node)?;
    strict.mesh.nodes.push(node);
    strict.wait_pending(1)?;
    let wrong = format!("{:#}", strict.sign_grants("issuer-a", "wrong").unwrap_err());
    ensure!(wrong.contains("nothing to sign"), "{wrong}");
    strict.grant("issuer-b")?;
    strict.mesh.node_mut("w1").daemon.as_mut().context("no daemon")?.wait_ready()?;
    strict.mesh.wait_settled()
}

fn root_is_rotated(strict: &mut Strict) -> Result<()> {
    let new = strict.desk.key("root-4")?;
    let shown: Value =
        serde_json::from_str(&strict.desk.run(&["--json", "signer", "show", &strict.desk.path("root-3")])?)?;
    let old = shown["id"].as_str().context("no id")?.to_owned();
    let before = strict.policy_version("n1")?;
    strict.change_policy("rotate", &["--add-root", &new, "--remove-root", &old], &["root-1", "root-2"])?;
    for node in ["n1", "n2", "w1"] {
        wait::until(&format!("{node} follows"), SETTLE, || {
            ensure!(strict.policy_version(node)? == before + 1, "it does not");
            Ok(())
        })?;
    }
    // The old root counts no more, the new one does, and who restarts knows it.
    let files = strict.propose("after", &["--exposure", "6d"], &["root-1", "root-4"])?;
    let old_root = strict.propose("old", &["--exposure", "6d"], &["root-3"]).unwrap_err();
    ensure!(format!("{old_root:#}").contains("not a root"), "{old_root:#}");
    strict.mesh.admin(&["policy", "import", &files[0], &files[1]])?;
    strict.mesh.node_mut("n2").kill9()?;
    strict.mesh.node_mut("n2").start()?;
    wait::until("n2 follows after a restart", SETTLE, || {
        ensure!(strict.policy_version("n2")? == before + 2, "it does not");
        Ok(())
    })?;
    let (one, two) = (strict.mesh.pod("n1", "b")?, strict.mesh.pod("n2", "b")?);
    wait::until("pods reach each other after the rotation", SETTLE, || {
        ensure!(!ping(&one.netns()?, two.v4(), 2, new_marker())?.times.is_empty(), "no answer");
        Ok(())
    })
}

fn removed_issuer_is_refused(strict: &mut Strict) -> Result<()> {
    let node = strict.mesh.bare_node("w2")?;
    node.join_with(&strict.token("west", "issuer-b", "1")?, &["--node-name", "w2", "--no-wait"])?;
    strict.wait_pending(1)?;
    let signed = strict.sign_grants("issuer-b", "late")?;
    let shown: Value =
        serde_json::from_str(&strict.desk.run(&["--json", "signer", "show", &strict.desk.path("issuer-b")])?)?;
    let id = shown["id"].as_str().context("no id")?.to_owned();
    let files = strict.propose("remove", &["--remove-issuer", &id], &["root-1", "root-2"])?;
    let careful = format!("{:#}", strict.mesh.admin(&["policy", "import", &files[0], &files[1]]).unwrap_err());
    ensure!(careful.contains("w1") && careful.contains("--drop-nodes"), "{careful}");
    strict.mesh.admin(&["policy", "import", &files[0], &files[1], "--drop-nodes"])?;
    let refused = format!("{:#}", strict.mesh.admin(&["grant", "import", &signed]).unwrap_err());
    ensure!(refused.contains("was removed by trust policy"), "refused for another reason: {refused}");
    wait::until("n1 has let go of the removed issuer's node", Duration::from_secs(10), || {
        let peers = strict.mesh.node("n1").ctl_json(&["peers"])?.to_string();
        ensure!(!peers.contains("w1"), "{peers}");
        Ok(())
    })
}

fn a_revoker_elsewhere_cuts_off(strict: &mut Strict) -> Result<()> {
    let alone = format!("{:#}", strict.mesh.admin(&["node", "revoke", "n2"]).unwrap_err());
    ensure!(alone.contains("not on this machine"), "the keyserver revoked by itself: {alone}");
    let issuer = ["node", "revoke", "n2", "--signer", &strict.desk.path("issuer-a")];
    let issuer = format!("{:#}", strict.mesh.admin(&issuer).unwrap_err());
    ensure!(issuer.contains("no revoker"), "an issuer revoked: {issuer}");
    strict.mesh.admin(&["node", "revoke", "n2", "--reason", "test", "--signer", &strict.desk.path("revoker")])?;
    let peers = strict.mesh.node("n1").ctl_json(&["peers"])?.to_string();
    ensure!(!peers.contains("n2"), "it confirmed and still has it: {peers}");
    Ok(())
}
