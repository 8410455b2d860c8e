//! An issuer's key is replaced, and the process ends after each step that writes: what the disk says goes on by itself, or
//! when the command is run again.

use mesh_protocol::id::NodeId;
use mesh_protocol::offline::{GrantRequests, InFile as _, SignedGrants};
use mesh_protocol::record::{FormerKey, Handover};

use super::super::{layout, succeed::Successor};
use super::*;
use crate::store::{Operation, Txn};

/// A directory with two members and its folder, to be opened again.
struct Disk {
    directory: Option<Directory>,
    node: SigningKey,
    folder: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        let Fixture { mut directory, node, _folder: folder } = super::directory(0);
        let second = crate::keys::generate().unwrap();
        let held = directory.view().members().next().unwrap().1.grant.object.clone();
        let id = second.verify_key().node_id();
        let grant = NodeGrant {
            node: id,
            identity: second.verify_key(),
            name: "n2".parse().unwrap(),
            mesh_v4: "100.96.0.2".parse().unwrap(),
            mesh_v6: mesh_v6(directory.mesh(), id),
            pod_cidrs: vec!["10.1.1.0/24".parse().unwrap()],
            serial: 2,
            generation: 3,
            ..held
        };
        let envelope = directory.seal_grant(&grant).unwrap();
        directory.change(&envelope, Vec::new(), Vec::new()).unwrap();
        directory.keep_keys_in(folder.path().join("ks/keys"));
        Self { directory: Some(directory), node, folder }
    }

    fn directory(&mut self) -> &mut Directory {
        self.directory.as_mut().unwrap()
    }

    fn view(&self) -> &View {
        self.directory.as_ref().unwrap().view()
    }

    /// As if the process had ended and begun anew.
    fn restart(&mut self) {
        drop(self.directory.take());
        let dir = self.folder.path().join("ks");
        let settings = Settings { addresses: vec!["localhost:7443".into()], grant_life: Duration::from_secs(90 * DAY) };
        let store = Embedded::open(&dir.join("store.redb")).unwrap();
        let (metrics, _) = Metrics::new();
        let keys = Keys::load(&dir.join("keys")).unwrap();
        let mut directory =
            Directory::load(Box::new(store), keys, settings, WatermarkFile::in_dir(&dir), metrics).unwrap();
        directory.keep_keys_in(dir.join("keys"));
        directory.retire_keys();
        directory.take_issuer_key();
        directory.tick();
        self.directory = Some(directory);
    }

    fn key(&self, name: &str) -> Option<SigningKey> {
        crate::keys::load_optional(&self.folder.path().join("ks/keys"), name).unwrap()
    }

    /// The policy alone, as the first half of the command makes it.
    fn policy_only(&mut self, stolen: bool) -> SigningKey {
        let folder = self.folder.path().join("ks/keys");
        let next = crate::keys::generate().unwrap();
        crate::keys::replace(&folder, "issuer.next", &next).unwrap();
        let directory = self.directory();
        let (generation, serial) =
            if stolen { (0, 0) } else { (directory.view().highest_generation(), directory.history.serial) };
        directory
            .amend_policy_keeping_sessions(|policy| {
                let issuer = &mut policy.issuers[0];
                issuer.former = vec![FormerKey { key: issuer.key, generation, serial }];
                issuer.key = next.verify_key();
            })
            .unwrap();
        next
    }

    /// Both members hold a grant of the key on disk, which is the policy's; nothing is left over, nobody is alarmed.
    #[track_caller]
    fn ensure_through(&mut self) {
        let held = self.key("issuer").unwrap().verify_key();
        assert!(self.key("issuer.next").is_none(), "the next key is left over");
        assert_eq!(self.view().policy().issuers[0].key, held);
        let view = self.view();
        assert_eq!((view.members().count(), view.fallen().count()), (2, 0));
        for (_, member) in view.members() {
            assert!(!view.is_former(&member.grant.object));
            assert!(member.grant.envelope.signers().all(|signer| signer == held.id()));
        }
        assert!(self.directory().alarms.is_empty(), "{:?}", self.directory().alarms);
        let cluster = "east".parse().unwrap();
        let request = TokenRequest { cluster, uses: 1, ttl: 60, cidrs: Vec::new(), tags: Vec::new() };
        self.directory().create_token(request).unwrap();
    }
}

#[test]
fn an_end_after_the_key_is_written_leaves_it_for_the_next_try() {
    let mut disk = Disk::new();
    let (held, next) = (disk.key("issuer").unwrap().verify_key(), crate::keys::generate().unwrap());
    crate::keys::replace(&disk.folder.path().join("ks/keys"), "issuer.next", &next).unwrap();
    disk.restart();
    assert_eq!(disk.view().policy().issuers[0].key, held, "nothing happened yet");
    assert!(disk.key("issuer.next").is_some() && disk.directory().alarms.is_empty());
    disk.directory().rotate_issuer(false).unwrap();
    assert_eq!(disk.key("issuer").unwrap().verify_key(), next.verify_key(), "it is the key that was made first");
    disk.ensure_through();
}

#[test]
fn an_end_after_the_policy_is_stored_is_made_good_at_the_next_start() {
    for stolen in [false, true] {
        // Nothing else; the key in its place too; one node granted anew.
        for done in 0..3 {
            let mut disk = Disk::new();
            let next = disk.policy_only(stolen);
            if done >= 1 {
                crate::keys::replace(&disk.folder.path().join("ks/keys"), "issuer", &next).unwrap();
            }
            if done >= 2 {
                disk.directory().take_issuer_key();
                let members = disk.view().members().chain(disk.view().fallen());
                let grant = members.map(|(_, member)| member.grant.object.clone()).next().unwrap();
                disk.directory().grant_after(&grant).unwrap();
            }
            disk.restart();
            disk.ensure_through();
            let version = disk.view().policy().version;
            disk.directory().rotate_issuer(stolen).unwrap();
            assert_eq!(disk.view().policy().version, version, "it was under way: nothing is replaced twice");
            disk.restart();
            disk.ensure_through();
        }
    }
}

#[test]
fn the_former_key_goes_when_all_are_through_and_not_before() {
    let mut disk = Disk::new();
    disk.directory().finish_issuer(false).unwrap();
    let node = disk.node.verify_key().node_id();
    let hello = hello(disk.directory());
    let _session = disk.directory().open_session(node, peer(), &hello).unwrap();
    disk.directory().rotate_issuer(false).unwrap();
    let early = disk.directory().finish_issuer(true).unwrap_err();
    assert!(early.message.contains("connected") && early.message.contains("n1"), "{early}");
    let progress = disk.directory().issuer_progress().unwrap();
    assert_eq!((progress.total, progress.holding, progress.absent.len()), (2, 0, 1));
    let said = record_under_new_grant(&mut disk, node);
    disk.directory().publish(node, &said).unwrap();
    let absent = disk.directory().finish_issuer(false).unwrap_err();
    assert!(absent.message.contains("n2") && absent.message.contains("--leave-absent"), "{absent}");
    disk.directory().finish_issuer(true).unwrap();
    assert!(disk.view().policy().issuers[0].former.is_empty());
    disk.restart();
    disk.ensure_through();
    // And then the next one.
    disk.directory().rotate_issuer(false).unwrap();
    disk.ensure_through();
}

fn record_under_new_grant(disk: &mut Disk, node: NodeId) -> Envelope {
    let key = |byte: u8| EpochKey { epoch: byte.into(), key: TunnelSecret::from_bytes([byte; 32]).public() };
    let record = NodeRecord {
        node,
        seq: 1,
        grant: disk.view().member(node).unwrap().grant.hash,
        current: key(1),
        previous: None,
        spare: key(2),
        kem: KemKey { epoch: 1, key: KemPublic::from_bytes(&[3; KEM_PUBLIC_BYTES]).unwrap() },
        lanes: 1,
        departed: false,
        before: None,
    };
    Envelope::seal(disk.view().mesh(), &record, &[&disk.node])
}

#[test]
fn a_stolen_key_cuts_nobody_off_and_a_planned_change_before_it_falls_too() {
    let mut disk = Disk::new();
    let node = disk.node.verify_key().node_id();
    let hello = hello(disk.directory());
    let session = disk.directory().open_session(node, peer(), &hello).unwrap();
    disk.directory().rotate_issuer(false).unwrap();
    let before: Vec<_> = disk.view().members().map(|(_, member)| member.grant.hash).collect();
    disk.directory().rotate_issuer(true).unwrap();
    assert!(
        disk.view().members().all(|(_, member)| !before.contains(&member.grant.hash)),
        "no grant is another's twin"
    );
    assert!(disk.directory().is_current(session.key), "its session goes on");
    let former = &disk.view().policy().issuers[0].former;
    assert!(former.len() == 2 && former.iter().all(|former| !former.stands()), "{former:?}");
    disk.ensure_through();
    disk.directory().finish_issuer(true).unwrap_err();
    disk.directory().close_session(session.key);
    disk.directory().finish_issuer(true).unwrap();
    disk.ensure_through();
}

#[test]
fn tokens_of_the_former_key_are_void_and_counted() {
    let mut disk = Disk::new();
    let request =
        || TokenRequest { cluster: "east".parse().unwrap(), uses: 1, ttl: 60, cidrs: Vec::new(), tags: Vec::new() };
    disk.directory().create_token(request()).unwrap();
    let (_, open) = disk.directory().create_token(request()).unwrap();
    disk.directory().revoke_token(&open.id.to_string()).unwrap();
    assert_eq!(disk.directory().rotate_issuer(false).unwrap(), 1, "one was void before");
    assert!(disk.directory().list_tokens().unwrap().iter().all(|token| token.revoked));
    disk.directory().create_token(request()).unwrap();
    disk.restart();
    assert_eq!(disk.directory().list_tokens().unwrap().iter().filter(|token| !token.revoked).count(), 1);
}

#[test]
fn many_nodes_are_granted_anew_in_turns_and_all_at_once_if_the_key_was_stolen() {
    let mut disk = Disk::new();
    let held = disk.view().members().next().unwrap().1.grant.object.clone();
    for number in 3..100_u8 {
        let identity = crate::keys::generate().unwrap().verify_key();
        let grant = NodeGrant {
            node: identity.node_id(),
            identity,
            name: format!("n{number}").parse().unwrap(),
            mesh_v4: std::net::Ipv4Addr::new(100, 96, 1, number),
            mesh_v6: mesh_v6(disk.view().mesh(), identity.node_id()),
            pod_cidrs: vec![format!("10.1.{number}.0/24").parse().unwrap()],
            serial: number.into(),
            ..held.clone()
        };
        let envelope = disk.directory().seal_grant(&grant).unwrap();
        disk.directory().change(&envelope, Vec::new(), Vec::new()).unwrap();
    }
    let ungranted = |disk: &mut Disk| disk.directory().issuer_progress().unwrap().ungranted.len();
    disk.directory().rotate_issuer(false).unwrap();
    let left = ungranted(&mut disk);
    assert!(left > 0 && left < 99, "{left}: others are served in between");
    assert!(disk.directory().finish_issuer(true).unwrap_err().message.contains("not granted anew"));
    assert!(disk.directory().next_tick() <= Instant::now());
    disk.directory().tick();
    assert_eq!(ungranted(&mut disk), 0);
    disk.directory().finish_issuer(true).unwrap();
    let before: Vec<_> = disk.view().members().map(|(_, member)| member.grant.hash).collect();
    disk.directory().rotate_issuer(true).unwrap();
    assert!(disk.view().members().all(|(_, member)| !before.contains(&member.grant.hash)));
    assert_eq!((ungranted(&mut disk), disk.view().members().count()), (0, 99), "nobody is out for a moment");
}

/// The issuer's key is elsewhere: grants come by files, and what the former key signs too late is not taken.
#[test]
fn an_issuer_elsewhere_signs_what_waits_and_its_former_key_does_not() {
    for stolen in [false, true] {
        let mut disk = Disk::new();
        let former = disk.directory().keys.issuer.clone().unwrap();
        let next = disk.policy_only(stolen);
        disk.directory().keys.issuer = None;
        std::fs::remove_file(disk.folder.path().join("ks/keys/issuer.next")).unwrap();
        let (pending, file) = disk.directory().pending_grants().unwrap();
        assert!(pending.len() == 2 && pending.iter().all(|one| one.renewal && one.regrant == stolen), "{pending:?}");
        let file = GrantRequests::from_text(&file).unwrap();
        let view = file.mesh.view().unwrap();
        let sign = |by: &SigningKey| {
            let sign = |request: &mesh_protocol::offline::GrantRequest| {
                let issuer = view.check_request(request, unix_now()).unwrap();
                assert!(issuer.key == next.verify_key() && view.is_regrant(request) == stolen);
                Envelope::seal(view.mesh(), &request.grant, &[by])
            };
            SignedGrants { mesh: view.mesh(), grants: file.requests.iter().map(sign).collect() }.to_text()
        };
        let refused = disk.directory().import_grants(&sign(&former)).unwrap();
        assert!(refused.iter().all(|grant| grant.error.is_some()), "{refused:?}");
        let taken = disk.directory().import_grants(&sign(&next)).unwrap();
        assert!(taken.iter().all(|grant| grant.error.is_none()), "{taken:?}");
        assert!(disk.directory().pending_grants().unwrap().0.is_empty());
        assert_eq!(disk.view().members().count(), 2);
        let elsewhere = disk.directory().rotate_issuer(false).unwrap_err();
        assert!(elsewhere.message.contains("--replace-issuer"), "{elsewhere}");
    }
}

/// Its wish for another identity key fell with its grant.
#[test]
fn a_node_that_waits_for_an_identity_key_is_granted_anew_as_the_others_are() {
    let mut disk = Disk::new();
    let (mesh, node) = (disk.view().mesh(), *disk.view().members().next().unwrap().0);
    let [from, to] = [crate::keys::generate().unwrap(), crate::keys::generate().unwrap()];
    let successor = Successor { identity: to.verify_key(), handover: Handover::sign(mesh, node, &from, &to) };
    let put = Operation::Put(layout::successor(node), mesh_protocol::cbor::to_vec(&successor));
    disk.directory().commit(&Txn { then: vec![put], ..Txn::default() }).unwrap();
    disk.directory().read_back().unwrap();
    assert!(disk.directory().awaits_identity(node));
    disk.policy_only(true);
    disk.directory().keys.issuer = None;
    let (pending, _) = disk.directory().pending_grants().unwrap();
    assert!(pending.len() == 2 && pending.iter().all(|one| one.regrant), "{pending:?}");
}

#[test]
fn where_the_root_is_elsewhere_the_command_to_type_is_named_and_the_key_waits() {
    let mut disk = Disk::new();
    let root = disk.directory().keys.root.take().unwrap();
    let refused = disk.directory().rotate_issuer(false).unwrap_err();
    let next = disk.key("issuer.next").unwrap();
    let command = format!("{} --out next.txt", next.verify_key());
    assert!(refused.message.contains("--replace-issuer") && refused.message.contains(&command), "{refused}");
    assert_eq!(disk.view().policy().version, 2, "nothing happened yet");
    // The policy comes signed: the key is taken into use with it.
    let mut policy = disk.view().policy().clone();
    policy.version += 1;
    policy.previous = Some(disk.view().policy_hash());
    let held = policy.issuers[0].key;
    policy.issuers[0].former = vec![FormerKey { key: held, generation: 3, serial: 2 }];
    policy.issuers[0].key = next.verify_key();
    let proposal = Envelope::seal(disk.view().mesh(), &policy, &[&root]);
    let mesh = disk.directory().mesh_file();
    let file = mesh_protocol::offline::PolicyProposal { mesh, proposal }.to_text();
    disk.directory().import_policy(&file, false).unwrap();
    disk.ensure_through();
    let finish = disk.directory().finish_issuer(true).unwrap_err();
    assert!(finish.message.contains(&format!("--forget-issuer {}", held.id().short())), "{finish}");
}
