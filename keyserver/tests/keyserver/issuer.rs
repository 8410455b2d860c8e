//! Another key for the issuer, killed at random moments: every member is granted anew by it in the end, whatever happened.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use mesh_protocol::admin::{AdminReply, AdminRequest, IssuerProgress};
use mesh_protocol::key::SigningKey;
use mesh_protocol::line;

use crate::client::{Node, Transport};
use crate::revoke::members;
use crate::server::{DEADLINE, Server};

fn key(server: &Server) -> SigningKey {
    let text = std::fs::read_to_string(server.dir().join("keys/issuer")).unwrap();
    let mut seed = [0; 32];
    hex::decode_to_slice(text.trim_end(), &mut seed).unwrap();
    SigningKey::from_seed(seed)
}

fn ask(server: &Server, request: &AdminRequest) -> IssuerProgress {
    match server.ask(request) {
        Ok(AdminReply::Issuer(told)) => told,
        other => panic!("{other:?}"),
    }
}

/// Asks and does not wait for an answer: it may never come.
fn ask_and_go(server: &Server, request: &AdminRequest) {
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    stream.write_all(&line::encode(request).unwrap()).unwrap();
}

#[tokio::test]
async fn kill_9_in_a_loop_while_the_issuers_key_is_replaced_leaves_every_node_with_one_grant_of_it() {
    let mut server = Server::start();
    let names: Vec<String> = (0..8).map(|number| format!("n{number}")).collect();
    let nodes: Vec<Node> = members(&server, &names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut held = key(&server).verify_key();
    for round in 0..10_u64 {
        let stolen = round % 3 == 2;
        let request = AdminRequest::IssuerRotate { stolen, wait: 0 };
        ask_and_go(&server, &request);
        // From before the first write to after the last grant.
        std::thread::sleep(Duration::from_millis(round * 4));
        server.kill();
        server.run();
        let told = ask(&server, &request);
        assert_eq!(told.former.len(), 1, "{told:?}");
        let begun = std::time::Instant::now();
        while !server.status().issuers[0].ungranted.is_empty() {
            assert!(begun.elapsed() < DEADLINE, "{:?}", server.status().issuers);
            std::thread::sleep(Duration::from_millis(10));
        }
        let next = key(&server).verify_key();
        assert!(next != held && told.issuer == next && !server.dir().join("keys/issuer.next").exists());
        assert!(server.status().alarms.is_empty(), "{:?}", server.status().alarms);
        held = next;
        // Nobody is connected: all are away.
        server.ask(&AdminRequest::IssuerFinish { leave_absent: false, wait: 0 }).unwrap_err();
        let done = ask(&server, &AdminRequest::IssuerFinish { leave_absent: true, wait: 0 });
        assert!(done.former.is_empty() && done.done && done.absent.len() == nodes.len(), "{done:?}");
    }
    let listed = server.nodes();
    assert_eq!(listed.len(), nodes.len());
    for node in &nodes {
        let status = listed.iter().find(|status| status.node == node.id()).unwrap();
        let grant = node.grant();
        assert_eq!((&status.name, &status.pod_cidrs), (&grant.name, &grant.pod_cidrs), "it keeps what it had");
        let session = node.open(server.address, None, Transport::Tls).await;
        assert!(session.is_some(), "{} has to join again", node.name);
    }
    assert_eq!(server.stop(), Some(0));
    assert!(server.command("verify").status.success());
}
