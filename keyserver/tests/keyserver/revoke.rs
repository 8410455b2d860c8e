//! Cutting nodes off, and rotating keys on an operator's word.

use mesh_protocol::admin::{AdminErrorCode, AdminReply, AdminRequest};
use mesh_protocol::control::{NodeMessage, RefusalCode, ServerMessage};
use mesh_protocol::envelope::Kind;
use mesh_protocol::record::Revocation;

use crate::client::{Node, Session, Transport};
use crate::server::Server;

fn revoke(node: &str, wait: u64) -> AdminRequest {
    AdminRequest::NodeRevoke { node: node.into(), reason: "stolen".into(), void_tokens: true, wait, signed: None }
}

async fn members(server: &Server, names: &[&str]) -> Vec<Node> {
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
async fn rotation_asks_and_shows_who_did() {
    let server = std::sync::Arc::new(Server::start());
    let mut nodes = members(&server, &["n1", "n2", "away"]).await;
    let mut good = nodes[0].open(server.address, None, Transport::Quic).await.unwrap();
    let mut stubborn = nodes[1].open(server.address, None, Transport::Tls).await.unwrap();
    let record = nodes[0].record();
    good.publish(&nodes[0].seal(&record)).await.unwrap();

    let asking = server.clone();
    let asked = tokio::task::spawn_blocking(move || {
        asking.ask_all(&AdminRequest::Rotate { nodes: Vec::new(), force: false, wait: 10_000 })
    });
    let request = |session: &Session| {
        session.other.iter().find_map(|message| match message {
            ServerMessage::Rotate { request, .. } => Some(*request),
            _ => None,
        })
    };
    good.until("the request", |session| request(session).is_some()).await;
    stubborn.until("the request", |session| request(session).is_some()).await;
    let number = request(&stubborn).unwrap();
    let refusal = NodeMessage::Rotated { request: number, epoch: None, error: Some("not now".into()) };
    stubborn.stream.send(&refusal).await;
    let promoted = nodes[0].record_at(2, 2);
    let promoted = nodes[0].seal(&promoted);
    good.publish(&promoted).await.unwrap();
    good.stream.send(&NodeMessage::Rotated { request: number, epoch: Some(2), error: None }).await;
    for session in [&mut good, &mut stubborn] {
        session.until("the new record", |session| session.has(&promoted)).await;
        session.applied().await;
    }
    let replies = asked.await.unwrap();
    let Some(AdminReply::Rotation { total, promoted, confirmed, failed, offline, done, .. }) = replies.last() else {
        panic!("{replies:?}")
    };
    let names = |names: &[mesh_protocol::id::Name]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!((*total, *done), (3, true), "{replies:?}");
    assert_eq!(
        (names(promoted), names(confirmed), names(offline)),
        (vec!["n1".into()], vec!["n1".into()], vec!["away".into()])
    );
    assert_eq!((failed[0].node.as_str(), failed[0].error.as_str()), ("n2", "not now"));
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
