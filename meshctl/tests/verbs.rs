//! Each verb: what it asks, and what it prints as text and as JSON.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "tests")]

mod support;

use std::io::Write as _;
use std::process::Stdio;

use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Hash, MeshId, Position};
use mesh_protocol::key::SigningKey;
use mesh_protocol::record::Checkpoint;
use mesh_protocol::token::{JoinToken, TokenLimits};
use serde_json::{Value, json};
use support::{Desk, Ran};

fn lines(replies: &[Value]) -> String {
    replies.iter().map(|reply| format!("{reply}\n")).collect()
}

fn id(digit: &str) -> String {
    digit.repeat(64)
}

fn node_status() -> Value {
    json!({
        "reply": "status", "version": "0.1.0", "mesh": "prod", "mesh_id": id("a"), "node": id("1"), "name": "n1",
        "cluster": "east", "addresses": ["100.64.0.1", "fd00::1"], "pod_cidrs": ["10.1.0.0/24"], "pods": 2, "ready": false,
        "waiting_for": ["routes applied"],
        "control": {"connected": true, "keyserver": "192.0.2.1:7443", "transport": "quic",
            "position": {"epoch": 7, "revision": 42}, "checkpoint_age": 5, "exposure_left": 604795, "stale": true,
            "error": null},
        "policy_version": 3,
        "keys": {"seq": 9, "current": 4, "previous": 3, "spare": 5, "current_age": 60, "published": true},
        "device": {"name": "mesh0", "mode": "plain", "lanes": 1, "port": 7100, "mtu": 1420},
        "peers_known": 4, "peers_up": 3, "peers_post_quantum": 2, "uptime": 3600, "dropped": {"source": 7},
        "alarms": [{"name": "equivocation", "message": "two truths of n2 \u{1b}[31m", "age": 61}],
    })
}

fn keyserver_status() -> Value {
    json!({
        "reply": "status", "version": "0.1.0", "mesh": "prod", "mesh_id": id("a"), "trust": "easy-with-root",
        "policy_version": 3, "position": {"epoch": 255, "revision": 42}, "listen": ["192.0.2.1:7443"], "nodes": 5,
        "connected": 4, "uptime": 10, "alarms": ["disk is full"],
    })
}

#[test]
fn status_shows_node_and_keyserver() {
    let desk = Desk::new().node(lines(&[node_status()])).keyserver(lines(&[keyserver_status()]));
    let text = desk.run("status").ok().out;
    for part in [
        "node n1 (11111111)",
        "no, waiting for routes applied",
        "3 of 4 up, 2 post-quantum",
        "STALE",
        "epoch 4 since 1m, previous 3 still answers, spare 5",
        "source 7",
        "equivocation: two truths",
        "mesh0 (plain), 1 lane, UDP 7100, MTU 1420",
        "owns the mesh",
        "4 of 5 connected",
        "disk is full",
    ] {
        assert!(text.contains(part), "'{part}' is missing in\n{text}");
    }
    assert!(!text.contains('\u{1b}'), "an escape sequence reached the terminal");
    let json = desk.run("status --json").ok().json();
    assert_eq!(json["node"]["keys"]["current"], 4);
    assert_eq!(json["keyserver"]["connected"], 4);
    assert_eq!(json["node"].get("reply"), None);
}

#[test]
fn status_shows_the_one_that_is_there() {
    let node = Desk::new().node(lines(&[node_status()]));
    assert!(!node.run("status").ok().out.contains("keyserver\n"));
    assert_eq!(node.run("status --json").ok().json()["keyserver"], Value::Null);
    let keyserver = Desk::new().keyserver(lines(&[keyserver_status()]));
    assert!(keyserver.run("status").ok().out.starts_with("keyserver\n"));
    assert_eq!(keyserver.run("status --json").ok().json()["node"], Value::Null);
}

#[test]
fn peers_and_routes_are_tables() {
    let peer = json!({
        "node": id("2"), "name": "n2", "cluster": "west", "addresses": ["100.64.0.2"], "pod_cidrs": ["10.2.0.0/24"],
        "endpoint": "192.0.2.2:7100", "up": true, "last_handshake": 3, "received_bytes": 2048, "sent_bytes": 5,
        "post_quantum": false, "tunnels": [
            {"local_epoch": 4, "remote_epoch": 1, "confirmed": true},
            {"local_epoch": 3, "remote_epoch": 1, "confirmed": true}],
    });
    let desk = Desk::new().node(lines(&[json!({"reply": "peers", "peers": [peer]})]));
    let text = desk.run("peers").ok().out;
    assert!(text.starts_with("NAME  CLUSTER  UP "), "{text}");
    assert!(text.contains("n2    west     yes  192.0.2.2:7100  3s ago     2.0 KiB   5 B   4/1 +1"), "{text}");
    assert_eq!(desk.run("peers --json").ok().json()["peers"][0]["endpoint"], "192.0.2.2:7100");
    for (yes, required, tunnel, said) in [
        (false, false, false, "off"),
        (false, true, false, "turning"),
        (false, true, true, "required"),
        (true, true, true, "yes"),
    ] {
        let mut peer = peer.clone();
        (peer["post_quantum"], peer["post_quantum_required"]) = (json!(yes), json!(required));
        peer["tunnels"] = json!([{"local_epoch": 4, "remote_epoch": 1, "confirmed": true, "post_quantum": tunnel}]);
        let text = Desk::new().node(lines(&[json!({"reply": "peers", "peers": [peer]})])).run("peers").ok().out;
        assert!(text.contains(&format!(" {said} ")), "{text}");
    }

    let routes = json!([
        {"prefix": "10.2.0.0/24", "kind": "peer", "via": "n2", "link": "mesh0", "mtu": 1420},
        {"prefix": "10.2.0.0/16", "kind": "pool", "via": null, "link": null, "mtu": null}]);
    let desk = Desk::new().node(lines(&[json!({"reply": "routes", "routes": routes})]));
    let text = desk.run("routes").ok().out;
    assert!(text.contains("10.2.0.0/24  peer  n2   mesh0        1420\n"), "{text}");
    assert!(text.contains("10.2.0.0/16  pool  -    unreachable  -\n"), "{text}");
    assert_eq!(desk.run("routes --json").ok().json()["routes"][1]["link"], Value::Null);
}

#[test]
fn paths_say_what_they_carry_and_whether_that_is_known() {
    let mut report = json!({"reply": "path", "node": id("b"), "name": "n2", "underlay_mtu": 1500, "device_mtu": 1420,
        "paths": [{"lane": 0, "remote_lane": 1, "endpoint": "192.0.2.2:7101", "path_mtu": 1278, "inner_mtu": 1280,
            "state": "black-hole", "last_probe": 3, "black_holes": 2}]});
    let desk = Desk::new().node(lines(std::slice::from_ref(&report)));
    let text = desk.run("path n2").ok().out;
    assert!(text.starts_with("n2: underlay MTU 1500, device MTU 1420\n"), "{text}");
    assert!(text.contains("0     1       192.0.2.2:7101  1278      1280       black-hole  3s ago      2\n"), "{text}");
    assert_eq!(desk.asked(), [json!({"request": "path", "target": "n2"})]);
    assert_eq!(desk.run("path n2 --json").ok().json()["paths"][0]["state"], "black-hole");

    report["paths"] = json!([]);
    report["underlay_mtu"] = Value::Null;
    let text = Desk::new().node(lines(&[report])).run("path n2").ok().out;
    assert!(text.starts_with("n2: underlay MTU -,") && text.contains("meshctl ping"), "{text}");
}

#[test]
fn ping_counts_answers_and_losses() {
    let replies = [
        json!({"reply": "echo", "number": 1, "address": "100.64.0.2", "micros": 1500}),
        json!({"reply": "echo", "number": 2, "address": "100.64.0.2", "micros": null}),
        json!({"reply": "done"}),
    ];
    let desk = Desk::new().node(lines(&replies));
    let text = desk.run("ping n2 -c 2").ok().out;
    assert_eq!(
        text,
        "100.64.0.2: answer 1 after 1.500 ms\n100.64.0.2: no answer 2 within a second\n\
         2 sent, 1 answered; round trip 1.500 / 1.500 / 1.500 ms (least, mean, most)\n"
    );
    let json = desk.run("ping n2 -6 -c 2 --json").ok().json();
    assert_eq!((&json["sent"], &json["received"]), (&json!(2), &json!(1)));
    assert_eq!(desk.asked()[1], json!({"request": "ping", "target": "n2", "count": 2, "v6": true}));

    let deaf = Desk::new().node(lines(&replies[1..]));
    let ran = deaf.run("ping n2 -c 1");
    assert_eq!(ran.code, 1);
    assert!(ran.err.contains("no answer from n2"), "{ran:?}");
}

fn rotation(promoted: &[&str], confirmed: &[&str], failed: Value, offline: &[&str], done: bool) -> Value {
    json!({"reply": "rotation", "job": 3, "wave": 1, "waves": 2, "total": 3, "promoted": promoted, "confirmed": confirmed, "failed": failed,
        "offline": offline, "millis": 900, "done": done})
}

#[test]
fn rotation_of_all_goes_through_the_keyserver() {
    let replies = [
        rotation(&["n1"], &[], json!([]), &[], false),
        rotation(&["n1", "n2", "n3"], &["n1", "n2", "n3"], json!([]), &[], true),
    ];
    let desk = Desk::new().keyserver(lines(&replies)).node("");
    let ran = desk.run("keys rotate --wait 5s").ok();
    assert_eq!(ran.out, "3 of 3 nodes rotated, all others know after 900 ms\n");
    assert!(ran.err.contains("0/3 confirmed, 1 promoted, wave 1 of 2"), "{ran:?}");
    assert_eq!(desk.asked(), [json!({"request": "rotate", "nodes": [], "force": false, "wait": 5000})]);
    let json = desk.run("keys rotate --node n1 --force --json").ok();
    assert_eq!(json.json()["scope"], "mesh");
    assert_eq!(json.err, "");
}

#[test]
fn rotation_that_is_incomplete_fails_and_says_why() {
    let cases = [
        (rotation(&["n1"], &["n1"], json!([{"node": "n2", "error": "too early"}]), &["n3"], true), "n2: too early", ""),
        (rotation(&["n1", "n2", "n3"], &["n1"], json!([]), &[], true), "2 nodes not confirmed", ""),
        (rotation(&["n1", "n2"], &["n1", "n2"], json!([]), &["n3"], true), "not connected: n3", "--node n3"),
    ];
    for (reply, message, more) in cases {
        let ran = Desk::new().keyserver(lines(&[reply])).run(&format!("keys rotate {more}"));
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.err.contains(message), "{ran:?}");
    }
    let offline = rotation(&["n1", "n2"], &["n1", "n2"], json!([]), &["n3"], true);
    assert!(Desk::new().keyserver(lines(&[offline])).run("keys rotate").ok().out.contains("not rotated: n3"));
}

#[test]
fn orders_reach_the_keyserver_as_they_were_given() {
    let desk = Desk::new().keyserver(lines(&[rotation(&["n1"], &["n1", "n2", "n3"], json!([]), &[], true)]));
    desk.run("keys rotate --cluster east --wave 10% --every 7d --at 2030-01-31T03:00:00Z --wait").ok();
    let expected = json!({"request": "rotate", "nodes": [], "cluster": "east", "force": false, "at": 1_896_058_800,
        "every": 604_800, "wave": 10, "wait": 86_400_000});
    assert_eq!(desk.asked(), [expected]);
    for words in ["--wave 0%", "--wave 101", "--at yesterday", "--cluster east --node n1", "--local --every 7d"] {
        assert_eq!(desk.run(&format!("keys rotate {words}")).code, 2, "{words}");
    }
    let later = json!({"reply": "rotation", "job": 4, "total": 0, "promoted": [], "confirmed": [], "failed": [],
        "offline": [], "millis": 0, "done": true});
    let later = Desk::new().keyserver(lines(&[later])).run("keys rotate --at 2h").ok();
    assert!(later.out.contains("rotation 4 has nobody to ask yet"), "{later:?}");
}

#[test]
fn a_plan_lists_waves_and_what_is_in_the_way() {
    let node = |name, wave, connected, previous: Option<u64>| json!({"node": name, "wave": wave, "connected": connected, "epoch": 4, "previous": previous});
    let nodes = [node("n1", 1, true, None), node("n2", 1, true, Some(3)), node("n3", 2, false, None)];
    let desk = Desk::new().keyserver(lines(&[json!({"reply": "rotation-plan", "nodes": nodes})]));
    let ran = desk.run("keys rotate --wave 60% --dry-run").ok();
    assert!(ran.out.contains("2     n3    4    not connected: asked when it comes"), "{ran:?}");
    assert!(ran.out.contains("epoch 3 still answers: refuses without --force"), "{ran:?}");
    assert_eq!(desk.run("keys rotate --dry-run --json").ok().json()["nodes"], json!(nodes));
}

#[test]
fn jobs_are_shown_held_and_ended() {
    let job = json!({"job": 3, "state": "paused", "whom": "cluster east", "force": false, "wave_percent": 10, "wave": 2,
        "waves": 10, "every": 604_800, "next": null, "began": 1_896_058_800, "ended": null, "total": 30, "promoted": 6,
        "confirmed": 5, "failed": [{"node": "n9", "error": "too early"}], "offline": 1});
    let node = json!({"name": "n1", "node": id("1"), "cluster": "east", "connected": true, "epoch": 5,
        "phase": "confirmed", "jobs": [3]});
    let desk = Desk::new().keyserver(lines(&[json!({"reply": "rotations", "jobs": [job], "nodes": [node]})]));
    let ran = desk.run("keys status").ok();
    assert!(ran.out.contains("3    paused  cluster east  2/10  6/30"), "{ran:?}");
    assert!(ran.out.contains("job 3: n9 refused: too early"), "{ran:?}");
    assert!(ran.out.contains("n1    east     yes        5    confirmed  3"), "{ran:?}");
    for (words, job, change) in
        [("pause", None, "pause"), ("resume 3", Some(3), "resume"), ("cancel 3", Some(3), "cancel")]
    {
        desk.run(&format!("keys {words}")).ok();
        let expected = json!({"request": "rotation-change", "job": job, "change": change});
        assert_eq!(desk.asked().last(), Some(&expected));
    }
    assert_eq!(desk.run("keys cancel").code, 2, "which one has to be said");
}

#[test]
fn rotation_of_this_node_goes_through_meshd() {
    let step =
        |confirmed, done| json!({"reply": "rotation", "epoch": 5, "peers": 2, "confirmed": confirmed, "done": done});
    for words in ["keys rotate", "keys rotate --local"] {
        let desk = Desk::new().node(lines(&[step(1, false), step(2, true)]));
        let ran = desk.run(words).ok();
        assert_eq!(ran.out, "epoch 5 is current; 2 of 2 connected peers use it\n");
        assert_eq!(desk.asked(), [json!({"request": "rotate", "force": false})]);
    }
    let named = Desk::new().node(lines(&[step(2, true)])).run("keys rotate --node n2");
    assert_eq!(named.code, 1);
    assert!(named.err.contains("--admin-socket"), "{named:?}");
}

#[test]
fn revocation_shows_progress_and_how_long_the_last_one_took() {
    let step = |confirmed, waiting: &[&str], done| {
        json!({"reply": "revocation", "node": "n1", "online": 3, "confirmed": confirmed, "waiting": waiting,
            "offline": ["n9"], "millis": 210, "done": done})
    };
    let desk = Desk::new().keyserver(lines(&[step(1, &["n2", "n3"], false), step(3, &[], true)]));
    let ran = desk.run("node revoke n1 --reason stolen --void-tokens --wait 2s").ok();
    assert_eq!(
        ran.out,
        "n1 is revoked; 3 connected nodes confirmed, the last one after 210 ms\n\
         offline, learn of it when they come back: n9\n"
    );
    assert!(ran.err.contains("1/3 nodes have cut off n1"), "{ran:?}");
    let expected =
        json!({"request": "node-revoke", "node": "n1", "reason": "stolen", "void_tokens": true, "wait": 2000});
    assert_eq!(desk.asked(), [expected]);
    assert_eq!(desk.run("node revoke n1 --json").ok().json()["confirmed"], 3);

    let late = Desk::new().keyserver(lines(&[step(2, &["n3"], true)])).run("node revoke n1");
    assert_eq!(late.code, 1);
    assert!(
        late.out.contains("2 of 3 connected nodes confirmed") && late.out.contains("did not confirm: n3"),
        "{late:?}"
    );
    assert!(late.err.contains("the revocation stands"), "{late:?}");
}

#[test]
fn nodes_and_clusters_are_tables() {
    let nodes = json!([
        {"node": id("1"), "name": "n1", "cluster": "east", "addresses": ["100.64.0.1"], "pod_cidrs": [], "generation": 1,
            "expires": 1_800_000_000, "connected": "192.0.2.7:4000", "key_epoch": 2, "revoked": false},
        {"node": id("2"), "name": "n2", "cluster": "east", "addresses": [], "pod_cidrs": [], "generation": 1,
            "expires": u64::MAX, "connected": null, "key_epoch": null, "revoked": true}]);
    let desk = Desk::new().keyserver(lines(&[json!({"reply": "nodes", "nodes": nodes})]));
    let text = desk.run("node list").ok().out;
    assert!(
        text.contains("n1    11111111  east     192.0.2.7:4000  2    100.64.0.1  -          2027-01-15T08:00:00Z"),
        "{text}"
    );
    assert!(text.contains("REVOKED") && text.contains("9999-12-31"), "{text}");
    assert_eq!(desk.run("node list --json").ok().json()["nodes"][1]["revoked"], true);

    let east =
        json!({"cluster": "east", "pod_cidrs": ["10.1.0.0/16"], "node_prefix": 24, "node_prefix6": 80, "nodes": 2});
    let desk = Desk::new().keyserver(lines(&[json!({"reply": "clusters", "clusters": [east]})]));
    let text = desk.run("cluster add east --pod-cidr 10.1.0.0/16 --node-prefix 24").ok().out;
    assert!(text.contains("east     10.1.0.0/16  /24, /80       2\n"), "{text}");
    let expected = json!({"request": "cluster-add", "cluster": "east", "pod_cidrs": ["10.1.0.0/16"], "node_prefix": 24,
        "node_prefix6": null});
    assert_eq!(desk.asked(), [expected]);
    assert_eq!(desk.run("cluster list --json").ok().json()["clusters"][0]["nodes"], 2);
}

#[test]
fn a_token_is_one_line_and_nothing_else() {
    let token = json!({"id": id("c"), "cluster": "east", "uses": 3, "used": 1, "expires": 4_000_000_000_u64,
        "revoked": false, "cidrs": ["10.1.7.0/24"], "tags": ["edge"]});
    let desk = Desk::new().keyserver(lines(&[json!({"reply": "token", "line": "mesh-join-SECRET", "token": token})]));
    let ran = desk.run("token create --cluster east --uses 3 --ttl 90m --cidr 10.1.7.0/24 --tag edge").ok();
    assert_eq!(ran.out, "mesh-join-SECRET\n");
    assert!(ran.err.contains("3 nodes may join east") && !ran.err.contains("SECRET"), "{ran:?}");
    let expected = json!({"request": "token-create", "cluster": "east", "uses": 3, "ttl": 5400, "cidrs": ["10.1.7.0/24"],
        "tags": ["edge"]});
    assert_eq!(desk.asked(), [expected]);
    assert_eq!(desk.run("token create --cluster east --json").ok().json()["line"], "mesh-join-SECRET");

    let desk = Desk::new().keyserver(lines(&[json!({"reply": "tokens", "tokens": [token]})]));
    let text = desk.run("token list").ok().out;
    assert!(text.contains("cccccccc  east     1/3   2096-10-02T07:06:40Z  open"), "{text}");
    desk.run("token revoke cccccccc").ok();
    assert_eq!(desk.asked()[1], json!({"request": "token-revoke", "token": "cccccccc"}));
}

#[test]
fn a_token_is_inspected_without_a_server_and_without_its_secret() {
    let mesh = MeshId([7; 32]);
    let (issuer, secret) = (SigningKey::from_seed([1; 32]), SigningKey::from_seed([0x5e; 32]));
    let limits = TokenLimits {
        key: secret.verify_key(),
        uses: 3,
        expires: 4_000_000_000,
        cluster: "east".parse().unwrap(),
        cidrs: vec!["10.1.7.0/24".parse().unwrap()],
        tags: vec!["edge".parse().unwrap()],
        issued: None,
    };
    let checkpoint = Checkpoint {
        position: Position { epoch: 1, revision: 4 },
        state: Hash([3; 32]),
        policy_version: 2,
        revocations: vec![],
        time: 1_800_000_000,
    };
    let token = JoinToken {
        mesh,
        policy_version: 2,
        policy: Hash([9; 32]),
        keyservers: vec!["keys.example.net:7443".into()],
        checkpoint: Envelope::seal(mesh, &checkpoint, &[&issuer]),
        limits: Envelope::seal(mesh, &limits, &[&issuer]),
        secret,
    };
    let desk = Desk::new();
    let file = desk.path("token");
    std::fs::write(&file, format!("{}\n", *token.to_line())).unwrap();
    let json = desk.run(&format!("token inspect {} --json", file.display())).ok().json();
    assert_eq!(json["cluster"], "east");
    assert_eq!(json["keyservers"][0], "keys.example.net:7443");
    assert_eq!(json["expired"], false);

    let mut child = desk
        .command("token inspect")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(token.to_line().as_bytes()).unwrap();
    let ran = Ran::of(&child.wait_with_output().unwrap()).ok();
    assert!(ran.out.contains("uses        3") && ran.out.contains("2096-10-02"), "{ran:?}");
    for text in [&ran.out, &json.to_string()] {
        assert!(!text.contains(&"5e".repeat(16)) && !text.contains(&token.to_line()[..40]), "{text}");
    }

    std::fs::write(&file, "mesh-join-AAAA").unwrap();
    let damaged = desk.run(&format!("token inspect {}", file.display()));
    assert_eq!(damaged.code, 1);
    assert!(damaged.err.contains("copy the whole line again"), "{damaged:?}");
    assert_eq!(desk.asked(), Vec::<Value>::new());
}

#[test]
fn down_asks_meshd() {
    let desk = Desk::new().node(lines(&[json!({"reply": "done"})]));
    assert_eq!(desk.run("down").ok().out, "mesh is down on this host\n");
    assert_eq!(desk.run("down --json").ok().json(), json!({"down": true}));
    assert_eq!(desk.asked()[0], json!({"request": "down"}));
}

#[test]
fn completion_and_manual_come_from_the_definitions() {
    let desk = Desk::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(desk.run(&format!("completion {shell}")).ok().out.contains("void-tokens"), "{shell}");
    }
    assert!(desk.run("man").ok().out.contains(".TH meshctl 1"));
    let dir = desk.dir().join("man");
    desk.run(&format!("man --dir {}", dir.display())).ok();
    for page in ["meshctl.1", "meshctl-status.1", "meshctl-node-revoke.1", "meshctl-token-inspect.1"] {
        assert!(std::fs::read_to_string(dir.join(page)).unwrap().contains(".TH meshctl"), "{page}");
    }
    assert!(desk.run("man --json").ok().json()["pages"]["meshctl-keys-rotate.1"].is_string());
}
