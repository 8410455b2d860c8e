//! A stolen keyserver: its transport key in the hands of somebody who shows nodes what he likes. Without the issuer's key he
//! can withhold, and nothing more; each attempt is refused for its reason, an alarm names it, and traffic goes on.
#![allow(clippy::unwrap_used, reason = "tests")]

mod hostile;

use anyhow::{Context as _, Result, ensure};
use hostile::{Hostile, Speaker, World, identity, stolen_key, unix_now, wait_alarm};
use mesh_e2e::capture::new_marker;
use mesh_e2e::mesh::{Mesh, MeshNode, scenario};
use mesh_e2e::pod::Pod;
use mesh_e2e::traffic::ping;
use mesh_e2e::wait;
use mesh_protocol::address::mesh_v6;
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Hash, MeshId, NodeId};
use mesh_protocol::key::{SigningKey, TunnelSecret};
use mesh_protocol::record::{Checkpoint, EpochKey, NodeGrant, NodeRecord};
use std::time::Duration;

/// Where the thief would have a node send.
const FORGED_ENDPOINT: &str = "203.0.113.66:7100";

/// What every attack works on.
struct Stage<'m> {
    mesh: &'m Mesh,
    hostile: Hostile,
    world: World,
    /// The keyserver's transport key: all that was stolen.
    transport: SigningKey,
    /// Somebody's own key, of no standing in the mesh.
    own: SigningKey,
    a: NodeId,
    b: NodeId,
}

impl Stage<'_> {
    fn node_a(&self) -> &MeshNode {
        self.mesh.node("a")
    }

    fn seal_checkpoint(&self, checkpoint: &Checkpoint) -> Envelope {
        Envelope::seal(self.world.mesh, checkpoint, &[&self.transport])
    }

    /// Peers and prefixes as node a has them: nothing of it may change. A peer's endpoint may, to another address of its own.
    fn known(&self) -> Result<String> {
        let peers = self.node_a().ctl_json(&["peers"])?;
        ensure!(!peers.to_string().contains(FORGED_ENDPOINT), "node a believes a forged endpoint: {peers}");
        let stable = |peer: &serde_json::Value| format!("{} {} {}", peer["name"], peer["node"], peer["pod_cidrs"]);
        Ok(peers["peers"].as_array().context("no peers")?.iter().map(stable).collect::<Vec<_>>().join("\n"))
    }
}

#[test]
fn a_stolen_keyserver_forges_nothing_and_its_two_worlds_are_named() {
    scenario("thief", &[("a", "east"), ("b", "west")], |mesh| {
        let (pod_a, pod_b) = (mesh.pod("a", "p")?, mesh.pod("b", "p")?);
        let works = || reaches(&pod_a, &pod_b);
        wait::until_true("pods reach each other", Duration::from_secs(20), works)?;
        let spy = mesh.bare_node("spy")?;
        spy.join(&mesh.token("east")?)?;
        let id: MeshId = mesh.admin_json(&["status"])?["keyserver"]["mesh_id"].as_str().context("no id")?.parse()?;
        let key = identity(&spy)?;
        let before = Speaker::open(mesh, &spy, &key, id)?.learn(id)?;
        mesh.admin(&["keys", "rotate", "--node", "b"])?;
        let world = Speaker::open(mesh, &spy, &key, id)?.learn(id)?;
        ensure!(world.record("b").0.seq > before.record("b").0.seq, "b did not rotate");
        let transport = stolen_key(mesh, "transport")?;
        mesh.kill_keyserver()?;
        let hostile = Hostile::start(mesh, &transport, world.clone())?;
        let (a, b) = (world.grant("a").0.node, world.grant("b").0.node);
        let stage = Stage { mesh, hostile, world, transport, own: SigningKey::from_seed([66; 32]), a, b };
        stage.hostile.wait_for(a)?;
        stage.hostile.wait_for(b)?;
        let known = stage.known()?;

        adds_a_peer(&stage).context("adds a peer")?;
        widens_cidrs(&stage).context("widens CIDRs")?;
        replays(&stage, &before).context("replays")?;
        swaps_keys(&stage).context("swaps keys")?;
        rolls_back(&stage, &before).context("rolls back")?;
        ensure!(stage.known()? == known, "node a knows {} now, it knew {known}", stage.known()?);
        ensure!(works()?, "traffic stopped");
        withholds(&stage).context("withholds")?;
        equivocates(&stage).context("equivocates")?;
        ensure!(stage.known()? == known, "node a knows {} now, it knew {known}", stage.known()?);
        ensure!(works()?, "traffic stopped");
        Ok(())
    });
}

fn reaches(from: &Pod, to: &Pod) -> Result<bool> {
    Ok(!ping(&from.netns()?, to.v4(), 3, new_marker())?.times.is_empty())
}

fn foreign_grant(stage: &Stage<'_>, key: &SigningKey) -> NodeGrant {
    let (model, _) = stage.world.grant("b");
    let identity = key.verify_key();
    NodeGrant {
        node: identity.node_id(),
        identity,
        name: "mole".parse().unwrap(),
        mesh_v4: "100.96.200.1".parse().unwrap(),
        mesh_v6: mesh_v6(stage.world.mesh, identity.node_id()),
        pod_cidrs: vec!["10.2.200.0/24".parse().unwrap()],
        generation: 1,
        serial: model.serial + 1_000,
        ..model
    }
}

fn adds_a_peer(stage: &Stage<'_>) -> Result<()> {
    let grant = Envelope::seal(stage.world.mesh, &foreign_grant(stage, &stage.own), &[&stage.own]);
    stage.hostile.items(stage.a, vec![grant], 1, None);
    wait_alarm(stage.node_a(), "directory-refused", "signed by 0 of the keys that may")?;
    // Nor with the key that he has: it is no issuer's.
    let grant = Envelope::seal(stage.world.mesh, &foreign_grant(stage, &stage.own), &[&stage.transport]);
    let record = NodeRecord { node: stage.own.verify_key().node_id(), ..stage.world.record("b").0 };
    let record = Envelope::seal(stage.world.mesh, &record, &[&stage.own]);
    stage.hostile.items(stage.a, vec![grant, record], 2, None);
    wait_alarm(stage.node_a(), "directory-refused", "has no grant")
}

fn widens_cidrs(stage: &Stage<'_>) -> Result<()> {
    let (held, _) = stage.world.grant("b");
    let wide = NodeGrant {
        generation: held.generation + 1,
        serial: held.serial + 1_000,
        pod_cidrs: vec!["10.0.0.0/8".parse().unwrap()],
        ..held
    };
    stage.hostile.items(stage.a, vec![Envelope::seal(stage.world.mesh, &wide, &[&stage.transport])], 1, None);
    wait_alarm(stage.node_a(), "directory-refused", "signed by 0 of the keys that may")
}

fn swaps_keys(stage: &Stage<'_>) -> Result<()> {
    let (held, envelope) = stage.world.record("b");
    let key = |epoch: u64, byte: u8| EpochKey { epoch, key: TunnelSecret::from_bytes([byte; 32]).public() };
    let swapped = NodeRecord {
        seq: held.seq + 1,
        current: key(held.current.epoch + 1, 91),
        previous: None,
        spare: key(held.current.epoch + 2, 92),
        before: Some(envelope.hash(stage.world.mesh)),
        ..held
    };
    let forged = Envelope::seal(stage.world.mesh, &swapped, &[&stage.transport]);
    stage.hostile.items(stage.a, vec![forged], 1, None);
    wait_alarm(stage.node_a(), "directory-refused", "signed by 0 of the keys that may")?;
    // An address of his own choice for b is refused as well.
    let endpoints = mesh_protocol::record::Endpoints {
        node: stage.b,
        seq: u64::MAX / 4,
        candidates: vec![FORGED_ENDPOINT.parse().unwrap()],
        expires: unix_now() + 3600,
    };
    let endpoints = Envelope::seal(stage.world.mesh, &endpoints, &[&stage.own]);
    stage.hostile.items(stage.a, vec![endpoints], 1, None);
    Ok(())
}

fn replays(stage: &Stage<'_>, before: &World) -> Result<()> {
    stage.hostile.items(stage.a, vec![before.record("b").1], 1, None);
    let words = format!("has seq {}, {} is held", before.record("b").0.seq, stage.world.record("b").0.seq);
    wait_alarm(stage.node_a(), "directory-refused", &words)
}

fn rolls_back(stage: &Stage<'_>, before: &World) -> Result<()> {
    stage.hostile.checkpoint(stage.a, before.checkpoint.clone());
    wait_alarm(stage.node_a(), "stale", "an older state than this node has seen")?;
    ensure!(stage.node_a().status()?["control"]["stale"] == true, "status does not say STALE");
    Ok(())
}

/// Node a hears of five more revisions, node b of none: a passes on what it heard.
fn withholds(stage: &Stage<'_>) -> Result<()> {
    let at = stage.hostile.position(stage.a).max(stage.hostile.position(stage.b));
    let mut newer = Checkpoint { time: unix_now(), state: Hash([1; 32]), ..stage.world.checkpoint() };
    newer.position.revision = at.revision + 5;
    let steps = newer.position.revision - stage.hostile.position(stage.a).revision;
    stage.hostile.items(stage.a, Vec::new(), steps, Some(stage.seal_checkpoint(&newer)));
    let b = stage.mesh.node("b");
    wait::until_true("b is told that it is not told all", Duration::from_secs(70), || {
        let old = Checkpoint { time: unix_now(), ..stage.world.checkpoint() };
        stage.hostile.checkpoint(stage.b, stage.seal_checkpoint(&old));
        Ok(b.ctl_json(&["audit"])?["alarms"].to_string().contains("shows peers a newer state than this node"))
    })
}

/// The same revision, another world: named by both within a minute, with the proof.
fn equivocates(stage: &Stage<'_>) -> Result<()> {
    let mut other = Checkpoint { time: unix_now(), state: Hash([2; 32]), ..stage.world.checkpoint() };
    other.position = stage.hostile.position(stage.a);
    let steps = other.position.revision - stage.hostile.position(stage.b).revision;
    stage.hostile.items(stage.b, Vec::new(), steps, Some(stage.seal_checkpoint(&other)));
    for name in ["b", "a"] {
        let node = stage.mesh.node(name);
        wait_alarm(node, "equivocation", "two worlds").with_context(|| format!("on {name}"))?;
        let both = wait::until("evidence is on disk", Duration::from_secs(20), || {
            let audit = node.ctl_json(&["audit"])?;
            let kept = audit["evidence"].as_array().context("no evidence")?.clone();
            let checkpoints: Vec<_> = kept.into_iter().filter(|found| found["kind"] == "checkpoint").collect();
            ensure!(checkpoints.len() >= 2, "only {} checkpoints are kept", checkpoints.len());
            Ok(checkpoints)
        })?;
        let signer = stage.transport.verify_key().id().to_string();
        ensure!(both.iter().all(|found| found["signers"][0] == signer.as_str()), "{both:?}");
        ensure!(node.status()?["control"]["stale"] == true, "status of {name} does not say STALE");
    }
    Ok(())
}
