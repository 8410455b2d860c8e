//! The log beside what it tells of: in one transaction, over restarts, in files.
#![allow(clippy::unwrap_used, reason = "tests")]

use mesh_protocol::audit::{AuditEnd, AuditEntry, AuditError, Verifier};
use mesh_protocol::record::PostQuantum;

use super::*;
use crate::directory::{ClusterRequest, Settings, TokenRequest};
use crate::init::{NewMesh, init};
use crate::keys::Keys;
use crate::metrics::Metrics;
use crate::store::Embedded;
use crate::watermark::WatermarkFile;

fn open(dir: &Path) -> Directory {
    let settings =
        Settings { addresses: vec!["localhost:7443".into()], grant_life: std::time::Duration::from_secs(90 * 86_400) };
    let store = Embedded::open(&dir.join("store.redb")).unwrap();
    let keys = Keys::load(&dir.join("keys")).unwrap();
    let (metrics, _) = Metrics::new();
    let mut directory = Directory::load(Box::new(store), keys, settings, WatermarkFile::in_dir(dir), metrics).unwrap();
    directory.keep_audit_in(dir.join("audit"));
    directory
}

fn mesh() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("ks");
    let new = NewMesh {
        dir: dir.clone(),
        name: "test".parse().unwrap(),
        address: "localhost:7443".into(),
        mesh_cidr: "100.96.0.0/16".parse().unwrap(),
        exposure: std::time::Duration::from_secs(7 * 86_400),
        pq: PostQuantum::Off,
        elsewhere: None,
    };
    init(&new).unwrap();
    (folder, dir)
}

fn add_cluster(directory: &mut Directory) {
    let cluster = "east".parse().unwrap();
    let pod_cidrs = vec!["10.1.0.0/16".parse().unwrap()];
    directory.add_cluster(ClusterRequest { cluster, pod_cidrs, node_prefix: None, node_prefix6: None }).unwrap();
}

fn make_token(directory: &mut Directory) {
    let cluster = "east".parse().unwrap();
    directory.create_token(TokenRequest { cluster, uses: 1, ttl: 3600, cidrs: vec![], tags: vec![] }).unwrap();
}

/// The whole log, and whether it verifies.
fn export(directory: &Directory) -> (Vec<AuditEntry>, Result<AuditHead, AuditError>) {
    let head = directory.audit_head();
    let (mut entries, mut verifier, mut next) = (Vec::new(), Verifier::new(1), 1);
    loop {
        let page = directory.audit_page(next, head.number).unwrap();
        if page.is_empty() {
            break;
        }
        next += page.len() as u64;
        for line in page {
            verifier.line(&line).unwrap();
            entries.push(serde_json::from_str(&line).unwrap());
        }
    }
    let end = verifier.line(&serde_json::to_string(&AuditEnd { head }).unwrap());
    (entries, end.and_then(|()| verifier.finish()))
}

#[test]
fn entries_name_who_did_what_and_survive_a_restart() {
    let (_folder, dir) = mesh();
    let mut directory = open(&dir);
    directory.set_actor(Some("uid 0 (root) pid 1".into()));
    add_cluster(&mut directory);
    make_token(&mut directory);
    directory.set_actor(None);
    drop(directory);
    let mut directory = open(&dir);
    make_token(&mut directory);
    let (entries, end) = export(&directory);
    let told: Vec<(&str, &str)> = entries.iter().map(|entry| (entry.actor.as_str(), entry.action.as_str())).collect();
    let root = "uid 0 (root) pid 1";
    assert_eq!(told, [(root, "policy"), (root, "token-create"), ("keyserver", "token-create")]);
    assert!(entries[0].detail.contains("east"), "{}", entries[0].detail);
    assert_eq!(end.unwrap().number, 3);
}

#[test]
fn what_is_refused_leaves_no_entry() {
    let (_folder, dir) = mesh();
    let mut directory = open(&dir);
    add_cluster(&mut directory);
    let cluster = "east".parse().unwrap();
    let pod_cidrs = vec!["10.9.0.0/16".parse().unwrap()];
    let again = ClusterRequest { cluster, pod_cidrs, node_prefix: None, node_prefix6: None };
    directory.add_cluster(again).unwrap_err();
    directory.revoke("nobody", "test", false, None).map(|_| ()).unwrap_err();
    assert_eq!(export(&directory).0.len(), 1);
}

#[test]
fn old_lines_move_to_files_and_the_chain_goes_on() {
    let (_folder, dir) = mesh();
    let mut directory = open(&dir);
    add_cluster(&mut directory);
    for _ in 0..90 {
        make_token(&mut directory);
        directory.rotate_audit();
    }
    assert!(directory.audit.first > 1);
    let files = fs::read_dir(dir.join("audit")).unwrap().count();
    assert!(files >= 2, "{files} files");
    let (entries, end) = export(&directory);
    assert_eq!((entries.len(), end.unwrap().number), (91, 91));
    drop(directory);
    let mut directory = open(&dir);
    make_token(&mut directory);
    assert_eq!(export(&directory).1.unwrap().number, 92);
    // A file that is gone is not passed over.
    fs::remove_dir_all(dir.join("audit")).unwrap();
    assert!(directory.audit_page(1, 92).is_err());
}
