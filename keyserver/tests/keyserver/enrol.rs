//! Who gets in, and with which addresses.

use mesh_protocol::control::{ALPN_JOIN, JoinReply, JoinRequest, RefusalCode};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::key::SigningKey;
use mesh_protocol::token::{JoinClaim, JoinToken, TokenLimits};

use crate::client::{Node, Stream, Transport, connect, random, shown};
use crate::server::Server;

#[tokio::test]
async fn a_node_joins_by_either_transport() {
    let server = Server::start();
    let token = server.token(2);
    let (mut one, mut two) = (Node::new("n1"), Node::new("n2"));
    let first = one.join_by(server.address, &token, &[], Transport::Quic).await.unwrap();
    let second = two.join_by(server.address, &token, &[], Transport::Tls).await.unwrap();
    assert!(second.position.revision > first.position.revision);
    let texts = |node: &Node| node.grant().pod_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(texts(&one)[0], "10.1.0.0/24");
    assert_eq!(texts(&two)[0], "10.1.1.0/24");
    assert_eq!(texts(&one).len(), 2, "IPv6 too: {:?}", texts(&one));
    assert_eq!(one.grant().mesh_v4.to_string(), "100.96.0.1");
    assert_eq!(two.grant().mesh_v4.to_string(), "100.96.0.2");
    assert!(two.grant().serial > one.grant().serial);
    assert_eq!(server.nodes().len(), 2);
}

#[tokio::test]
async fn a_used_up_token_is_refused_and_the_same_node_may_ask_again() {
    let server = Server::start();
    let token = server.token(1);
    let (mut one, mut two) = (Node::new("n1"), Node::new("n2"));
    one.join(server.address, &token).await.unwrap();
    let (generation, cidrs) = (one.grant().generation, one.grant().pod_cidrs.clone());
    let refused = two.join(server.address, &token).await.unwrap_err();
    assert_eq!(refused.code, RefusalCode::Token);
    assert!(refused.message.contains("used up"), "{refused}");
    one.join(server.address, &token).await.unwrap();
    assert_eq!(one.grant().generation, generation, "the same answer");
    assert_eq!(one.grant().pod_cidrs, cidrs, "it keeps its addresses");
    assert_eq!(server.tokens()[0].used, 1);
}

#[tokio::test]
async fn fifty_joins_at_once_on_three_uses_give_three() {
    let server = Server::start();
    let token = server.token(3);
    let address = server.address;
    let mut joins = tokio::task::JoinSet::new();
    for number in 0..50 {
        let token = token.clone();
        joins.spawn(async move { Node::new(&format!("n{number}")).join(address, &token).await });
    }
    let results = joins.join_all().await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 3);
    assert!(
        results.iter().filter_map(|result| result.as_ref().err()).all(|refusal| refusal.code == RefusalCode::Token)
    );
    assert_eq!(server.tokens()[0].used, 3);
    assert_eq!(server.nodes().len(), 3);
}

#[tokio::test]
async fn expired_and_voided_tokens_are_refused() {
    let server = Server::start();
    let (short, _) = server.token_with("east", 1, 1, &[]).unwrap();
    let begun = std::time::Instant::now();
    let refused = loop {
        // Until it expires, the request is spoilt by its CIDR.
        let refused =
            Node::new("n1").join_by(server.address, &short, &["10.9.0.0/24"], Transport::Tls).await.unwrap_err();
        if refused.code == RefusalCode::Token || begun.elapsed() > crate::server::DEADLINE {
            break refused;
        }
    };
    assert!(refused.message.contains("expired"), "{refused}");
    let (token, status) = server.token_with("east", 1, 60, &[]).unwrap();
    let start = status.id.to_string()[..8].to_owned();
    server.ask(&mesh_protocol::admin::AdminRequest::TokenRevoke { token: start }).unwrap();
    let refused = Node::new("n1").join(server.address, &token).await.unwrap_err();
    assert!(refused.message.contains("revoked"), "{refused}");
}

async fn ask(stream: &mut Stream, claim: JoinClaim, signature: [u8; 64]) -> Result<Envelope, RefusalCode> {
    stream.send(&JoinRequest::Enrol { claim, signature }).await;
    match stream.next().await.unwrap() {
        JoinReply::Granted { grant, .. } => Ok(grant),
        JoinReply::Refused { refusal } => Err(refusal.code),
        other => panic!("{other:?}"),
    }
}

async fn joining(server: &Server, node: &Node, token: &JoinToken) -> Stream {
    let mut stream = connect(&node.key, ALPN_JOIN, server.address, Transport::Quic).await.unwrap();
    shown(&mut stream, token).await.unwrap();
    stream
}

#[tokio::test]
async fn tampered_tokens_and_claims_are_refused() {
    let server = Server::start();
    let token = server.token(5);
    let node = Node::new("n1");

    let forged = JoinToken { secret: SigningKey::from_seed(random()), ..token.clone() };
    let mut stream = joining(&server, &node, &token).await;
    let claim = node.claim(&token, &[]);
    let signature = claim.sign(&forged.secret, &stream.exporter);
    assert_eq!(ask(&mut stream, claim, signature).await, Err(RefusalCode::Token), "signed with another seed");

    let mut stream = joining(&server, &node, &token).await;
    let claim = node.claim(&token, &[]);
    let signature = claim.sign(&token.secret, &stream.exporter);
    let other = JoinClaim { name: "n2".parse().unwrap(), ..claim };
    assert_eq!(ask(&mut stream, other, signature).await, Err(RefusalCode::Token), "changed after it was signed");

    let limits = TokenLimits { uses: 9999, ..token.limits.unverified().unwrap() };
    let own = JoinToken { limits: Envelope::seal(token.mesh, &limits, &[&node.key]), ..forged };
    let mut stream = connect(&node.key, ALPN_JOIN, server.address, Transport::Quic).await.unwrap();
    let refused = shown(&mut stream, &own).await.map(drop).unwrap_err();
    assert_eq!(refused.code, RefusalCode::Token, "a token of its own making");
    let mut stream = joining(&server, &node, &token).await;
    let claim = JoinClaim { token: own.id(), ..node.claim(&token, &[]) };
    let signature = claim.sign(&own.secret, &stream.exporter);
    assert_eq!(ask(&mut stream, claim, signature).await, Err(RefusalCode::BadMessage), "another than was shown");

    let mut stream = joining(&server, &node, &token).await;
    let claim = JoinClaim { mesh: mesh_protocol::id::MeshId([7; 32]), ..node.claim(&token, &[]) };
    let signature = claim.sign(&token.secret, &stream.exporter);
    assert_eq!(ask(&mut stream, claim, signature).await, Err(RefusalCode::Token), "another mesh");
    assert_eq!(server.tokens()[0].used, 0);
}

#[tokio::test]
async fn a_request_replayed_by_another_identity_or_connection_is_refused() {
    let server = Server::start();
    let token = server.token(5);
    let (victim, thief) = (Node::new("n1"), Node::new("n1"));
    let first = joining(&server, &victim, &token).await;
    let claim = victim.claim(&token, &[]);
    let signature = claim.sign(&token.secret, &first.exporter);
    let mut other = joining(&server, &thief, &token).await;
    assert_eq!(ask(&mut other, claim.clone(), signature).await, Err(RefusalCode::Token), "another identity");
    let mut again = joining(&server, &victim, &token).await;
    assert_eq!(ask(&mut again, claim, signature).await, Err(RefusalCode::Token), "another connection");
}

#[tokio::test]
async fn a_token_leads_into_its_cluster_and_its_cidrs_only() {
    let server = Server::start();
    server.add_cluster("west", &["10.2.0.0/16"]).unwrap();
    let (east, _) = server.token_with("east", 5, 60, &["10.1.128.0/17"]).unwrap();
    let ask = |cidr: &'static str| {
        let (address, token) = (server.address, east.clone());
        async move { Node::new("n1").join_by(address, &token, &[cidr], Transport::Tls).await }
    };
    assert_eq!(ask("10.2.0.0/24").await.unwrap_err().code, RefusalCode::OutOfScope, "a CIDR of the other cluster");
    assert_eq!(ask("10.1.0.0/24").await.unwrap_err().code, RefusalCode::OutOfScope, "outside of the token's");
    assert_eq!(ask("0.0.0.0/0").await.unwrap_err().code, RefusalCode::OutOfScope);
    let mut node = Node::new("n1");
    node.join_by(server.address, &east, &["10.1.200.0/24"], Transport::Tls).await.unwrap();
    assert_eq!(node.grant().cluster.as_str(), "east");
    let mut picked = Node::new("n2");
    picked.join(server.address, &east).await.unwrap();
    assert_eq!(picked.grant().pod_cidrs[0].to_string(), "10.1.128.0/24", "the next free one inside the token's");
}

#[tokio::test]
async fn two_nodes_cannot_hold_one_cidr_or_name() {
    let server = Server::start();
    let token = server.token(5);
    let mut first = Node::new("first");
    first.join_by(server.address, &token, &["10.1.7.0/24"], Transport::Tls).await.unwrap();
    for cidr in ["10.1.7.0/24", "10.1.7.128/25", "10.1.0.0/20"] {
        let refused = Node::new("second").join_by(server.address, &token, &[cidr], Transport::Quic).await.unwrap_err();
        assert_eq!(refused.code, RefusalCode::Taken);
        assert!(refused.message.contains("node first"), "{refused}");
    }
    let refused = Node::new("first").join(server.address, &token).await.unwrap_err();
    assert_eq!(refused.code, RefusalCode::Taken);
    assert!(refused.message.contains(&first.id().short()), "{refused}");
    assert_eq!(server.tokens()[0].used, 1, "a refused request costs no use");
}

#[tokio::test]
async fn an_exhausted_pool_is_named() {
    let server = Server::start();
    let (token, _) = server.token_with("east", 5, 60, &["10.1.4.0/24"]).unwrap();
    Node::new("n1").join(server.address, &token).await.unwrap();
    let refused = Node::new("n2").join(server.address, &token).await.unwrap_err();
    assert_eq!(refused.code, RefusalCode::Exhausted);
    assert!(refused.message.contains("10.1.0.0/16"), "{refused}");
}

#[tokio::test]
async fn a_prober_hears_nothing_of_the_mesh_and_is_slowed_down() {
    let server = Server::start();
    let token = server.token(5);
    for transport in [Transport::Quic, Transport::Tls] {
        // Any Ed25519 key gets a connection; what it says first decides.
        let node = Node::new("prober");
        let mut stream = connect(&node.key, ALPN_JOIN, server.address, transport).await.unwrap();
        let claim = node.claim(&token, &[]);
        let signature = claim.sign(&token.secret, &stream.exporter);
        stream.send(&JoinRequest::Enrol { claim, signature }).await;
        assert_eq!(refused_first(&mut stream).await.code, RefusalCode::BadMessage);
    }
    let known = show(&server, token.id(), [7; 64], None).await;
    let unknown = show(&server, mesh_protocol::id::TokenId(random()), [7; 64], None).await;
    assert_eq!(known, unknown, "a token that exists looks like one that does not");
    assert_eq!(known.code, RefusalCode::Token);
    let others =
        TokenLimits { key: SigningKey::from_seed(random()).verify_key(), ..token.limits.unverified().unwrap() };
    let others = Envelope::seal(token.mesh, &others, &[&SigningKey::from_seed(random())]);
    let mut last = show(&server, token.id(), [7; 64], Some(others)).await;
    for _ in 0..40 {
        if last.code == RefusalCode::Busy {
            break;
        }
        last = show(&server, mesh_protocol::id::TokenId(random()), [7; 64], None).await;
    }
    assert_eq!(last.code, RefusalCode::Busy, "{last}");
    let text = format!("{known} {last}");
    assert!(!text.contains("east") && !text.contains(&token.mesh.to_string()), "{text}");
    assert_eq!(server.tokens()[0].used, 0);
}

async fn show(
    server: &Server,
    token: mesh_protocol::id::TokenId,
    signature: [u8; 64],
    limits: Option<Envelope>,
) -> mesh_protocol::control::Refusal {
    let node = Node::new("prober");
    let mut stream = connect(&node.key, ALPN_JOIN, server.address, Transport::Tls).await.unwrap();
    stream.send(&JoinRequest::Show { token, signature, limits }).await;
    refused_first(&mut stream).await
}

async fn refused_first(stream: &mut Stream) -> mesh_protocol::control::Refusal {
    match stream.next().await.unwrap() {
        JoinReply::Refused { refusal } => refusal,
        other => panic!("{other:?}"),
    }
}
