//! Who gets in, and who does not: by the commands a user types.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::mesh::{Mesh, MeshNode, scenario};
use mesh_e2e::wait;

/// Joins and expects a refusal that names the reason; the machine must be left without a state to boot from.
fn refused(node: &MeshNode, token: &str, args: &[&str], reason: &str) -> Result<()> {
    let name = ["--node-name", node.node.name()];
    let args = if args.contains(&name[0]) { args.to_vec() } else { [&name, args].concat() };
    let args = args.as_slice();
    let error = match node.join_with(token, args) {
        Ok(text) => anyhow::bail!("joined: {text}"),
        Err(error) => format!("{error:#}"),
    };
    ensure!(error.to_lowercase().contains(reason), "refused for another reason than '{reason}': {error}");
    Ok(())
}

#[test]
fn token_counts_its_uses_and_is_good_for_nothing_else() {
    scenario("tokens", &[], |mesh| {
        used_up(mesh)?;
        expired(mesh)?;
        tampered(mesh)?;
        wrong_cluster(mesh)?;
        revoked(mesh)
    });
}

fn used_up(mesh: &mut Mesh) -> Result<()> {
    let token = mesh.token("east")?;
    let (first, second) = (mesh.bare_node("used-a")?, mesh.bare_node("used-b")?);
    first.join(&token)?;
    refused(&second, &token, &[], "used")
}

fn expired(mesh: &mut Mesh) -> Result<()> {
    let token = mesh.token_with(&["--cluster", "east", "--uses", "1", "--ttl", "1s"])?;
    let late = mesh.bare_node("late")?;
    wait::until_true("the token expires", Duration::from_secs(10), || {
        let tokens = mesh.admin_json(&["token", "list"])?;
        let list = tokens.get("tokens").cloned().unwrap_or(tokens);
        let expires = list.as_array().into_iter().flatten().filter_map(|token| token["expires"].as_u64()).min();
        let expires = expires.unwrap_or(u64::MAX);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        Ok(now > expires)
    })?;
    refused(&late, &token, &[], "expired")
}

fn tampered(mesh: &mut Mesh) -> Result<()> {
    let token = mesh.token("east")?;
    let node = mesh.bare_node("tampered")?;
    let at = token.len() / 2;
    let other = if token.as_bytes()[at] == b'A' { "B" } else { "A" };
    let damaged = format!("{}{other}{}", &token[..at], &token[at + 1..]);
    refused(&node, &damaged, &[], "damaged")?;
    node.join(&token)?;
    Ok(())
}

fn wrong_cluster(mesh: &mut Mesh) -> Result<()> {
    let token = mesh.token("east")?;
    let node = mesh.bare_node("wrong")?;
    refused(&node, &token, &["--pod-cidr", "10.2.77.0/24"], "10.2.77.0/24")?;
    node.join_with(&token, &["--node-name", "wrong", "--pod-cidr", "10.1.77.0/24"])?;
    Ok(())
}

fn revoked(mesh: &mut Mesh) -> Result<()> {
    let token = mesh.token("east")?;
    let node = mesh.bare_node("void")?;
    let tokens = mesh.admin_json(&["token", "list"])?;
    let list = tokens.get("tokens").cloned().unwrap_or(tokens);
    let unused = list.as_array().into_iter().flatten().filter(|token| token["used"] == 0);
    let newest = unused.max_by_key(|token| token["expires"].as_u64()).context("no unused token")?;
    let id = newest["id"].as_str().unwrap_or_default().to_owned();
    mesh.admin(&["token", "revoke", &id])?;
    refused(&node, &token, &[], "revoked")
}

#[test]
fn second_node_with_a_taken_cidr_or_name_is_told_who_has_it() {
    scenario("taken", &[], |mesh| {
        let first = mesh.bare_node("first")?;
        first.join_with(&mesh.token("east")?, &["--node-name", "first", "--pod-cidr", "10.1.9.0/24"])?;
        let second = mesh.bare_node("second")?;
        let token = mesh.token("east")?;
        refused(&second, &token, &["--node-name", "second", "--pod-cidr", "10.1.9.0/25"], "first")?;
        refused(&second, &token, &["--node-name", "first"], "first")?;
        // Neither refusal used the token up.
        second.join_with(&token, &["--node-name", "second"])?;
        Ok(())
    });
}

#[test]
fn many_machines_with_one_token_get_what_it_allows() {
    scenario("race", &[], |mesh| {
        let token = mesh.token_with(&["--cluster", "west", "--uses", "3", "--ttl", "1h"])?;
        let nodes: Vec<MeshNode> = (0..6).map(|n| mesh.bare_node(&format!("r{n}"))).collect::<Result<_>>()?;
        let joined = std::thread::scope(|scope| {
            let joins: Vec<_> = nodes.iter().map(|node| scope.spawn(|| node.join(&token).is_ok())).collect();
            joins.into_iter().map(|join| join.join().unwrap()).filter(|joined| *joined).count()
        });
        ensure!(joined == 3, "{joined} of 6 joined with a token for 3");
        Ok(())
    });
}

#[test]
fn keyserver_restart_keeps_everything() {
    scenario("restart", &[("n1", "east")], |mesh| {
        let before = mesh.admin_json(&["node", "list"])?;
        let token = mesh.token("west")?;
        mesh.kill_keyserver()?;
        mesh.start_keyserver()?;
        wait::until_true("the node is connected again", Duration::from_secs(40), || {
            let nodes = mesh.admin_json(&["node", "list"])?;
            let nodes = nodes.get("nodes").cloned().unwrap_or(nodes);
            Ok(nodes[0]["connected"].is_string())
        })?;
        let after = mesh.admin_json(&["node", "list"])?;
        let stable = |value: &serde_json::Value| {
            let nodes = value.get("nodes").cloned().unwrap_or_else(|| value.clone());
            (nodes[0]["node"].clone(), nodes[0]["pod_cidrs"].clone(), nodes[0]["generation"].clone())
        };
        ensure!(stable(&before) == stable(&after), "{before} became {after}");
        mesh.bare_node("n2")?.join(&token)?;
        Ok(())
    });
}
