//! `meshctl keys rotate --identity` against a meshd that answers from a script.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "tests")]

mod support;

use serde_json::{Value, json};
use support::Desk;

fn id(digit: &str) -> String {
    digit.repeat(64)
}

fn step(phase: &str, error: Option<&str>, confirmed: u32, done: bool) -> Value {
    json!({"reply": "identity", "from": id("a"), "to": id("b"), "phase": phase, "error": error, "peers": 2,
        "confirmed": confirmed, "done": done})
}

fn lines(replies: &[Value]) -> String {
    replies.iter().map(|reply| format!("{reply}\n")).collect()
}

#[test]
fn a_new_identity_key_is_followed_until_peers_know_it() {
    let replies = [step("asking", None, 0, false), step("publishing", None, 0, false), step("settled", None, 2, true)];
    let desk = Desk::new().node(lines(&replies));
    let ran = desk.run("keys rotate --identity").ok();
    assert_eq!(
        ran.out,
        "identity key bbbbbbbb is in use, aaaaaaaa is wiped; 2 of 2 connected peers know this node by it\n"
    );
    assert!(ran.err.contains("0/2 granted, in use") && ran.err.contains("2/2 peers know the new key"), "{}", ran.err);
    assert_eq!(desk.asked(), [json!({"request": "rotate-identity"})]);
    let shown = desk.run("keys rotate --identity --json").ok().json();
    let expected = json!({"scope": "identity", "from": id("a"), "to": id("b"), "phase": "settled", "error": null,
        "peers": 2, "confirmed": 2, "done": true});
    assert_eq!(shown, expected);
}

#[test]
fn an_issuer_elsewhere_is_waited_for_only_if_asked() {
    let replies = lines(&[step("asking", None, 0, false), step("waiting", None, 0, false)]);
    let ran = Desk::new().node(replies.clone()).run("keys rotate --identity").ok();
    assert!(ran.out.contains("waits for its grant") && ran.out.contains("aaaaaaaa stays in use"), "{}", ran.out);
    let ran = Desk::new().node(replies).run("keys rotate --identity --wait 1s");
    assert!(ran.code == 1 && !ran.err.is_empty(), "{ran:?}");
}

#[test]
fn a_refusal_is_shown_and_no_success() {
    let replies = lines(&[step("refused", Some("disk full"), 0, false)]);
    let ran = Desk::new().node(replies).run("keys rotate --identity --wait 1s");
    assert_eq!(ran.code, 1, "{ran:?}");
    let error = json!({"reply": "error", "code": "not-ready", "message": "no keyserver has taken it"});
    let ran = Desk::new().node(lines(&[error])).run("keys rotate --identity");
    assert!(ran.code == 1 && ran.err.contains("no keyserver has taken it"), "{ran:?}");
}

#[test]
fn it_is_about_this_node_and_its_identity_alone() {
    for words in ["--node n1", "--cluster east", "--all", "--force", "--at 2h", "--every 7d", "--wave 5%", "--dry-run"]
    {
        assert_eq!(Desk::new().run(&format!("keys rotate --identity {words}")).code, 2, "{words}");
    }
}
