//! What was acknowledged is there after any end.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mesh_protocol::control::RefusalCode;

use crate::client::{Node, Transport};
use crate::server::Server;

#[tokio::test]
async fn kill_9_in_a_loop_keeps_every_acknowledged_grant() {
    let mut server = Server::start();
    let token = server.token(1_000);
    let mut granted = Vec::new();
    for round in 0..6 {
        let address = server.address;
        let shared = token.clone();
        let done = Arc::new(AtomicUsize::new(0));
        let count = done.clone();
        let joining = tokio::spawn(async move {
            let mut granted = Vec::new();
            for number in 0.. {
                let mut node = Node::new(&format!("r{round}n{number}"));
                // The connection breaks when the keyserver dies: what was granted by then counts.
                let Some(stream) =
                    crate::client::connect(&node.key, mesh_protocol::control::ALPN_JOIN, address, Transport::Tls).await
                else {
                    return granted;
                };
                drop(stream);
                let join = tokio::spawn({
                    let token = shared.clone();
                    async move { node.join(address, &token).await.map(|_| node.grant().clone()) }
                });
                match join.await {
                    Ok(Ok(grant)) => {
                        granted.push(grant);
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    _ => return granted,
                }
            }
            granted
        });
        // However slow the machine is: the kill hits some join behind the second one of this round.
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while done.load(Ordering::Relaxed) < 2 && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(7)).await;
        }
        tokio::time::sleep(Duration::from_millis(round * 11)).await;
        server.kill();
        granted.extend(joining.await.unwrap());
        server.run();
    }
    assert!(granted.len() > 6, "only {} grants", granted.len());
    let nodes = server.nodes();
    for grant in &granted {
        let held = nodes.iter().find(|node| node.node == grant.node).expect("an acknowledged grant is there");
        assert_eq!((held.name.clone(), held.pod_cidrs.clone()), (grant.name.clone(), grant.pod_cidrs.clone()));
    }
    assert_eq!(usize::try_from(server.tokens()[0].used).unwrap(), nodes.len(), "uses and grants agree");
    assert_eq!(server.stop(), Some(0));
    assert!(server.command("verify").status.success());
}

#[tokio::test]
async fn a_restored_store_writes_nothing_until_resume() {
    let mut server = Server::start();
    let token = server.token(5);
    Node::new("n1").join(server.address, &token).await.unwrap();
    server.kill();
    let (store, copy) = (server.dir().join("store.redb"), server.folder.path().join("copy"));
    std::fs::copy(&store, &copy).unwrap();
    server.run();
    let mut lost = Node::new("n2");
    lost.join(server.address, &token).await.unwrap();
    let epoch = server.status().position.epoch;
    server.kill();
    std::fs::copy(&copy, &store).unwrap();
    server.run();
    let refused = Node::new("n3").join(server.address, &token).await.unwrap_err();
    assert_eq!(refused.code, RefusalCode::Unavailable);
    assert!(refused.message.contains("keyserver resume"), "{refused}");
    assert!(server.status().alarms[0].contains("older"), "{:?}", server.status().alarms);
    server.kill();
    assert!(server.command("resume").status.success());
    server.run();
    let refused = Node::new("n3").join(server.address, &token).await.unwrap_err();
    assert!(refused.message.contains("restored"), "voided and used tokens do not come back: {refused}");
    let token = server.token(5);
    let mut next = Node::new("n3");
    next.join(server.address, &token).await.unwrap();
    assert!(next.grant().serial > lost.grant().serial);
    assert_ne!(server.status().position.epoch, epoch, "another history");
}

#[tokio::test]
async fn nodes_notice_a_kill_and_restart_within_seconds() {
    for transport in [Transport::Quic, Transport::Tls] {
        let mut server = Server::start();
        let mut node = Node::new("n1");
        node.join(server.address, &server.token(1)).await.unwrap();
        let mut session = node.open(server.address, None, transport).await.unwrap();
        session.until("a full map", |session| session.position.is_some()).await;
        server.kill();
        server.run();
        let back = Instant::now();
        // The keyserver's idle timeout is 30 s, this client has none: over QUIC only a stateless reset ends the stream.
        session.until_end().await;
        assert!(back.elapsed() < Duration::from_secs(6), "{transport:?}: noticed after {:?}", back.elapsed());
        assert!(node.open(server.address, session.position, transport).await.is_some(), "and it is served again");
    }
}

/// A file system of its own, unmounted when dropped.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_disk_refuses_and_recovers() {
    assert!(nix::unistd::geteuid().is_root(), "this test mounts a file system: run it as root");
    let mut server = Server::stopped();
    let moved = server.folder.path().join("moved");
    std::fs::rename(server.dir(), &moved).unwrap();
    std::fs::create_dir(server.dir()).unwrap();
    let mount = ["-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs"];
    assert!(Command::new("mount").args(mount).arg(server.dir()).status().unwrap().success());
    let _mounted = Mounted(server.dir());
    let copy = ["-a", &format!("{}/.", moved.display())].map(str::to_owned);
    assert!(Command::new("cp").args(copy).arg(server.dir()).status().unwrap().success());
    server.run();
    server.add_cluster("east", &["10.1.0.0/16"]).unwrap();
    let token = server.token(500);
    let filler = server.dir().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[7; 4096]).is_ok() {}
    let mut granted = 0;
    let refused = loop {
        match Node::new(&format!("n{granted}")).join(server.address, &token).await {
            Ok(_) => granted += 1,
            Err(refusal) => break refusal,
        }
        assert!(granted < 500, "the disk does not fill");
    };
    assert_eq!(refused.code, RefusalCode::Unavailable, "{refused}");
    assert!(refused.message.contains("cannot write"), "{refused}");
    let log = std::fs::read_to_string(server.log()).unwrap();
    assert!(log.contains("store refused a write"), "the store itself was hit");
    assert_eq!(server.nodes().len(), granted, "reads go on, nothing is half there");
    assert!(!server.status().alarms.is_empty());
    drop(file);
    std::fs::remove_file(&filler).unwrap();
    Node::new("after").join(server.address, &token).await.unwrap();
    assert_eq!(server.nodes().len(), granted + 1);
    assert_eq!(usize::try_from(server.tokens()[0].used).unwrap(), granted + 1, "uses and grants agree");
}
