//! Hostile nodes: one that is enrolled and claims what is others', one that was revoked and comes back, and two machines with
//! one identity.
#![allow(clippy::unwrap_used, reason = "tests")]

mod hostile;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hostile::{Speaker, World, identity, unix_now, wait_alarm};
use mesh_e2e::capture::new_marker;
use mesh_e2e::mesh::{Mesh, MeshNode, scenario};
use mesh_e2e::traffic::ping;
use mesh_e2e::wait;
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::MeshId;
use mesh_protocol::key::SigningKey;
use mesh_protocol::record::{Endpoints, EpochKey, KemKey, NodeGrant, NodeRecord};

fn mesh_id(mesh: &Mesh) -> Result<MeshId> {
    let status = mesh.admin_json(&["status"])?;
    Ok(status["keyserver"]["mesh_id"].as_str().context("no mesh id")?.parse()?)
}

#[test]
fn an_enrolled_node_speaks_for_itself_only() {
    scenario("mole", &[("a", "east"), ("b", "west")], |mesh| {
        let id = mesh_id(mesh)?;
        let mole = mesh.bare_node("mole")?;
        mole.join(&mesh.token("east")?)?;
        let key = identity(&mole)?;
        let mut speaker = Speaker::open(mesh, &mole, &key, id)?;
        let world = speaker.learn(id)?;
        let mut refused = |envelope: &Envelope, words: &str| -> Result<()> {
            let answer = speaker.publish(envelope)?;
            ensure!(
                answer.as_ref().is_some_and(|answer| answer.contains(words)),
                "not refused for '{words}': {answer:?}"
            );
            Ok(())
        };
        claims_anothers_keys(&world, &key, &mut refused)?;
        claims_anothers_prefixes(&world, &key, &mut refused)?;
        let lost = claims_endpoints(&world, &key, &mut refused)?;
        ensure!(
            speaker.publish(&lost)?.is_none(),
            "an address inside the mesh is a hint like any other to the keyserver"
        );
        // Who enrols with what is another's is told whose it is.
        let taken = world.grant("b").0.pod_cidrs[0].to_string();
        let thief = mesh.bare_node("thief")?;
        for (args, words) in [
            (vec!["--node-name", "thief", "--pod-cidr", &taken], "which node b already holds"),
            (vec!["--node-name", "b"], "name b is already held"),
        ] {
            let cluster = if args.contains(&"--pod-cidr") { "west" } else { "east" };
            let error = thief.join_with(&mesh.token(cluster)?, &args).expect_err("joined with what is another's");
            ensure!(error.to_string().contains(words), "refused for another reason than '{words}': {error}");
        }
        // Nothing of it reached the others.
        let peers = mesh.node("a").ctl_json(&["peers"])?["peers"].to_string();
        ensure!(!peers.contains("203.0.113.66"), "a has an endpoint that b never named: {peers}");
        let alarms = mesh.node("a").ctl_json(&["audit"])?["alarms"].to_string();
        ensure!(alarms == "[]", "alarms on a bystander: {alarms}");
        Ok(())
    });
}

type Refuse<'r> = dyn FnMut(&Envelope, &str) -> Result<()> + 'r;

fn claims_anothers_keys(world: &World, key: &SigningKey, refused: &mut Refuse<'_>) -> Result<()> {
    let own = world.grant("mole").1.hash(world.mesh);
    let (others, envelope) = world.record("b");
    let seal = |record: &NodeRecord| Envelope::seal(world.mesh, record, &[key]);
    refused(&seal(&NodeRecord { seq: others.seq + 1, ..others.clone() }), "a node speaks for itself only")?;
    refused(&envelope, "a node speaks for itself only")?;
    // In epochs of its own, so that nothing else is wrong with it.
    let later = |held: EpochKey| EpochKey { epoch: held.epoch + 10, ..held };
    let mine = NodeRecord {
        node: key.verify_key().node_id(),
        seq: 9,
        grant: own,
        current: later(others.current),
        previous: None,
        spare: later(others.spare),
        kem: KemKey { epoch: others.kem.epoch + 10, ..others.kem },
        before: None,
        ..others
    };
    refused(&seal(&mine), "belongs to node")?;
    refused(&seal(&NodeRecord { seq: u64::MAX, ..mine.clone() }), "seq is out of range")?;
    refused(&seal(&NodeRecord { lanes: 200, ..mine }), "lanes are 1 to 8")
}

fn claims_anothers_prefixes(world: &World, key: &SigningKey, refused: &mut Refuse<'_>) -> Result<()> {
    let (held, _) = world.grant("mole");
    let taken = world.grant("b").0.pod_cidrs;
    let wide = NodeGrant { generation: held.generation + 1, pod_cidrs: taken, ..held };
    refused(&Envelope::seal(world.mesh, &wide, &[key]), "is not a node's to publish")
}

/// Gives endpoints of its own that lead into the mesh: those are taken, and used by nobody.
fn claims_endpoints(world: &World, key: &SigningKey, refused: &mut Refuse<'_>) -> Result<Envelope> {
    let endpoints = |node, candidate: &str| {
        let (seq, expires) = (u64::MAX / 4, unix_now() + 3_600);
        let endpoints = Endpoints { node, seq, candidates: vec![candidate.parse().unwrap()], expires };
        Envelope::seal(world.mesh, &endpoints, &[key])
    };
    let own = key.verify_key().node_id();
    refused(&endpoints(world.grant("b").0.node, "203.0.113.66:7100"), "a node speaks for itself only")?;
    refused(&endpoints(own, "224.0.0.1:7100"), "no address to send to")?;
    Ok(endpoints(own, "10.2.0.1:7100"))
}

#[test]
fn a_revoked_node_stays_out_until_it_is_restored() {
    scenario("exile", &[("bad", "east"), ("good", "west")], |mesh| {
        let marker = new_marker();
        let (bad, good) = (mesh.pod("bad", "p")?, mesh.pod("good", "p")?);
        let reaches = || Ok(!ping(&bad.netns()?, good.v4(), 2, marker)?.times.is_empty());
        wait::until_true("bad reaches good", Duration::from_secs(20), reaches)?;
        let told = mesh.admin_json(&["node", "revoke", "bad", "--reason", "test"])?;
        ensure!(told["online"] == 1 && told["confirmed"] == 1 && told["millis"].is_u64(), "{told}");
        ensure!(!reaches()?, "it still reaches good");
        mesh.node_mut("bad").kill9()?;
        mesh.node_mut("bad").start()?;
        ensure!(!reaches()?, "it reaches good after a restart");
        // Whoever has its key gets neither a session nor a word.
        let key = identity(mesh.node("bad"))?;
        let id = mesh_id(mesh)?;
        let session = Speaker::open(mesh, mesh.node("bad"), &key, id).and_then(|mut speaker| speaker.learn(id));
        ensure!(session.is_err(), "a revoked key was served");
        let told = || mesh.node("bad").ctl(&["status"]);
        wait::until_true("its own status says why", Duration::from_secs(30), || Ok(told()?.contains("revoked")))?;

        let restored = mesh.admin(&["node", "restore", "bad"])?;
        ensure!(restored.contains("generation 2"), "{restored}");
        ensure!(mesh.admin(&["node", "restore", "bad"]).is_err(), "restored twice");
        wait::until_true("bad reaches good again", Duration::from_secs(60), reaches)?;
        // What happened is on record, and the record is whole.
        let log = mesh.admin(&["audit", "export"])?;
        for action in ["join", "revoke", "restore", "policy", "token-create"] {
            ensure!(log.contains(&format!("\"action\":\"{action}\"")), "no {action} in {log}");
        }
        let file = mesh.keyserver_node().directory().join("audit.jsonl");
        std::fs::write(&file, &log)?;
        let path = file.to_str().context("a path that is not UTF-8")?;
        let verified = mesh.admin(&["audit", "verify", path])?;
        ensure!(verified.contains("is whole"), "{verified}");
        mesh.admin(&["audit", "verify", "--live"])?;
        std::fs::write(&file, log.replacen("\"detail\":\"up to generation 1: test\"", "\"detail\":\"\"", 1))?;
        let broken = mesh.admin(&["audit", "verify", path]).expect_err("a changed log verifies");
        ensure!(format!("{broken:#}").contains("does not follow the line before it"), "{broken:#}");
        let cut: Vec<&str> = log.lines().take(3).collect();
        std::fs::write(&file, cut.join("\n"))?;
        let broken = mesh.admin(&["audit", "verify", path]).expect_err("a log that was cut off verifies");
        ensure!(format!("{broken:#}").contains("cut off after line 3"), "{broken:#}");
        Ok(())
    });
}

#[test]
fn an_identity_key_that_was_replaced_opens_nothing() {
    scenario("relic", &[("a", "east"), ("b", "west")], |mesh| {
        let id = mesh_id(mesh)?;
        let old = identity(mesh.node("a"))?;
        let session = |mesh: &Mesh, key: &SigningKey| {
            Speaker::open(mesh, mesh.node("a"), key, id).and_then(|mut speaker| speaker.learn(id))
        };
        mesh.node("a").ctl(&["keys", "rotate", "--identity"])?;
        let new = identity(mesh.node("a"))?;
        ensure!(session(mesh, &old).is_err(), "a key that was replaced was served");
        let alarms = mesh.node("a").ctl_json(&["audit"])?["alarms"].to_string();
        ensure!(alarms == "[]", "the thief was noticed as if it had a session: {alarms}");

        // Not with the node's own session either, whoever has that.
        mesh.node_mut("a").kill9()?;
        let mut speaker = Speaker::open(mesh, mesh.node("a"), &new, id)?;
        let world = speaker.learn(id)?;
        let (grant, (record, _)) = (world.grant("a").1, world.record("a"));
        ensure!(grant.unverified::<NodeGrant>()?.node == old.verify_key().node_id(), "the node has another id");
        let grants = world.items.iter().filter_map(|item| Some((item.unverified::<NodeGrant>().ok()?, item)));
        let earlier = grants.filter(|(one, _)| one.node == record.node).map(|(_, item)| item.hash(id));
        for under in earlier.chain([record.grant]) {
            let later = NodeRecord { seq: record.seq + 1, grant: under, before: None, ..record.clone() };
            let answer = speaker.publish(&Envelope::seal(id, &later, &[&old]))?;
            ensure!(answer.as_ref().is_some_and(|answer| answer.contains("signed by 0")), "{answer:?}");
        }
        let endpoints = Endpoints {
            node: record.node,
            seq: u64::MAX / 4,
            candidates: vec!["203.0.113.66:7100".parse()?],
            expires: unix_now() + 3_600,
        };
        let answer = speaker.publish(&Envelope::seal(id, &endpoints, &[&old]))?;
        ensure!(answer.as_ref().is_some_and(|answer| answer.contains("signed by 0")), "{answer:?}");
        drop(speaker);

        // Nobody enrols with any of the two, before the node is revoked and after.
        let join_with = |mesh: &mut Mesh, name: &str, key: &SigningKey| -> Result<String> {
            let thief = mesh.bare_node(name)?;
            place_identity(&thief, key)?;
            let error = thief.join(&mesh.token("east")?).expect_err("joined with a key of another node");
            Ok(error.to_string())
        };
        let words = join_with(mesh, "t1", &old)?;
        ensure!(words.contains("was replaced by another one"), "{words}");
        let words = join_with(mesh, "t2", &new)?;
        ensure!(words.contains("is one of node a"), "{words}");
        mesh.node_mut("a").start()?;
        mesh.admin(&["node", "revoke", "a", "--reason", "test"])?;
        for (name, key) in [("t3", &old), ("t4", &new)] {
            ensure!(session(mesh, key).is_err(), "a key of a revoked node was served");
            let words = join_with(mesh, name, key)?;
            ensure!(words.contains("revoked"), "{words}");
        }
        Ok(())
    });
}

/// Puts a stolen key where a node that joins looks for its own.
fn place_identity(node: &MeshNode, key: &SigningKey) -> Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    let state = node.node.directory().join("state");
    std::fs::DirBuilder::new().mode(0o700).create(&state)?;
    std::fs::write(state.join("identity"), key.seed().as_slice())?;
    std::fs::set_permissions(state.join("identity"), std::fs::Permissions::from_mode(0o600))?;
    Ok(())
}

#[test]
fn two_machines_with_one_identity_raise_alarms() {
    scenario("twins", &[("a", "east"), ("b", "west")], |mesh| {
        let twin = mesh.bare_node("twin")?;
        let (from, to) = (mesh.node("a").node.directory().join("state"), twin.node.directory().join("state"));
        copy_private(&from, &to)?;
        mesh.nodes.push(twin);
        mesh.node_mut("twin").start()?;
        let elsewhere = |node: &MeshNode| -> Result<bool> {
            Ok(node.ctl_json(&["audit"])?["alarms"].to_string().contains("identity-elsewhere"))
        };
        wait::until_true("one of the two says so", Duration::from_secs(60), || {
            Ok(elsewhere(mesh.node("a"))? || elsewhere(mesh.node("twin"))?)
        })?;
        wait::until_true("the keyserver names both addresses", Duration::from_secs(90), || {
            let status = mesh.admin(&["status"])?;
            Ok(status.contains("two machines with one identity"))
        })?;
        // A rotation of one is a record that the other never made.
        let rotated = mesh.node("twin").ctl(&["keys", "rotate", "--local"]);
        rotated.context("rotate the twin")?;
        wait_alarm(mesh.node("a"), "own-record-unknown", "a copy of it is at work elsewhere")
    });
}

fn copy_private(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    std::fs::DirBuilder::new().mode(0o700).create(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
            std::fs::set_permissions(to.join(entry.file_name()), std::fs::Permissions::from_mode(0o600))?;
        }
    }
    Ok(())
}
