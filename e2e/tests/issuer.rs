//! The key that grants is replaced under traffic: no packet is lost, no node joins again, and what held the key before is
//! good for nothing.
#![allow(clippy::unwrap_used, reason = "tests")]

mod desk;
mod hostile;

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use desk::{Strict, run_waiting};
use hostile::{Hostile, Speaker, identity, stolen_key, wait_alarm};
use mesh_e2e::capture::new_marker;
use mesh_e2e::daemon::binary;
use mesh_e2e::mesh::{SETTLE, scenario};
use mesh_e2e::pod::Pod;
use mesh_e2e::traffic::{Stream, ping};
use mesh_e2e::{Mesh, wait};
use mesh_protocol::address::mesh_v6;
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::MeshId;
use mesh_protocol::key::SigningKey;
use mesh_protocol::record::NodeGrant;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);
const NODES: [(&str, &str); 3] = [("east-1", "east"), ("west-1", "west"), ("onprem-1", "onprem")];

fn rotate(mesh: &Mesh, more: &[&str]) -> Result<String> {
    let config = mesh.keyserver_directory().join("keyserver.toml").display().to_string();
    let args = [&["keys", "rotate", "issuer", "--config", &config], more].concat();
    mesh.keyserver_node().output(binary("keyserver")?, &args)
}

fn key_file(mesh: &Mesh, name: &str) -> Option<String> {
    fs::read_to_string(mesh.keyserver_directory().join("keys").join(name)).ok()
}

fn issuers(mesh: &Mesh) -> Result<Value> {
    Ok(mesh.admin_json(&["policy", "show"])?["issuers"].clone())
}

fn wait_policy(mesh: &Mesh, node: &str, version: u64) -> Result<()> {
    wait::until(&format!("{node} is connected, with policy {version}"), PATIENCE, || {
        let status = mesh.node(node).status()?;
        ensure!(status["control"]["connected"] == true && status["policy_version"] == version, "{status}");
        Ok(())
    })
}

fn policy_version(mesh: &Mesh) -> Result<u64> {
    mesh.admin_json(&["policy", "show"])?["version"].as_u64().context("no version")
}

fn no_alarms(mesh: &Mesh, nodes: &[&str]) -> Result<()> {
    no_node_alarms(mesh, nodes)?;
    let status = mesh.admin_json(&["status"])?;
    ensure!(status["keyserver"]["alarms"].as_array().is_some_and(Vec::is_empty), "{status}");
    Ok(())
}

fn no_node_alarms(mesh: &Mesh, nodes: &[&str]) -> Result<()> {
    for node in nodes {
        let audit = mesh.node(node).ctl_json(&["audit"])?;
        ensure!(audit["alarms"].as_array().is_some_and(Vec::is_empty), "{node}: {}", audit["alarms"]);
    }
    Ok(())
}

fn wait_reaches(from: &Pod, to: &Pod) -> Result<()> {
    wait::until_true("pods reach each other", PATIENCE, || {
        Ok(!ping(&from.netns()?, to.v4(), 1, new_marker())?.times.is_empty())
    })
}

/// A thousand packets a second, which have begun to arrive.
fn stream(from: &Pod, to: &Pod) -> Result<Stream> {
    wait_reaches(from, to)?;
    let stream = Stream::start(&from.netns()?, &to.netns()?, to.v4(), 1_000, u64::MAX, 64, new_marker())?;
    wait::until_true("the stream arrives", PATIENCE, || Ok(stream.arrived() > 100))?;
    Ok(stream)
}

fn ensure_whole(stream: Stream) -> Result<()> {
    let counts = stream.stop()?;
    println!("{counts:?}");
    ensure!(counts.lost() == 0 && counts.duplicated == 0, "{counts:?}");
    Ok(())
}

#[test]
fn the_issuers_key_is_replaced_under_traffic_and_a_node_that_was_away_comes_back() {
    scenario("issuer", &NODES, |mesh| {
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        let c = mesh.pod("onprem-1", "a")?;
        wait_reaches(&c, &a)?;
        let (before, policy, token) = (key_file(mesh, "issuer"), policy_version(mesh)?, mesh.token("east")?);
        mesh.node_mut("onprem-1").stop()?;
        let stream = stream(&a, &b)?;
        let said = rotate(mesh, &[])?;
        ensure!(said.contains("2 of 3 nodes hold a grant of the new key"), "{said}");
        ensure!(said.contains("1 join tokens are void") && said.contains("onprem-1"), "{said}");
        let next = key_file(mesh, "issuer");
        ensure!(next.is_some() && next != before && key_file(mesh, "issuer.next").is_none(), "the key is not another");
        // Once more it tells how far it is, and replaces nothing.
        rotate(mesh, &[])?;
        ensure!(key_file(mesh, "issuer") == next && policy_version(mesh)? == policy + 1);
        let status = mesh.admin_json(&["status"])?["keyserver"]["issuers"].clone();
        ensure!(status[0]["holding"] == 2 && status[0]["absent"][0] == "onprem-1", "{status}");

        // A restart in between: what stands of the former key stands on disk too.
        ensure_whole(stream)?;
        mesh.node_mut("west-1").kill9()?;
        mesh.node_mut("west-1").start()?;
        let stream = self::stream(&a, &b)?;

        let careful = format!("{:#}", rotate(mesh, &["--finish", "--wait", "1s"]).unwrap_err());
        ensure!(careful.contains("onprem-1") && careful.contains("--leave-absent"), "{careful}");
        rotate(mesh, &["--finish", "--leave-absent"])?;
        rotate(mesh, &["--finish"])?;
        for node in ["east-1", "west-1"] {
            wait_policy(mesh, node, policy + 2)?;
        }
        ensure!(issuers(mesh)?[0]["former"].as_array().is_some_and(Vec::is_empty), "a former key is left");

        // It knows neither key nor policy, and joined under what is no more.
        mesh.node_mut("onprem-1").start()?;
        wait_policy(mesh, "onprem-1", policy + 2)?;
        wait_reaches(&c, &a)?;
        let old = format!("{:#}", mesh.bare_node("late")?.join(&token).unwrap_err());
        ensure!(old.contains("join token refused"), "{old}");
        mesh.add_node("new", "east")?;
        mesh.wait_settled()?;
        ensure_whole(stream)?;
        no_alarms(mesh, &["east-1", "west-1", "onprem-1", "new"])
    });
}

#[test]
fn a_stolen_issuers_key_is_replaced_at_once_and_nobody_joins_again() {
    scenario("issuerstolen", &NODES, |mesh| {
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        let c = mesh.pod("onprem-1", "a")?;
        wait_reaches(&c, &a)?;
        let policy = policy_version(mesh)?;
        mesh.node_mut("onprem-1").stop()?;
        wait_reaches(&a, &b)?;
        let said = rotate(mesh, &["--stolen"])?;
        ensure!(said.contains("nothing of it stands") && said.contains("revoke every node"), "{said}");
        ensure!(said.contains("2 of 3 nodes hold a grant of the new key"), "{said}");
        // The keyserver dies in between, and the command is run again.
        mesh.kill_keyserver()?;
        mesh.start_keyserver()?;
        let again = rotate(mesh, &["--stolen"])?;
        ensure!(again.contains("2 of 3 nodes") && policy_version(mesh)? == policy + 1, "{again}");
        wait_reaches(&a, &b)?;
        mesh.node_mut("onprem-1").start()?;
        wait_policy(mesh, "onprem-1", policy + 1)?;
        wait_reaches(&c, &b)?;
        let finished = rotate(mesh, &["--finish"])?;
        ensure!(finished.contains("no key that it had before"), "{finished}");
        wait_reaches(&b, &c)?;
        no_alarms(mesh, &["east-1", "west-1", "onprem-1"])
    });
}

#[test]
fn a_former_issuers_key_grants_nothing() {
    scenario("issuerthief", &[("a", "east"), ("b", "west")], |mesh| {
        let (pod_a, pod_b) = (mesh.pod("a", "p")?, mesh.pod("b", "p")?);
        let spy = mesh.bare_node("spy")?;
        spy.join(&mesh.token("east")?)?;
        let former = stolen_key(mesh, "issuer")?;
        rotate(mesh, &[])?;
        let id: MeshId = mesh.admin_json(&["status"])?["keyserver"]["mesh_id"].as_str().context("no id")?.parse()?;
        let world = Speaker::open(mesh, &spy, &identity(&spy)?, id)?.learn(id)?;
        let transport = stolen_key(mesh, "transport")?;
        mesh.kill_keyserver()?;
        let (a, held) = (world.grant("a").0.node, world.grant("b").0);
        let hostile = Hostile::start(mesh, &transport, world)?;
        hostile.wait_for(a)?;
        // The policy names it still: a new node, and more for one that is there.
        let mole = |own: &SigningKey| NodeGrant {
            node: own.verify_key().node_id(),
            identity: own.verify_key(),
            name: "mole".parse().unwrap(),
            mesh_v4: "100.96.200.1".parse().unwrap(),
            mesh_v6: mesh_v6(id, own.verify_key().node_id()),
            pod_cidrs: vec!["10.2.200.0/24".parse().unwrap()],
            generation: 1,
            serial: held.serial + 1_000,
            ..held.clone()
        };
        let show = |grant: &NodeGrant| hostile.items(a, vec![Envelope::seal(id, grant, &[&former])], 1, None);
        show(&mole(&SigningKey::from_seed([66; 32])));
        wait_alarm(mesh.node("a"), "directory-refused", "was replaced by trust policy")?;
        show(&NodeGrant {
            generation: held.generation + 1,
            pod_cidrs: vec!["10.2.0.0/20".parse().unwrap()],
            ..held.clone()
        });
        wait_alarm(mesh.node("a"), "directory-refused", "stands up to generation 1 and serial")?;
        drop(hostile);
        let (keys, address) = (mesh.keyserver_node().netns()?, (mesh.keyserver_node().v4(), 7443));
        wait::until("the port is free", PATIENCE, || {
            keys.run(move || std::net::TcpListener::bind(address))??;
            Ok(())
        })?;
        mesh.start_keyserver()?;
        // Node b has heard nothing of it: it is shown what the thief has left once the policy forgets the key.
        wait_policy(mesh, "b", policy_version(mesh)?)?;
        rotate(mesh, &["--finish", "--leave-absent"])?;
        wait_policy(mesh, "b", policy_version(mesh)?)?;
        let world = Speaker::open(mesh, &spy, &identity(&spy)?, id)?.learn(id)?;
        mesh.kill_keyserver()?;
        let hostile = Hostile::start(mesh, &transport, world)?;
        hostile.wait_for(held.node)?;
        let low = NodeGrant { serial: 0, ..mole(&SigningKey::from_seed([67; 32])) };
        hostile.items(held.node, vec![Envelope::seal(id, &low, &[&former])], 1, None);
        wait_alarm(mesh.node("b"), "directory-refused", "was removed by trust policy")?;
        for node in ["a", "b"] {
            let peers = mesh.node(node).ctl_json(&["peers"])?.to_string();
            ensure!(
                !peers.contains("mole") && !peers.contains("10.2.200.0") && !peers.contains("10.2.0.0/20"),
                "{peers}"
            );
        }
        wait_reaches(&pod_a, &pod_b)
    });
}

#[test]
fn a_keyserver_that_dies_at_any_moment_of_it_goes_on() {
    scenario("issuercrash", &NODES, |mesh| {
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        for stolen in [false, false, true] {
            // A stolen key may cost a pause: nobody is waited for longer than two seconds, and the keyserver may be.
            let stream = (!stolen).then(|| stream(&a, &b)).transpose()?;
            let before = issuers(mesh)?[0]["key"].clone();
            let config = mesh.keyserver_directory().join("keyserver.toml");
            let mut command = mesh.keyserver_node().command(binary("keyserver")?)?;
            command.args(["keys", "rotate", "issuer", "--wait", "20s", "--config"]).arg(config);
            if stolen {
                command.arg("--stolen");
            }
            let mut asked = command.spawn()?;
            // As soon as the next key is on disk, or in use: somewhere between there and the last grant.
            let old = key_file(mesh, "issuer");
            wait::until_true("it has begun", PATIENCE, || {
                Ok(key_file(mesh, "issuer.next").is_some() || key_file(mesh, "issuer") != old)
            })?;
            mesh.kill_keyserver()?;
            let _ = asked.wait()?;
            mesh.start_keyserver()?;
            rotate(mesh, if stolen { &["--stolen"] } else { &[] })?;
            let finished = rotate(mesh, &["--finish"])?;
            ensure!(finished.contains("no key that it had before"), "{finished}");
            let after = issuers(mesh)?;
            ensure!(after[0]["key"] != before && after[0]["former"].as_array().is_some_and(Vec::is_empty), "{after}");
            ensure!(key_file(mesh, "issuer.next").is_none());
            mesh.token("east")?;
            wait_reaches(&a, &b)?;
            stream.map_or(Ok(()), ensure_whole)?;
        }
        no_alarms(mesh, &["east-1", "west-1", "onprem-1"])
    });
}

#[test]
fn in_strict_mode_the_issuers_key_is_replaced_by_files() {
    let mut strict = Strict::new("issuerfiles").unwrap_or_else(|error| panic!("make the mesh: {error:#}"));
    if let Err(error) = by_files(&mut strict) {
        eprintln!("{}", strict.mesh.logs());
        panic!("issuerfiles: {error:#}");
    }
}

fn join(strict: &mut Strict, names: &[&str], issuer: &str) -> Result<()> {
    let token = strict.token("east", issuer, &names.len().to_string())?;
    for name in names {
        let mut node = strict.mesh.bare_node(name)?;
        node.join_with(&token, &["--node-name", name, "--no-wait"])?;
        run_waiting(&mut node)?;
        strict.mesh.nodes.push(node);
    }
    strict.wait_pending(names.len())?;
    strict.grant(issuer)?;
    for name in names {
        strict.mesh.node_mut(name).daemon.as_mut().context("no daemon")?.wait_ready()?;
    }
    strict.mesh.wait_settled()
}

fn by_files(strict: &mut Strict) -> Result<()> {
    join(strict, &["n1", "n2", "n3"], "issuer-a")?;
    let (one, two, three) = (strict.mesh.pod("n1", "a")?, strict.mesh.pod("n2", "a")?, strict.mesh.pod("n3", "a")?);
    wait_reaches(&three, &one)?;
    let away = format!("{:#}", rotate(&strict.mesh, &[]).unwrap_err());
    ensure!(away.contains("meshctl policy propose --replace-issuer"), "{away}");
    strict.mesh.node_mut("n3").stop()?;
    let stream = stream(&one, &two)?;

    // One that waits with a token of the former key.
    let waiting = strict.mesh.bare_node("n4")?;
    waiting.join_with(&strict.token("east", "issuer-a", "1")?, &["--node-name", "n4", "--no-wait"])?;
    strict.wait_pending(1)?;
    let (old, new) = (strict.desk.id("issuer-a")?, strict.desk.key("issuer-b")?);
    let replaced = strict.change_policy("replace", &["--replace-issuer", &old, &new], &["root-1", "root-2"])?;
    ensure!(replaced["dropped"] == 0 && replaced["pending"] == 3, "{replaced}");
    let status = strict.mesh.admin_json(&["status"])?["keyserver"].clone();
    ensure!(status["issuers"][0]["ungranted"].as_array().is_some_and(|names| names.len() == 3), "{status}");
    ensure!(status["alarms"].to_string().contains("n4"), "{status}");

    // Days may pass: a node starts anew meanwhile, and the former key signs nothing.
    ensure_whole(stream)?;
    strict.mesh.node_mut("n2").kill9()?;
    strict.mesh.node_mut("n2").start()?;
    let stream = self::stream(&one, &two)?;
    let wrong = format!("{:#}", strict.sign_grants("issuer-a", "wrong").unwrap_err());
    ensure!(wrong.contains("nothing to sign"), "{wrong}");
    let token = format!("{:#}", strict.token("east", "issuer-a", "1").unwrap_err());
    ensure!(token.contains("issuer"), "{token}");
    strict.grant("issuer-b")?;
    let early = strict.propose("early", &["--forget-issuer", &old], &["root-1", "root-3"])?;
    wait::until("the connected nodes speak under their new grants", SETTLE, || {
        let status = strict.mesh.admin_json(&["status"])?["keyserver"]["issuers"][0].clone();
        ensure!(status["holding"] == 2 && status["absent"][0] == "n3", "{status}");
        Ok(())
    })?;
    strict
        .mesh
        .admin(&[&["policy", "import"], early.iter().map(String::as_str).collect::<Vec<_>>().as_slice()].concat())?;
    strict.mesh.node_mut("n3").start()?;
    wait_policy(&strict.mesh, "n3", policy_version(&strict.mesh)?)?;
    wait_reaches(&three, &one)?;
    ensure_whole(stream)?;
    stolen_by_files(strict)?;
    wait_reaches(&one, &two)?;
    wait_reaches(&three, &two)?;
    no_node_alarms(&strict.mesh, &["n1", "n2", "n3"])
}

fn stolen_by_files(strict: &mut Strict) -> Result<()> {
    let (old, new) = (strict.desk.id("issuer-b")?, strict.desk.key("issuer-c")?);
    let changes = ["--replace-issuer", &old, &new, "--stolen"];
    let files = strict.propose("stolen", &changes, &["root-1", "root-2"])?;
    let import = [&["policy", "import"], files.iter().map(String::as_str).collect::<Vec<_>>().as_slice()].concat();
    let careful = format!("{:#}", strict.mesh.admin(&import).unwrap_err());
    ensure!(careful.contains("--drop-nodes") && careful.contains("successor"), "{careful}");
    strict.mesh.admin(&[import.as_slice(), &["--drop-nodes"]].concat())?;
    let pending = strict.mesh.admin_json(&["grant", "list-pending"])?["pending"].clone();
    let all_regrants =
        pending.as_array().is_some_and(|all| all.len() == 3 && all.iter().all(|one| one["regrant"] == true));
    ensure!(all_regrants, "{pending}");
    let blind = format!("{:#}", strict.sign_grants("issuer-c", "blind").unwrap_err());
    ensure!(blind.contains("nothing to sign"), "{blind}");
    let (file, signed, key) = (strict.desk.path("pending"), strict.desk.path("again"), strict.desk.path("issuer-c"));
    let sign = [
        "grant",
        "sign",
        &file,
        "--signer",
        &key,
        "--out",
        &signed,
        "--mesh-id",
        &strict.mesh_id,
        "--regrant",
        "--yes",
    ];
    strict.desk.run(&sign)?;
    strict.mesh.admin(&["grant", "import", &signed])?;
    strict.change_policy("forget", &["--forget-issuer", &old], &["root-1", "root-2"])?;
    for node in ["n1", "n2", "n3"] {
        wait_policy(&strict.mesh, node, policy_version(&strict.mesh)?)?;
    }
    Ok(())
}
