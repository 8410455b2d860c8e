//! What members say and hear.

use mesh_protocol::control::{ALPN_NODE, NodeMessage, RefusalCode, ServerMessage};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::Position;
use mesh_protocol::record::{NodeGrant, NodeRecord};

use crate::client::{Node, Session, Transport, connect};
use crate::server::Server;

/// A keyserver and members of its mesh.
async fn mesh(names: &[&str]) -> (Server, Vec<Node>) {
    let server = Server::start();
    let token = server.token(u32::try_from(names.len()).unwrap());
    let mut nodes = Vec::new();
    for name in names {
        let mut node = Node::new(name);
        node.join(server.address, &token).await.unwrap();
        nodes.push(node);
    }
    (server, nodes)
}

async fn open(server: &Server, node: &Node) -> Session {
    node.open(server.address, None, Transport::Quic).await.expect("a member gets a session")
}

#[tokio::test]
async fn members_hear_of_each_other_over_both_transports() {
    let (server, mut nodes) = mesh(&["n1", "n2"]).await;
    let mut by_quic = nodes[0].open(server.address, None, Transport::Quic).await.unwrap();
    let mut by_tls = nodes[1].open(server.address, None, Transport::Tls).await.unwrap();
    let record = nodes[0].record();
    let record = nodes[0].seal(&record);
    by_quic.publish(&record).await.unwrap();
    by_tls.until("the record", |session| session.has(&record)).await;
    by_quic.until("its own record", |session| session.has(&record)).await;
    let moved = nodes[1].endpoints(1, "192.0.2.1:7100");
    by_tls.publish(&moved).await.unwrap();
    by_quic.until("endpoints", |session| session.live.contains(&moved)).await;
    let names: Vec<String> = by_tls
        .seen
        .iter()
        .filter_map(|item| item.unverified::<NodeGrant>().ok())
        .map(|grant| grant.name.to_string())
        .collect();
    assert!(names.contains(&"n1".to_owned()) && names.contains(&"n2".to_owned()), "{names:?}");
    assert_eq!(server.status().connected, 2);
    let mut late = open(&server, &nodes[1]).await;
    late.until("endpoints of those that came before", |session| session.live.contains(&moved)).await;
}

#[tokio::test]
async fn strangers_get_no_session_and_no_reason() {
    let (server, nodes) = mesh(&["n1"]).await;
    let stranger = Node::new("n1");
    for transport in [Transport::Quic, Transport::Tls] {
        let mut stream = connect(&stranger.key, ALPN_NODE, server.address, transport).await.unwrap();
        let mesh = nodes[0].mesh();
        stream
            .send(&NodeMessage::Hello { mesh, position: None, policy_version: 1, version: String::new(), grant: None })
            .await;
        assert!(stream.next::<ServerMessage>().await.is_none(), "the stream just ends");
    }
}

#[tokio::test]
async fn bad_records_are_refused_and_the_old_one_stays() {
    let (server, mut nodes) = mesh(&["n1", "n2"]).await;
    let mut session = open(&server, &nodes[0]).await;
    let code = |result: Result<(), mesh_protocol::control::Refusal>| result.unwrap_err().code;
    nodes[0].seq = 4;
    let good = nodes[0].record();
    let envelope = nodes[0].seal(&good);
    session.publish(&envelope).await.unwrap();
    session.publish(&envelope).await.unwrap();

    let higher = NodeRecord { seq: 9, ..good.clone() };
    let by_other = Envelope::seal(nodes[0].mesh(), &higher, &[&nodes[1].key]);
    assert_eq!(code(session.publish(&by_other).await), RefusalCode::Record, "signed by another key");
    let old = nodes[0].seal(&NodeRecord { seq: 3, ..good.clone() });
    assert_eq!(code(session.publish(&old).await), RefusalCode::Record, "an old seq");
    let far = nodes[0].seal(&NodeRecord { seq: 5 + (1 << 63), ..good.clone() });
    assert_eq!(code(session.publish(&far).await), RefusalCode::Record, "a seq out of range");
    assert!(server.status().alarms.is_empty());
    let twin = nodes[0].seal(&NodeRecord { lanes: 2, ..good.clone() });
    assert_eq!(code(session.publish(&twin).await), RefusalCode::Record, "same seq, other bytes");
    assert_eq!(server.status().alarms.len(), 1, "two truths are an alarm");
    let foreign = nodes[1].record();
    let foreign = nodes[1].seal(&foreign);
    assert_eq!(code(session.publish(&foreign).await), RefusalCode::Record, "somebody else's record");
    let grant = nodes[0].grant.as_ref().unwrap().1.clone();
    assert_eq!(code(session.publish(&grant).await), RefusalCode::BadMessage, "not a node's to publish");

    let other = open(&server, &nodes[0]).await;
    assert_eq!(other.own_record.as_ref(), Some(&envelope), "the first record stands");
}

#[tokio::test]
async fn one_node_cannot_show_the_key_of_another() {
    let (server, mut nodes) = mesh(&["n1", "n2"]).await;
    let mut first = open(&server, &nodes[0]).await;
    let record = nodes[0].record();
    let envelope = nodes[0].seal(&record);
    first.publish(&envelope).await.unwrap();
    let mut second = open(&server, &nodes[1]).await;
    let thief = NodeRecord { current: record.spare, ..nodes[1].record() };
    let thief = NodeRecord { spare: mesh_protocol::record::EpochKey { epoch: 3, ..thief.spare }, ..thief };
    let refused = second.publish(&nodes[1].seal(&thief)).await.unwrap_err();
    assert_eq!(refused.code, RefusalCode::Record);
}

#[tokio::test]
async fn a_flood_of_records_is_slowed_and_others_are_served() {
    let (server, mut nodes) = mesh(&["n1", "n2"]).await;
    let mut flood = open(&server, &nodes[0]).await;
    let mut refused = 0;
    for _ in 0..60 {
        let record = nodes[0].record();
        let envelope = nodes[0].seal(&record);
        if let Err(refusal) = flood.publish(&envelope).await {
            assert_eq!(refusal.code, RefusalCode::Busy);
            refused += 1;
        }
    }
    assert!(refused > 20, "only {refused} were refused");
    let mut other = open(&server, &nodes[1]).await;
    let record = nodes[1].record();
    other.publish(&nodes[1].seal(&record)).await.unwrap();
}

#[tokio::test]
async fn a_node_resumes_where_it_stands() {
    let (mut server, mut nodes) = mesh(&["n1", "n2"]).await;
    let mut session = open(&server, &nodes[0]).await;
    session.until("a full map", |session| session.position.is_some()).await;
    let position = session.position.unwrap();
    drop(session);
    let mut other = open(&server, &nodes[1]).await;
    let record = nodes[1].record();
    let record = nodes[1].seal(&record);
    other.publish(&record).await.unwrap();
    let mut resumed = nodes[0].open(server.address, Some(position), Transport::Tls).await.unwrap();
    resumed.until("what was missed", |session| session.has(&record)).await;
    assert_eq!(resumed.seen, std::slice::from_ref(&record), "and nothing else");

    server.kill();
    server.run();
    let mut again = nodes[0].open(server.address, Some(position), Transport::Tls).await.unwrap();
    again.until("what was missed", |session| session.has(&record)).await;
    assert_eq!(again.seen, std::slice::from_ref(&record), "a restart changes nothing");
    let elsewhere = Position { epoch: position.epoch ^ 1, ..position };
    let mut full = nodes[0].open(server.address, Some(elsewhere), Transport::Tls).await.unwrap();
    full.until("a full map", |session| session.has(&record) && session.position != Some(elsewhere)).await;
    assert!(full.seen.len() >= 4, "policies, grants and the record");
}

#[tokio::test]
async fn the_newest_session_of_an_identity_wins() {
    let (server, nodes) = mesh(&["n1"]).await;
    let mut first = open(&server, &nodes[0]).await;
    let _second = open(&server, &nodes[0]).await;
    first.until_end().await;
    let told = |message: &ServerMessage| *message == ServerMessage::Replaced { node: nodes[0].id() };
    assert!(first.other.iter().any(told), "{:?}", first.other);
    assert_eq!(server.status().connected, 1);
}

#[tokio::test]
async fn a_new_cluster_reaches_everybody() {
    let (server, nodes) = mesh(&["n1"]).await;
    let mut session = open(&server, &nodes[0]).await;
    session.until("a full map", |session| session.position.is_some()).await;
    let before = session.seen.len();
    server.add_cluster("west", &["10.2.0.0/16"]).unwrap();
    session.until("the policy", |session| session.seen.len() > before).await;
    let policy: mesh_protocol::record::TrustPolicy = session.seen[before].unverified().unwrap();
    assert_eq!((policy.version, policy.clusters().count()), (3, 2));
}
