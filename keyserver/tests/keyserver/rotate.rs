//! Rotation as a job: asked in waves, seen by records and confirmations, and right again after any end.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use mesh_protocol::admin::{
    AdminReply, AdminRequest, KeyPhase, NodeKeys, RotationChange, RotationJob, RotationOrder, RotationState,
};
use mesh_protocol::control::{NodeMessage, ServerMessage};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::Name;
use mesh_protocol::line;

use crate::client::{Node, Session, Transport};
use crate::revoke::members;
use crate::server::{DEADLINE, Server};

fn order(server: &Server, order: RotationOrder) -> u64 {
    let replies = server.ask_all(&AdminRequest::Rotate { order, wait: 0 });
    let Some(AdminReply::Rotation { job, .. }) = replies.last() else { panic!("{replies:?}") };
    *job
}

fn listed(server: &Server) -> (Vec<RotationJob>, Vec<NodeKeys>) {
    match server.ask(&AdminRequest::RotationList) {
        Ok(AdminReply::Rotations { jobs, nodes }) => (jobs, nodes),
        other => panic!("{other:?}"),
    }
}

fn requests(session: &Session) -> Vec<(u64, Option<u64>)> {
    let asked = session.other.iter().filter_map(|message| match message {
        ServerMessage::Rotate { request, after, .. } => Some((*request, *after)),
        _ => None,
    });
    asked.collect()
}

/// A connected node with its first record published.
struct Member {
    node: Node,
    session: Session,
    promoted: Option<Envelope>,
}

impl Member {
    async fn connect(server: &Server, node: Node) -> Self {
        let session = node.open(server.address, None, Transport::Quic).await.unwrap();
        Self { node, session, promoted: None }
    }

    async fn publish_first(&mut self) {
        let record = self.node.record();
        self.session.publish(&self.node.seal(&record)).await.unwrap();
    }

    async fn is_asked(&mut self) -> u64 {
        self.session.until("the request", |session| !requests(session).is_empty()).await;
        requests(&self.session)[0].0
    }

    /// Nothing was asked: whatever was sent before a published record's answer is there by then.
    async fn is_not_asked(&mut self) {
        let endpoints = self.node.endpoints(u64::from(self.node.seq as u32) + 1_000, "192.0.2.1:7100");
        self.session.publish(&endpoints).await.unwrap();
        assert!(requests(&self.session).is_empty());
    }

    async fn promote(&mut self, request: u64) {
        let promoted = self.node.seal(&self.node.record_at(2, 2));
        self.session.publish(&promoted).await.unwrap();
        self.session.stream.send(&NodeMessage::Rotated { request, epoch: Some(2), error: None }).await;
        self.promoted = Some(promoted);
    }

    async fn confirm(&mut self, promoted: &Envelope) {
        self.session.until("the new record", |session| session.has(promoted)).await;
        self.session.applied().await;
    }
}

async fn connected(server: &Server, names: &[&str]) -> Vec<Member> {
    let mut connected = Vec::new();
    for node in members(server, names).await {
        let mut member = Member::connect(server, node).await;
        member.publish_first().await;
        connected.push(member);
    }
    // In the order in which waves take them.
    connected.sort_by_key(|member| member.node.id());
    connected
}

async fn confirm_all(members: &mut [Member], by: usize) {
    let promoted = members[by].promoted.clone().unwrap();
    for member in members {
        member.confirm(&promoted).await;
    }
}

async fn until_state(server: &Server, expected: RotationState) -> RotationJob {
    let begun = std::time::Instant::now();
    loop {
        let (jobs, _) = listed(server);
        if jobs[0].state == expected {
            return jobs[0].clone();
        }
        assert!(begun.elapsed() < DEADLINE, "{jobs:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn rotation_asks_and_shows_who_did() {
    let server = Arc::new(Server::start());
    let away = members(&server, &["away"]).await;
    let mut nodes = connected(&server, &["n1", "n2"]).await;
    let asking = server.clone();
    let asked = tokio::task::spawn_blocking(move || {
        asking.ask_all(&AdminRequest::Rotate { order: RotationOrder::default(), wait: 10_000 })
    });
    let request = nodes[0].is_asked().await;
    assert_eq!(nodes[1].is_asked().await, request);
    nodes[1].session.stream.send(&NodeMessage::Rotated { request, epoch: None, error: Some("not now".into()) }).await;
    nodes[0].promote(request).await;
    confirm_all(&mut nodes, 0).await;
    let replies = asked.await.unwrap();
    let Some(AdminReply::Rotation { total, promoted, confirmed, failed, offline, done, .. }) = replies.last() else {
        panic!("{replies:?}")
    };
    let names = |names: &[Name]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!((*total, *done), (3, true), "{replies:?}");
    assert_eq!(
        (names(promoted), names(confirmed)),
        (vec![nodes[0].node.name.clone()], vec![nodes[0].node.name.clone()])
    );
    assert_eq!(names(offline), ["away"]);
    assert_eq!((failed[0].node.as_str(), failed[0].error.as_str()), (nodes[1].node.name.as_str(), "not now"));
    // The node that was away is asked when it comes, long after the operator has gone.
    let (jobs, keys) = listed(&server);
    assert_eq!((jobs[0].state, jobs[0].offline), (RotationState::Waiting, 1));
    let of = |name: &str| keys.iter().find(|node| node.name.as_str() == name).unwrap().clone();
    assert_eq!(of("away").jobs, [jobs[0].job]);
    assert_eq!((of(&nodes[0].node.name).epoch, of(&nodes[0].node.name).phase), (Some(2), Some(KeyPhase::Retired)));
    let mut late = Member::connect(&server, away.into_iter().next().unwrap()).await;
    late.is_asked().await;
}

#[tokio::test]
async fn the_job_goes_on_when_the_command_is_gone() {
    let server = Server::start();
    let mut nodes = connected(&server, &["n1"]).await;
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    let request = AdminRequest::Rotate { order: RotationOrder::default(), wait: 60_000 };
    stream.write_all(&line::encode(&request).unwrap()).unwrap();
    let mut first = String::new();
    BufReader::new(&stream).read_line(&mut first).unwrap();
    drop(stream);
    let request = nodes[0].is_asked().await;
    nodes[0].promote(request).await;
    confirm_all(&mut nodes, 0).await;
    assert_eq!(until_state(&server, RotationState::Done).await.confirmed, 1);
}

/// Where the keyserver is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Killed {
    /// The job is stored; nobody was connected to be asked.
    Ordered,
    /// The first node was asked and said nothing.
    Asked,
    /// Its record is stored, nobody confirmed.
    Promoted,
    /// All confirmed; the second wave is asked, and silent.
    SecondAsked,
    /// An operator holds it between two waves.
    Paused,
    /// It is over.
    Done,
}

async fn survives(killed: Killed) {
    let mut server = Server::start();
    let mut nodes = connected(&server, &["n1", "n2"]).await;
    if killed == Killed::Ordered {
        // Nobody is there to be asked.
        server.kill();
        server.run();
    }
    let job = order(&server, RotationOrder { wave: Some(50), ..RotationOrder::default() });
    if killed != Killed::Ordered {
        let request = nodes[0].is_asked().await;
        nodes[1].is_not_asked().await;
        if killed == Killed::Paused {
            let pause = AdminRequest::RotationChange { job: Some(job), change: RotationChange::Pause };
            server.ask(&pause).unwrap();
        }
        if killed != Killed::Asked {
            nodes[0].promote(request).await;
        }
        if !matches!(killed, Killed::Asked | Killed::Promoted) {
            confirm_all(&mut nodes, 0).await;
        }
        if matches!(killed, Killed::SecondAsked | Killed::Done) {
            let request = nodes[1].is_asked().await;
            if killed == Killed::Done {
                nodes[1].promote(request).await;
                confirm_all(&mut nodes, 1).await;
                until_state(&server, RotationState::Done).await;
            }
        }
    }
    server.kill();
    server.run();
    let mut again = Vec::new();
    for Member { node, promoted, .. } in nodes {
        let session = node.open(server.address, None, Transport::Quic).await.unwrap();
        again.push(Member { node, session, promoted });
    }
    let mut nodes = again;
    let (jobs, _) = listed(&server);
    assert_eq!(jobs[0].job, job);
    for at in 0..2 {
        if killed == Killed::Done {
            nodes[at].is_not_asked().await;
            continue;
        }
        if at == 1 && killed == Killed::Paused {
            for member in &mut nodes {
                member.session.until("a full map", |session| session.position.is_some()).await;
                member.session.applied().await;
            }
            nodes[1].is_not_asked().await;
            assert_eq!(until_state(&server, RotationState::Paused).await.promoted, 1);
            let resume = AdminRequest::RotationChange { job: None, change: RotationChange::Resume };
            server.ask(&resume).unwrap();
        }
        if nodes[at].promoted.is_none() {
            let request = nodes[at].is_asked().await;
            assert_eq!(requests(&nodes[at].session)[0].1, Some(1), "asked for what it has not done yet");
            nodes[at].promote(request).await;
        }
        confirm_all(&mut nodes, at).await;
    }
    let over = until_state(&server, RotationState::Done).await;
    assert_eq!((over.total, over.confirmed, over.failed.len()), (2, 2, 0), "{over:?}");
    let mut told: Vec<String> = Vec::new();
    for reply in server.ask_all(&AdminRequest::AuditExport { from: 1 }) {
        let AdminReply::Audit { lines, .. } = reply else { panic!("{reply:?}") };
        told.extend(lines);
    }
    let rotations = told.iter().filter(|line| line.contains("\"rotate\"")).count();
    assert_eq!(rotations, 2, "each node rotated once: {told:?}");
}

#[tokio::test]
async fn a_keyserver_killed_before_anybody_was_asked_goes_on() {
    survives(Killed::Ordered).await;
}

#[tokio::test]
async fn a_keyserver_killed_before_an_answer_asks_again() {
    survives(Killed::Asked).await;
}

#[tokio::test]
async fn a_keyserver_killed_before_a_confirmation_waits_for_it() {
    survives(Killed::Promoted).await;
}

#[tokio::test]
async fn a_keyserver_killed_in_the_second_wave_does_not_repeat_the_first() {
    survives(Killed::SecondAsked).await;
}

#[tokio::test]
async fn a_keyserver_killed_while_a_job_is_held_holds_it() {
    survives(Killed::Paused).await;
}

#[tokio::test]
async fn a_keyserver_killed_after_the_end_begins_nothing_anew() {
    survives(Killed::Done).await;
}

#[tokio::test]
async fn a_dry_run_says_what_would_happen_and_does_nothing() {
    let server = Server::start();
    members(&server, &["away"]).await;
    let mut nodes = connected(&server, &["n1", "n2", "n3"]).await;
    let order = RotationOrder { wave: Some(50), dry_run: true, ..RotationOrder::default() };
    let reply = server.ask(&AdminRequest::Rotate { order, wait: 0 }).unwrap();
    let AdminReply::RotationPlan { nodes: plan } = reply else { panic!("{reply:?}") };
    assert_eq!(plan.iter().map(|node| node.wave).collect::<Vec<_>>(), [1, 1, 2, 2]);
    let away = plan.iter().find(|node| node.node.as_str() == "away").unwrap();
    assert_eq!((away.connected, away.epoch), (false, None));
    nodes[0].is_not_asked().await;
    assert!(listed(&server).0.is_empty());
}
