//! Tunnels have preshared keys from key offers, unless the mesh was made without; nothing makes them weaker. One that was made
//! without turns while packets pass.
#![allow(clippy::unwrap_used, reason = "tests")]

mod desk;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use desk::{Strict, run_waiting};
use mesh_e2e::capture::new_marker;
use mesh_e2e::daemon::binary;
use mesh_e2e::mesh::{scenario, scenario_with};
use mesh_e2e::pod::Pod;
use mesh_e2e::traffic::{Stream, ping};
use mesh_e2e::{Capture, Mesh, wait};
use serde_json::Value;

const PAIR: [(&str, &str); 2] = [("east-1", "east"), ("west-1", "west")];

fn peer_of(mesh: &Mesh, node: &str) -> Result<Value> {
    let peers = mesh.node(node).ctl_json(&["peers"])?;
    peers["peers"].get(0).cloned().context("no peer")
}

#[test]
fn a_new_mesh_is_post_quantum_and_says_so() {
    scenario("pq", &PAIR, |mesh| {
        let marker = new_marker();
        let capture = Capture::start(&mesh.lab, marker)?;
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        // New tunnels, while somebody listens.
        mesh.node_mut("west-1").stop()?;
        mesh.node_mut("west-1").start()?;
        wait::until_true("pods talk", Duration::from_secs(10), || {
            Ok(!ping(&a.netns()?, b.v4(), 1, marker)?.times.is_empty())
        })?;
        for node in ["east-1", "west-1"] {
            let peer = peer_of(mesh, node)?;
            ensure!(peer["post_quantum"] == true && peer["post_quantum_required"] == true, "{node}: {peer}");
            ensure!(mesh.node(node).status()?["peers_post_quantum"] == 1, "{node}");
            let table = mesh.node(node).ctl(&["peers"])?;
            ensure!(
                table.lines().next().is_some_and(|head| head.contains(" PQ ")) && table.contains(" yes "),
                "{table}"
            );
        }
        let seen = capture.stop()?;
        ensure!(seen.offers > 0, "{seen:?}");
        seen.assert_nothing_clear()
    });
}

#[test]
fn without_offers_there_is_no_tunnel_and_never_a_weaker_one() {
    scenario("pqcut", &PAIR, |mesh| {
        let marker = new_marker();
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        let nodes = ["east-1", "west-1"];
        for name in nodes {
            // 1188 bytes and the UDP header. Everything else passes: handshakes too.
            let rules = "table inet strip { chain in { type filter hook input priority 0; udp dport 7100-7107 udp length 1196 drop; }; }";
            // One by one, as on a plain card: offer and initiation go as one train otherwise.
            mesh.node(name).node.output("ethtool", &["-K", "uplink", "tx-udp-segmentation", "off"])?;
            mesh.node(name).node.output("nft", &["-f", &rule_file(mesh, name, rules)?])?;
        }
        for name in nodes {
            mesh.node_mut(name).kill9()?;
            mesh.node_mut(name).start()?;
        }
        let missing = |name: &str| -> Result<u64> {
            Ok(mesh.node(name).status()?["dropped"]["missing_key"].as_u64().unwrap_or(0))
        };
        wait::until_true("initiations without a key are dropped", Duration::from_secs(20), || {
            let _ = ping(&a.netns()?, b.v4(), 1, marker)?;
            Ok(missing("east-1")? + missing("west-1")? > 3)
        })?;
        ensure!(ping(&a.netns()?, b.v4(), 2, marker)?.times.is_empty(), "a packet passed");
        for name in nodes {
            let peer = peer_of(mesh, name)?;
            ensure!(peer["up"] == false && peer["post_quantum"] == false, "{name}: {peer}");
            ensure!(
                peer["tunnels"].as_array().is_some_and(|all| all.iter().all(|one| one["confirmed"] == false)),
                "{peer}"
            );
        }
        for name in nodes {
            mesh.node(name).node.output("nft", &["delete", "table", "inet", "strip"])?;
        }
        wait::until_true("pods talk again", Duration::from_secs(20), || {
            Ok(!ping(&a.netns()?, b.v4(), 1, marker)?.times.is_empty())
        })?;
        ensure!(peer_of(mesh, "east-1")?["post_quantum"] == true);
        Ok(())
    });
}

#[test]
fn a_mesh_made_without_has_plain_tunnels_and_sends_no_offer() {
    let mesh = Mesh::bare("pqoff").and_then(|mut mesh| off(&mut mesh).map(|()| mesh));
    mesh.unwrap_or_else(|error| panic!("{error:#}"));
}

fn off(mesh: &mut Mesh) -> Result<()> {
    let marker = new_marker();
    let directory = mesh.keyserver_directory();
    let directory = directory.to_str().context("a path in UTF-8")?;
    let node = mesh.keyserver_node().clone();
    let address = format!("{}:7443", node.v4());
    let init = ["init", "--dir", directory, "--name", "lab", "--address", &address, "--pq", "off"];
    node.output(binary("keyserver")?, &init)?;
    mesh.keep_admin_socket_here()?;
    mesh.start_keyserver()?;
    for cluster in ["east", "west"] {
        let pool = if cluster == "east" { "10.1.0.0/16" } else { "10.2.0.0/16" };
        mesh.admin(&["cluster", "add", cluster, "--pod-cidr", pool, "--node-prefix", "24"])?;
    }
    let capture = Capture::start(&mesh.lab, marker)?;
    for (name, cluster) in PAIR {
        mesh.add_node(name, cluster)?;
    }
    mesh.wait_settled()?;
    let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
    wait::until_true("pods talk", Duration::from_secs(10), || {
        Ok(!ping(&a.netns()?, b.v4(), 1, marker)?.times.is_empty())
    })?;
    let peer = peer_of(mesh, "east-1")?;
    ensure!(peer["up"] == true && peer["post_quantum"] == false && peer["post_quantum_required"] == false, "{peer}");
    let seen = capture.stop()?;
    ensure!(seen.offers == 0 && seen.wireguard[1] > 0, "{seen:?}");
    seen.assert_nothing_clear()
}

/// A mesh made without turns within this: tunnels are opened within ten seconds, and those before are gone five after.
const TURN: Duration = Duration::from_secs(25);

/// Flows both ways, on several lanes, that have begun to arrive.
fn streams(a: &Pod, b: &Pod) -> Result<Vec<Stream>> {
    let start = |n: usize| {
        let (from, to) = if n.is_multiple_of(2) { (a, b) } else { (b, a) };
        Stream::start(&from.netns()?, &to.netns()?, to.v4(), 250, u64::MAX, 64, new_marker())
    };
    let streams: Vec<Stream> = (0..6).map(start).collect::<Result<_>>()?;
    wait::until_true("the streams arrive", TURN, || Ok(streams.iter().all(|stream| stream.arrived() > 50)))?;
    Ok(streams)
}

fn ensure_whole(streams: Vec<Stream>) -> Result<()> {
    for stream in streams {
        let counts = stream.stop()?;
        println!("{counts:?}");
        ensure!(counts.lost() == 0 && counts.duplicated == 0 && counts.sent > 400, "{counts:?}");
    }
    Ok(())
}

fn wait_reaches(from: &Pod, to: &Pod) -> Result<()> {
    wait::until_true("pods reach each other", TURN, || {
        Ok(!ping(&from.netns()?, to.v4(), 1, new_marker())?.times.is_empty())
    })
}

/// Waits until packets to the peer go by agreed keys and no tunnel without is left; it is up all the time. Says whether the
/// tunnel before was seen to be in use.
fn wait_turned(mesh: &Mesh, node: &str, peer: &str) -> Result<bool> {
    let mut seen = false;
    wait::until(&format!("{node} has turned to {peer}"), TURN, || {
        let table = mesh.node(node).ctl(&["peers"])?;
        seen |= table.lines().any(|line| line.starts_with(peer) && line.contains(" turning "));
        let peers = mesh.node(node).ctl_json(&["peers"])?["peers"].clone();
        let one = peers.as_array().and_then(|all| all.iter().find(|one| one["name"] == peer)).context("no peer")?;
        let tunnels = one["tunnels"].as_array().context("no tunnels")?;
        let all_agreed = tunnels.iter().all(|tunnel| tunnel["post_quantum"] == true);
        let yes = one["post_quantum"] == true && one["post_quantum_required"] == true;
        ensure!(yes && all_agreed && one["up"] == true, "{one}");
        Ok(())
    })?;
    Ok(seen)
}

/// Waits until every lane has a tunnel to the peer without an agreed key; it is up all the time.
fn wait_back(mesh: &Mesh, node: &str, peer: &str) -> Result<()> {
    wait::until(&format!("{node} has turned back to {peer}"), TURN, || {
        let peers = mesh.node(node).ctl_json(&["peers"])?["peers"].clone();
        let one = peers.as_array().and_then(|all| all.iter().find(|one| one["name"] == peer)).context("no peer")?;
        let tunnels = one["tunnels"].as_array().context("no tunnels")?;
        let is_plain = |lane: u64| {
            let of_lane = tunnels.iter().filter(|tunnel| tunnel["lane"] == lane);
            of_lane.into_iter().any(|tunnel| tunnel["post_quantum"] == false && tunnel["confirmed"] == true)
        };
        let no = one["post_quantum"] == false && one["post_quantum_required"] == false;
        ensure!(no && is_plain(0) && is_plain(1) && one["up"] == true, "{one}");
        Ok(())
    })
}

/// Sessions that carry the next packets of these flows.
fn sessions(mesh: &Mesh, streams: &[Stream]) -> Result<BTreeSet<(IpAddr, u32)>> {
    let capture = Capture::start(&mesh.lab, new_marker())?;
    let before: Vec<u64> = streams.iter().map(Stream::arrived).collect();
    wait::until_true("more packets arrive", TURN, || {
        Ok(streams.iter().zip(&before).all(|(stream, before)| stream.arrived() > before + 200))
    })?;
    let seen = capture.stop_now()?;
    seen.assert_nothing_clear()?;
    ensure!(!seen.sessions.is_empty(), "nothing passes: {seen:?}");
    Ok(seen.sessions)
}

#[test]
fn a_running_mesh_turns_and_loses_no_packet() {
    let nodes = [("east-1", "east"), ("west-1", "west"), ("onprem-1", "onprem")];
    scenario_with("pqturn", &["--pq", "off"], &nodes, |mesh| {
        let (a, b, c) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?, mesh.pod("onprem-1", "a")?);
        for (from, to) in [(&a, &b), (&c, &a), (&c, &b)] {
            wait_reaches(from, to)?;
        }
        mesh.node_mut("onprem-1").stop()?;
        let streams = streams(&a, &b)?;
        let table = mesh.node("east-1").ctl(&["peers"])?;
        ensure!(table.contains(" off "), "{table}");
        let plain = sessions(mesh, &streams)?;

        let said = mesh.admin_json(&["policy", "set-pq", "required"])?;
        ensure!(said["policy"] == "required" && said["left"] == 0 && said["file"] == Value::Null, "{said}");
        let seen = [wait_turned(mesh, "east-1", "west-1")?, wait_turned(mesh, "west-1", "east-1")?];
        println!("turning was seen: {seen:?}");
        let mut agreed = sessions(mesh, &streams)?;
        // What is told to one that is away goes by the session that it had, while that lasts.
        let away = mesh.node("onprem-1").node.v4();
        agreed.retain(|(to, _)| *to != IpAddr::from(away));
        ensure!(agreed.is_disjoint(&plain), "a session from before goes on: {agreed:?}, before {plain:?}");
        ensure_whole(streams)?;

        // It knows of nothing when it starts, and initiates to peers that it knows.
        mesh.node_mut("onprem-1").start()?;
        for (from, to) in [(&c, &a), (&b, &c)] {
            wait_reaches(from, to)?;
        }
        wait_turned(mesh, "onprem-1", "east-1")?;
        wait_turned(mesh, "west-1", "onprem-1")?;
        // Once more it changes nothing, and who joins is asked for the same.
        let again = mesh.admin_json(&["policy", "set-pq", "required"])?;
        ensure!(again["policy_version"] == said["policy_version"], "{again}");

        // And back: their own grants never required it.
        let streams = self::streams(&a, &b)?;
        let agreed = sessions(mesh, &streams)?;
        let back = mesh.admin_json(&["policy", "set-pq", "off"])?;
        ensure!(back["policy"] == "off" && back["left"] == 0, "{back}");
        wait_back(mesh, "east-1", "west-1")?;
        wait_back(mesh, "west-1", "east-1")?;
        let plain = sessions(mesh, &streams)?;
        ensure!(plain.is_disjoint(&agreed), "agreed keys are in use still: {plain:?}, before {agreed:?}");
        ensure_whole(streams)
    });
}

#[test]
fn in_strict_mode_a_cluster_turns_by_grants_and_all_by_the_policy() {
    let mut strict = Strict::new_with("pqfiles", &["--pq", "off"]).unwrap_or_else(|error| panic!("{error:#}"));
    if let Err(error) = by_files(&mut strict) {
        eprintln!("{}", strict.mesh.logs());
        panic!("pqfiles: {error:#}");
    }
}

fn by_files(strict: &mut Strict) -> Result<()> {
    strict.change_policy("west", &["--add-cluster", "west=10.2.0.0/16"], &["root-1", "root-2"])?;
    for (name, cluster) in [("n1", "east"), ("n2", "west"), ("n3", "west")] {
        let token = strict.token(cluster, "issuer-a", "1")?;
        let mut node = strict.mesh.bare_node(name)?;
        node.join_with(&token, &["--node-name", name, "--no-wait"])?;
        run_waiting(&mut node)?;
        strict.mesh.nodes.push(node);
    }
    strict.wait_pending(3)?;
    strict.grant("issuer-a")?;
    for name in ["n1", "n2", "n3"] {
        strict.mesh.node_mut(name).daemon.as_mut().context("no daemon")?.wait_ready()?;
    }
    strict.mesh.wait_settled()?;
    strict.mesh.wait_connected()?;
    let pods = ["n1", "n2", "n3"].map(|node| strict.mesh.pod(node, "a").unwrap());
    wait_reaches(&pods[1], &pods[2])?;
    wait_reaches(&pods[0], &pods[1])?;
    let (streams, others) = (streams(&pods[0], &pods[1])?, streams(&pods[1], &pods[2])?);

    let root = format!("{:#}", strict.mesh.admin(&["policy", "set-pq", "required"]).unwrap_err());
    ensure!(root.contains("meshctl policy propose --pq required"), "{root}");
    let east = ["policy", "set-pq", "required", "--cluster", "east"];
    let issuer = format!("{:#}", strict.mesh.admin(&east).unwrap_err());
    ensure!(issuer.contains("1 grant has to be signed") && issuer.contains("--out"), "{issuer}");
    let (pending, signed) = (strict.desk.path("east.txt"), strict.desk.path("east-signed.txt"));
    strict.mesh.admin(&[east.as_slice(), &["--out", &pending]].concat())?;
    let key = strict.desk.path("issuer-a");
    let sign = ["grant", "sign", &pending, "--signer", &key, "--out", &signed, "--mesh-id", &strict.mesh_id, "--yes"];
    strict.desk.run(&sign)?;
    strict.mesh.admin(&["grant", "import", &signed])?;
    let done = strict.mesh.admin_json(&east)?;
    ensure!(done["total"] == 1 && done["required"] == 1 && done["policy"] == "off", "{done}");
    wait_turned(&strict.mesh, "n1", "n2")?;
    wait_turned(&strict.mesh, "n2", "n1")?;
    let table = strict.mesh.node("n2").ctl(&["peers"])?;
    ensure!(table.lines().any(|line| line.starts_with("n3") && line.contains(" off ")), "{table}");

    // The others' grants say nothing of it, and nobody is out.
    let adopted = strict.change_policy("pq", &["--pq", "required"], &["root-1", "root-3"])?;
    ensure!(adopted["adopted"] == true && adopted["dropped"] == 0, "{adopted}");
    wait_turned(&strict.mesh, "n2", "n3")?;
    wait_turned(&strict.mesh, "n3", "n2")?;
    ensure_whole(streams)?;
    ensure_whole(others)
}

/// Writes nft rules where the lab removes them.
fn rule_file(mesh: &Mesh, node: &str, rules: &str) -> Result<String> {
    let path = mesh.lab.directory().join(format!("strip-{node}.nft"));
    std::fs::write(&path, rules)?;
    path.to_str().map(str::to_owned).context("a path in UTF-8")
}
