//! A mesh without post-quantum tunnels comes to require them: all of it by the policy, a cluster by grants.

use mesh_protocol::offline::{GrantRequests, InFile as _, SignedGrants};

use super::*;

/// Members beyond the first, in cluster east.
fn with_members(count: u8) -> Fixture {
    let mut fixture = directory(0);
    let held = fixture.directory.view().members().next().unwrap().1.grant.object.clone();
    for n in 0..count {
        let node = crate::keys::generate().unwrap();
        let id = node.verify_key().node_id();
        let grant = NodeGrant {
            node: id,
            identity: node.verify_key(),
            name: format!("m{n}").parse().unwrap(),
            mesh_v4: format!("100.96.1.{n}").parse().unwrap(),
            mesh_v6: mesh_v6(fixture.directory.mesh(), id),
            pod_cidrs: vec![format!("10.1.{}.0/24", n + 1).parse().unwrap()],
            serial: u64::from(n) + 2,
            ..held.clone()
        };
        let envelope = fixture.directory.seal_grant(&grant).unwrap();
        fixture.directory.change(&envelope, Vec::new(), Vec::new()).unwrap();
    }
    fixture
}

fn east() -> Vec<mesh_protocol::id::Name> {
    vec!["east".parse().unwrap()]
}

#[test]
fn the_policy_turns_all_and_back_and_touches_no_grant() {
    let Fixture { mut directory, _folder: _kept, .. } = with_members(2);
    let before = directory.view().policy().version;
    let state = directory.set_post_quantum(PostQuantum::Required, &[]).unwrap();
    assert_eq!((state.policy, state.policy_version), (PostQuantum::Required, before + 1));
    assert_eq!((state.total, state.required, state.left, state.pending), (3, 0, 0, 0));
    assert_eq!(directory.view().members().count(), 3, "nobody is out");
    assert!(directory.view().members().all(|(_, member)| member.grant.object.generation == 1));
    // Again it is done already; and back.
    assert_eq!(directory.set_post_quantum(PostQuantum::Required, &[]).unwrap(), state);
    assert_eq!(directory.set_post_quantum(PostQuantum::Off, &[]).unwrap().policy_version, before + 2);
    assert!(directory.alarms.is_empty());
}

#[test]
fn a_cluster_turns_by_grants_some_at_a_time_and_not_back() {
    let Fixture { mut directory, _folder: _kept, .. } = with_members(70);
    let policy = directory.view().policy().version;
    let first = directory.set_post_quantum(PostQuantum::Required, &east()).unwrap();
    assert_eq!((first.total, first.required, first.left), (71, 64, 7), "others are served in between");
    let state = directory.set_post_quantum(PostQuantum::Required, &east()).unwrap();
    assert_eq!((state.required, state.left, state.pending, state.file), (71, 0, 0, None));
    assert_eq!((state.policy, state.policy_version), (PostQuantum::Off, policy));
    let revision = directory.position();
    directory.set_post_quantum(PostQuantum::Required, &east()).unwrap();
    assert_eq!(directory.position(), revision, "done already");
    let back = directory.set_post_quantum(PostQuantum::Off, &east()).unwrap_err();
    assert_eq!(back.code, RefusalCode::BadMessage);
    let strange = directory.set_post_quantum(PostQuantum::Required, &["nowhere".parse().unwrap()]).unwrap_err();
    assert!(strange.message.contains("no cluster nowhere"), "{strange}");
    // A renewal keeps it.
    let node = *directory.view().members().next().unwrap().0;
    let held = directory.view().member(node).unwrap().grant.object.clone();
    directory.grant_after(&held).unwrap();
    assert_eq!(directory.view().member(node).unwrap().grant.object.pq, PostQuantum::Required);
}

#[test]
fn an_issuer_elsewhere_signs_from_a_file_and_roots_elsewhere_are_named() {
    let Fixture { mut directory, _folder: _kept, .. } = with_members(2);
    let (issuer, _) = (directory.keys.issuer.take().unwrap(), directory.keys.root.take());
    let root = directory.set_post_quantum(PostQuantum::Required, &[]).unwrap_err();
    assert!(root.message.contains("meshctl policy propose --pq required"), "{root}");
    let state = directory.set_post_quantum(PostQuantum::Required, &east()).unwrap();
    assert_eq!((state.required, state.left, state.pending), (0, 0, 3));
    let file = GrantRequests::from_text(&state.file.unwrap()).unwrap();
    let view = file.mesh.view().unwrap();
    for request in &file.requests {
        assert_eq!(view.check_request(request, unix_now()).unwrap().key, issuer.verify_key());
        assert_eq!(request.grant.pq, PostQuantum::Required);
    }
    let sign =
        |request: &mesh_protocol::offline::GrantRequest| Envelope::seal(file.mesh.mesh, &request.grant, &[&issuer]);
    let signed = SignedGrants { mesh: file.mesh.mesh, grants: file.requests.iter().map(sign).collect() };
    let imported = directory.import_grants(&signed.to_text()).unwrap();
    assert!(imported.iter().all(|one| one.error.is_none()), "{imported:?}");
    let state = directory.set_post_quantum(PostQuantum::Required, &east()).unwrap();
    assert_eq!((state.required, state.pending, state.file), (3, 0, None));
}
