//! Cutting nodes off, and letting them back in.

use mesh_protocol::admin::{AdminErrorCode, AdminReply, AdminRequest};
use mesh_protocol::control::RefusalCode;
use mesh_protocol::envelope::Kind;
use mesh_protocol::record::Revocation;

use crate::client::{Node, Session, Transport};
use crate::server::Server;

fn revoke(node: &str, wait: u64) -> AdminRequest {
    AdminRequest::NodeRevoke { node: node.into(), reason: "stolen".into(), void_tokens: true, wait, signed: None }
}

pub async fn members(server: &Server, names: &[&str]) -> Vec<Node> {
    let token = server.token(10);
    let mut nodes = Vec::new();
    for name in names {
        let mut node = Node::new(name);
        node.join(server.address, &token).await.unwrap();
        nodes.push(node);
    }
    nodes
}

async fn hears_of_it(mut session: Session) {
    let revocation = |session: &Session| session.seen.iter().any(|item| item.kind() == Kind::Revocation);
    session.until("the revocation", revocation).await;
    let item = session.seen.iter().find(|item| item.kind() == Kind::Revocation).unwrap();
    assert_eq!(item.unverified::<Revocation>().unwrap().reason, "stolen");
    session.applied().await;
    session.until_end().await;
}

#[tokio::test]
async fn a_revocation_reaches_every_session_and_is_confirmed() {
    let server = Server::start();
    let mut nodes = members(&server, &["bad", "n1", "n2", "away"]).await;
    let mut bad = nodes[0].open(server.address, None, Transport::Quic).await.unwrap();
    let first = nodes[1].open(server.address, None, Transport::Quic).await.unwrap();
    let second = nodes[2].open(server.address, None, Transport::Tls).await.unwrap();
    let hearing = [tokio::spawn(hears_of_it(first)), tokio::spawn(hears_of_it(second))];
    let server = std::sync::Arc::new(server);
    let asking = server.clone();
    let replies = tokio::task::spawn_blocking(move || asking.ask_all(&revoke("bad", 10_000))).await.unwrap();
    let Some(AdminReply::Revocation { node, online, confirmed, waiting, offline, millis, done }) = replies.last()
    else {
        panic!("{replies:?}")
    };
    assert_eq!((node.as_str(), *online, *confirmed, *done), ("bad", 2, 2, true));
    assert!(waiting.is_empty() && *millis < 1_000, "{waiting:?} after {millis} ms");
    assert_eq!(offline.iter().map(|name| name.as_str()).collect::<Vec<_>>(), ["away"]);

    bad.until_end().await;
    let asking = server.clone();
    let listed = tokio::task::spawn_blocking(move || asking.nodes()).await.unwrap();
    let listed: Vec<(&str, bool)> = listed.iter().map(|node| (node.name.as_str(), node.revoked)).collect();
    assert_eq!(listed, [("away", false), ("n1", false), ("n2", false), ("bad", true)]);
    assert!(nodes[0].open(server.address, None, Transport::Tls).await.is_none(), "no session any more");
    let asking = server.clone();
    let voided = tokio::task::spawn_blocking(move || asking.tokens()).await.unwrap();
    assert!(voided.iter().all(|token| token.revoked), "open tokens of its cluster are void");
    let token = server.token(1);
    let refused = nodes[0].join(server.address, &token).await.unwrap_err();
    assert_eq!(refused.code, RefusalCode::Revoked, "enrolment is refused too");
    assert_eq!(server.ask(&revoke("bad", 0)).unwrap_err().code, AdminErrorCode::NotFound);
    hearing.iter().for_each(tokio::task::JoinHandle::abort);
}

/// Revokes once for each of `rounds`, with `fleet` sessions that confirm as nodes do, and gives the milliseconds until each
/// session had confirmed, sorted.
async fn revocations_with(fleet: usize, rounds: usize) -> Vec<u64> {
    let server = std::sync::Arc::new(Server::start());
    let names: Vec<String> = (0..rounds).map(|round| format!("bad{round}")).collect();
    members(&server, &names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    // More than one pool of 256 nodes.
    server.add_cluster("wide", &["10.16.0.0/12"]).unwrap();
    let (token, _) = server.token_with("wide", u32::try_from(fleet).unwrap(), 3600, &[]).unwrap();
    let heard = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let ready = std::sync::Arc::new(tokio::sync::Semaphore::new(0));
    let mut sessions = Vec::new();
    for at in 0..fleet {
        let mut node = Node::new(&format!("n{at}"));
        // Each from an address of its own: one alone may not open so many.
        let source = [127, 1, (at / 250) as u8, (at % 250 + 1) as u8].into();
        node.join_from(server.address, &token, source).await.unwrap();
        let session = node.open_from(server.address, source).await.unwrap();
        sessions.push(tokio::spawn(confirms(session, std::sync::Arc::clone(&heard), std::sync::Arc::clone(&ready))));
    }
    let _all = ready.acquire_many(u32::try_from(fleet).unwrap()).await.unwrap();
    let mut took = Vec::new();
    for name in names {
        heard.lock().unwrap().clear();
        let (asking, began) = (server.clone(), std::time::Instant::now());
        let asked = tokio::task::spawn_blocking(move || asking.ask_all(&revoke(&name, 30_000)));
        let replies = asked.await.unwrap();
        let Some(AdminReply::Revocation { online, confirmed, done, .. }) = replies.last() else {
            panic!("{replies:?}")
        };
        assert_eq!((*online as usize, *confirmed as usize, *done), (fleet, fleet, true));
        let millis = |at: &std::time::Instant| u64::try_from(at.duration_since(began).as_millis()).unwrap();
        took.extend(heard.lock().unwrap().iter().map(millis));
    }
    sessions.iter().for_each(tokio::task::JoinHandle::abort);
    took.sort_unstable();
    took
}

/// Confirms each change that comes, and notes when a revocation did.
async fn confirms(
    mut session: Session,
    heard: std::sync::Arc<std::sync::Mutex<Vec<std::time::Instant>>>,
    ready: std::sync::Arc<tokio::sync::Semaphore>,
) {
    let (mut seen, mut at) = (0, None);
    session.until("a map", |session| session.position.is_some()).await;
    ready.add_permits(1);
    loop {
        session.until("a change", |session| session.position != at || session.seen.len() > seen).await;
        if session.seen[seen..].iter().any(|item| item.kind() == Kind::Revocation) {
            heard.lock().unwrap().push(std::time::Instant::now());
        }
        (seen, at) = (session.seen.len(), session.position);
        session.applied().await;
    }
}

fn p99(took: &[u64]) -> u64 {
    took[(took.len() * 99).div_ceil(100) - 1]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_is_confirmed_by_a_small_fleet_within_a_second() {
    let took = revocations_with(40, 3).await;
    assert_eq!(took.len(), 120);
    assert!(p99(&took) < 1_000, "p99 {} ms of {took:?}", p99(&took));
}

/// `make scale`: prints the figures.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a thousand sessions: make scale"]
async fn a_revocation_is_confirmed_by_a_thousand_sessions_within_a_second() {
    let took = revocations_with(1_000, 5).await;
    let median = took[took.len() / 2];
    println!("revocation, 1,000 sessions: p50 {median} ms, p99 {} ms, last {} ms", p99(&took), took[took.len() - 1]);
    assert!(p99(&took) < 1_000, "p99 {} ms", p99(&took));
}

#[tokio::test]
async fn a_silent_node_is_waited_for_and_named() {
    let server = Server::start();
    let nodes = members(&server, &["bad", "deaf"]).await;
    let _deaf = nodes[1].open(server.address, None, Transport::Quic).await.unwrap();
    let replies = server.ask_all(&revoke("bad", 200));
    let Some(AdminReply::Revocation { waiting, done, millis, .. }) = replies.last() else { panic!("{replies:?}") };
    assert!(*done && *millis >= 200);
    assert_eq!(waiting.iter().map(|name| name.as_str()).collect::<Vec<_>>(), ["deaf"]);
}

#[tokio::test]
async fn a_revoked_node_is_let_back_in_by_a_grant_that_lifts_it_and_the_log_tells() {
    let server = std::sync::Arc::new(Server::start());
    let nodes = members(&server, &["back", "other"]).await;
    let mut other = nodes[1].open(server.address, None, Transport::Quic).await.unwrap();
    let asking = server.clone();
    let lines = tokio::task::spawn_blocking(move || {
        let restore = |node: &str| AdminRequest::NodeRestore { node: node.into() };
        assert_eq!(asking.ask(&restore("back")).unwrap_err().code, AdminErrorCode::NotFound, "it is not revoked");
        asking.ask_all(&revoke("back", 0));
        let Ok(AdminReply::Nodes { nodes }) = asking.ask(&restore("back")) else { panic!("not restored") };
        assert_eq!((nodes[0].name.as_str(), nodes[0].generation, nodes[0].revoked), ("back", 2, false));
        let replies = asking.ask_all(&AdminRequest::AuditExport { from: 1 });
        let mut verifier = mesh_protocol::audit::Verifier::new(1);
        let mut entries = Vec::new();
        for reply in &replies {
            let AdminReply::Audit { lines, head, done } = reply else { panic!("{reply:?}") };
            for line in lines {
                verifier.line(line).unwrap();
                entries.push(serde_json::from_str::<mesh_protocol::audit::AuditEntry>(line).unwrap());
            }
            if *done {
                let end = mesh_protocol::audit::AuditEnd { head: head.clone() };
                verifier.line(&serde_json::to_string(&end).unwrap()).unwrap();
            }
        }
        verifier.finish().unwrap();
        entries
    });
    let entries = lines.await.unwrap();
    let told: Vec<(&str, &str)> = entries.iter().map(|e| (e.action.as_str(), e.subject.as_str())).collect();
    let joins = told.iter().filter(|(action, _)| *action == "join").count();
    assert_eq!(joins, 2, "{told:?}");
    assert!(told.contains(&("revoke", "node back")) && told.contains(&("restore", "node back")), "{told:?}");
    let revoked = entries.iter().find(|entry| entry.action == "revoke").unwrap();
    assert!(revoked.actor.starts_with("uid ") && revoked.detail.ends_with("stolen"), "{revoked:?}");
    let joined = entries.iter().find(|entry| entry.action == "join").unwrap();
    assert!(joined.actor.starts_with("token "), "{joined:?}");
    // It has a session again, and others are given the new grant beside the revocation.
    assert!(nodes[0].open(server.address, None, Transport::Tls).await.is_some(), "no session");
    other
        .until("the new grant", |session| {
            let grants =
                session.seen.iter().filter_map(|item| item.unverified::<mesh_protocol::record::NodeGrant>().ok());
            grants.into_iter().any(|grant| grant.lifts.is_some() && grant.generation == 2)
        })
        .await;
}
