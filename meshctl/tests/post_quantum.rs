//! `meshctl policy set-pq` against a keyserver that answers from a script.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "tests")]

mod support;

use serde_json::{Value, json};
use support::Desk;

fn state(policy: &str, required: u32, left: u32, pending: u32) -> String {
    let file: Option<&str> = (pending > 0).then_some("-----BEGIN MESH GRANT REQUESTS-----\n");
    let state = json!({"reply": "post-quantum", "policy_version": 4, "policy": policy, "total": 7, "required": required,
        "left": left, "pending": pending, "file": file});
    format!("{state}\n")
}

#[test]
fn the_policy_is_set_for_all() {
    let desk = Desk::new().keyserver(state("required", 2, 0, 0));
    let text = desk.run("policy set-pq required").ok().out;
    assert!(text.contains("policy 4: post-quantum tunnels are required of every node"), "{text}");
    assert!(text.contains("grants of 2 of 7 nodes"), "{text}");
    assert_eq!(desk.asked(), [json!({"request": "set-post-quantum", "pq": "required", "clusters": []})]);
    let value = desk.run("policy set-pq required --json").ok().json();
    assert_eq!((&value["policy"], &value["file"]), (&json!("required"), &Value::Null));
    assert_eq!(desk.run("policy set-pq maybe").code, 2);
}

#[test]
fn a_cluster_whose_issuer_is_elsewhere_gets_a_file() {
    let desk = Desk::new().keyserver(state("off", 3, 0, 4));
    let bare = desk.run("policy set-pq required --cluster east --cluster west");
    assert!(
        bare.code == 1 && bare.err.contains("4 grants have to be signed") && bare.err.contains("--out"),
        "{bare:?}"
    );
    let asked = json!({"request": "set-post-quantum", "pq": "required", "clusters": ["east", "west"]});
    assert_eq!(desk.asked(), [asked]);
    let out = desk.path("pending.txt");
    let ran = desk.run(&format!("policy set-pq required --cluster east --out {}", out.display())).ok();
    assert!(ran.err.contains("meshctl grant sign"), "{ran:?}");
    assert!(std::fs::read_to_string(out).unwrap().starts_with("-----BEGIN MESH GRANT REQUESTS"));
    assert_eq!(desk.run("policy set-pq required --out x").code, 2, "a file is of a cluster");
}

#[test]
fn a_keyserver_that_gets_no_further_is_not_asked_for_ever() {
    let desk = Desk::new().keyserver(state("off", 3, 4, 0));
    let ran = desk.run("policy set-pq required --cluster east");
    assert!(ran.code == 1 && ran.err.contains("3 of 7 grants are signed"), "{ran:?}");
    assert_eq!(desk.asked().len(), 2);
}
