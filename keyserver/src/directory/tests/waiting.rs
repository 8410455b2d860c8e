//! Nodes that wait for an issuer whose key is elsewhere.

use mesh_protocol::control::RefusalCode;
use mesh_protocol::id::NodeId;
use mesh_protocol::offline::{GrantRequests, InFile as _, SignedGrants};
use mesh_protocol::token::{JoinClaim, JoinToken};

use super::*;

const EXPORTER: [u8; 32] = [9; 32];

/// A directory with one member, and a token for `uses` nodes; then the issuer's key is taken away.
struct Strict {
    directory: Directory,
    issuer: SigningKey,
    token: JoinToken,
    member: NodeId,
    _fixture: (SigningKey, tempfile::TempDir),
}

fn strict(age: u64, uses: u32) -> Strict {
    let Fixture { mut directory, node, _folder } = super::directory(age);
    let (cidrs, tags) = (Vec::new(), Vec::new());
    let request = TokenRequest { cluster: "east".parse().unwrap(), uses, ttl: 3600, cidrs, tags };
    let (line, _) = directory.create_token(request).unwrap();
    let token = line.parse().unwrap();
    let issuer = directory.keys.issuer.take().unwrap();
    Strict { directory, issuer, token, member: node.verify_key().node_id(), _fixture: (node, _folder) }
}

impl Strict {
    fn ask(&mut self, key: &SigningKey, name: &str, cidr: &str) -> Result<Enrolment, Refusal> {
        let claim = JoinClaim {
            mesh: self.directory.mesh(),
            token: self.token.id(),
            identity: key.verify_key(),
            name: name.parse().unwrap(),
            pod_cidrs: vec![cidr.parse().unwrap()],
        };
        let signature = claim.sign(&self.token.secret, &EXPORTER);
        let (identity, exporter, limits) = (key.verify_key(), EXPORTER, None);
        self.directory.enrol(&JoinAttempt { peer: peer(), identity, exporter, claim, signature, limits })
    }

    fn waits(&mut self, key: &SigningKey, name: &str, cidr: &str) {
        let asked = self.ask(key, name, cidr).unwrap();
        assert!(matches!(asked, Enrolment::Pending { .. }), "{asked:?}");
    }

    fn refused(&mut self, key: &SigningKey, name: &str, cidr: &str) -> Refusal {
        self.ask(key, name, cidr).unwrap_err()
    }

    fn used(&self) -> u32 {
        self.directory.list_tokens().unwrap()[0].used
    }

    /// What the issuer would bring back.
    fn signed(&mut self) -> String {
        let (_, file) = self.directory.pending_grants().unwrap();
        let file = GrantRequests::from_text(&file).unwrap();
        let view = file.mesh.view().unwrap();
        let sign = |request: &mesh_protocol::offline::GrantRequest| {
            assert_eq!(view.check_request(request, unix_now()).unwrap().key, self.issuer.verify_key());
            Envelope::seal(view.mesh(), &request.grant, &[&self.issuer])
        };
        SignedGrants { mesh: view.mesh(), grants: file.requests.iter().map(sign).collect() }.to_text()
    }
}

fn key() -> SigningKey {
    crate::keys::generate().unwrap()
}

#[test]
fn what_a_waiting_node_asked_for_is_kept_for_it() {
    let mut strict = strict(0, 3);
    let (one, two) = (key(), key());
    strict.waits(&one, "n2", "10.1.2.0/24");
    strict.waits(&one, "n2", "10.1.2.0/24");
    assert_eq!(strict.used(), 1, "asking again costs nothing");
    let taken = strict.refused(&two, "n3", "10.1.2.128/25");
    assert!(taken.code == RefusalCode::Taken && taken.message.contains("n2"), "{taken}");
    assert_eq!(strict.refused(&two, "n2", "10.1.3.0/24").code, RefusalCode::Taken);
    strict.waits(&two, "n3", "10.1.3.0/24");
    let serials: Vec<u64> = strict.directory.pending_grants().unwrap().0.iter().map(|grant| grant.serial).collect();
    assert_eq!(serials, [2, 3], "each has its own");

    // The store has it all.
    strict.directory.read_back().unwrap();
    let signed = strict.signed();
    let imported = strict.directory.import_grants(&signed).unwrap();
    assert!(imported.iter().all(|grant| grant.error.is_none()), "{imported:?}");
    assert!(matches!(strict.ask(&one, "n2", "10.1.2.0/24"), Ok(Enrolment::Granted { .. })));
    assert!(strict.directory.pending_grants().unwrap().0.is_empty());
    assert!(
        strict.directory.import_grants(&signed).unwrap().iter().all(|grant| grant.error.is_none()),
        "twice is once"
    );
}

#[test]
fn rejected_and_voided_and_forgotten_requests_are_not_granted() {
    let mut strict = strict(0, 3);
    let (one, two, three) = (key(), key(), key());
    strict.waits(&one, "n2", "10.1.2.0/24");
    strict.waits(&two, "n3", "10.1.3.0/24");
    let signed = strict.signed();
    strict.directory.reject_grant("n2").unwrap();
    assert!(strict.refused(&one, "n2", "10.1.2.0/24").message.contains("rejected"));
    strict.waits(&three, "n4", "10.1.2.0/24");
    let node = two.verify_key().node_id();
    strict.directory.reservations.expire(node);
    strict.directory.release_reservations();
    assert_eq!(strict.used(), 2, "the use of who waited in vain is free again");
    let imported = strict.directory.import_grants(&signed).unwrap();
    let errors: Vec<&str> = imported.iter().filter_map(|grant| grant.error.as_deref()).collect();
    assert!(errors.len() == 2 && errors.iter().all(|error| error.contains("nothing is reserved")), "{errors:?}");
    let signed = strict.signed();
    let id = strict.token.id().to_string();
    strict.directory.revoke_token(&id).unwrap();
    let imported = strict.directory.import_grants(&signed).unwrap();
    assert!(imported[0].error.as_deref().is_some_and(|error| error.contains("voided")), "{imported:?}");
}

#[test]
fn a_grant_near_its_end_is_listed_and_its_renewal_keeps_its_place() {
    let mut strict = strict(61 * DAY, 1);
    let held = strict.directory.view().member(strict.member).unwrap().grant.object.clone();
    let (pending, _) = strict.directory.pending_grants().unwrap();
    assert!(pending.len() == 1 && pending[0].renewal, "{pending:?}");
    let signed = strict.signed();
    assert!(strict.directory.import_grants(&signed).unwrap()[0].error.is_none());
    let renewed = &strict.directory.view().member(strict.member).unwrap().grant.object;
    assert_eq!((renewed.generation, renewed.serial), (held.generation + 1, held.serial));
    assert!(renewed.expires > held.expires);
}

#[test]
fn a_revoked_node_waits_for_its_issuer_and_nobody_takes_its_place_meanwhile() {
    let mut strict = strict(0, 3);
    let member = strict.member;
    let held = strict.directory.view().member(member).unwrap().grant.object.clone();
    strict.directory.revoke("n1", "test", false, None).unwrap();
    let restore = |strict: &mut Strict| match strict.directory.restore("n1") {
        Ok(Restored::Pending(waits)) => waits,
        other => panic!("{other:?}"),
    };
    let first = restore(&mut strict);
    assert!(first.restoration && !first.renewal && first.name == held.name, "{first:?}");
    let old = strict.signed();
    assert_eq!(strict.refused(&key(), "n1", "10.1.7.0/24").code, RefusalCode::Taken);
    assert_eq!(strict.refused(&key(), "n2", "10.1.0.0/25").code, RefusalCode::Taken);
    assert!(strict.directory.view().member(member).is_none(), "not before it is signed");
    // Rejected, nothing is kept for it, and what was signed is good for nothing.
    strict.directory.reject_grant("n1").unwrap();
    let refused = strict.directory.import_grants(&old).unwrap();
    assert!(refused[0].error.as_deref().is_some_and(|error| error.contains("nothing is reserved")), "{refused:?}");
    // Asked for twice it waits once, at a new place; the store has it.
    restore(&mut strict);
    let last = restore(&mut strict);
    assert!(last.serial > first.serial && strict.directory.pending_grants().unwrap().0 == [last]);
    strict.directory.read_back().unwrap();
    let signed = strict.signed();
    assert!(strict.directory.import_grants(&signed).unwrap()[0].error.is_none());
    let back = strict.directory.view().member(member).unwrap().grant.object.clone();
    assert_eq!((back.name, back.mesh_v4, back.pod_cidrs), (held.name, held.mesh_v4, held.pod_cidrs));
    assert!(back.lifts.is_some() && back.generation > held.generation);
    assert!(strict.directory.restore("n1").is_err(), "it is in again");
    // Revoked again, the same signed grant does not help it.
    strict.directory.revoke("n1", "test", false, None).unwrap();
    assert!(strict.directory.import_grants(&signed).unwrap()[0].error.is_some());
    assert!(strict.directory.view().member(member).is_none());
    let lines = strict.directory.audit_page(1, u64::MAX - 1).unwrap().join("\n");
    for action in ["restore-pending", "restore-reject", "\"restore\""] {
        assert!(lines.contains(action), "{action}: {lines}");
    }
}

#[test]
fn a_revoked_node_whose_place_was_taken_does_not_come_back() {
    let mut strict = strict(0, 3);
    strict.directory.revoke("n1", "test", false, None).unwrap();
    strict.waits(&key(), "n9", "10.1.0.0/24");
    let taken = strict.directory.restore("n1").unwrap_err();
    assert!(taken.code == RefusalCode::Taken && taken.message.contains("n9"), "{taken}");
    strict.directory.reject_grant("n9").unwrap();
    strict.waits(&key(), "n1", "10.1.9.0/24");
    assert_eq!(strict.directory.restore("n1").unwrap_err().code, RefusalCode::Taken);
}

#[test]
fn the_audit_log_tells_who_waits() {
    let mut strict = strict(0, 2);
    strict.waits(&key(), "n2", "10.1.2.0/24");
    strict.directory.reject_grant("n2").unwrap();
    let lines = strict.directory.audit_page(1, u64::MAX - 1).unwrap().join("\n");
    assert!(lines.contains("join-pending") && lines.contains("join-reject"), "{lines}");
}
