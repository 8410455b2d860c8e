#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use super::*;

const ANSWERS: &str = "#!/bin/sh\nread line\n";

fn program(folder: &Path, name: &str, body: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, format!("{ANSWERS}{body}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn reason(result: Result<Signer, SignerError>) -> String {
    result.map(|signer| signer.public()).unwrap_err().to_string()
}

#[test]
fn key_files_are_private_and_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("issuer.key");
    let key = make_key_file(&path).unwrap();
    let spec = path.to_str().unwrap();
    assert_eq!(Signer::open(spec).unwrap().public(), key.verify_key());
    assert!(make_key_file(&path).is_err());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    assert!(reason(Signer::open(spec)).contains("chmod 600"));
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(Signer::open(link.to_str().unwrap()).is_err());
}

#[test]
fn programs_that_misbehave_are_named_and_do_not_hang() {
    let folder = tempfile::tempdir().unwrap();
    let cases = [
        ("silent", "exit 0", "did not answer with a public key"),
        ("fails", "echo '{}'; exit 3", "failed"),
        ("nonsense", "echo hello", "did not answer with a public key"),
        ("floods", "exec yes", "more than 4096 bytes"),
        ("weak", "echo '{\"public_key\":\"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"}'", "public key"),
    ];
    for (name, body, expected) in cases {
        let program = program(folder.path(), name, body);
        let said = reason(Signer::open(&format!("exec:{program}")));
        assert!(said.contains(expected) && said.contains(name), "{said}");
    }
    assert!(reason(Signer::open("exec:")).contains("no command"));
    assert!(reason(Signer::open("exec:/nonexistent/x")).contains("cannot be started"));
    let slow = program(folder.path(), "slow", "sleep 60");
    let mut exec = exec::Exec::new(&slow).unwrap();
    exec.patience = Duration::from_millis(100);
    let begun = Instant::now();
    assert!(exec.public_key().unwrap_err().to_string().contains("did not answer within"));
    assert!(begun.elapsed() < Duration::from_secs(30));
}

fn revocation(key: VerifyKey) -> Envelope {
    Envelope::unsigned(&mesh_protocol::record::Revocation {
        number: 1,
        previous: None,
        node: key.node_id(),
        up_to_generation: 1,
        reason: String::new(),
        time: 1,
    })
}

/// A program that answers with these.
fn answering(folder: &Path, key: &VerifyKey, signature: &str) -> String {
    let public = format!("*public-key*) echo '{{\"public_key\":\"{key}\"}}';;");
    let body = format!("case $line in {public} *) echo '{{\"signature\":\"{signature}\"}}';; esac");
    program(folder, "answers", &body)
}

#[test]
fn a_program_signs_what_it_is_given() {
    use base64::Engine as _;
    let folder = tempfile::tempdir().unwrap();
    let key = make_key_file(&folder.path().join("key")).unwrap();
    let envelope = revocation(key.verify_key());
    let signature = key.sign(&envelope.signed_bytes(MeshId([1; 32])));
    let signature = base64::engine::general_purpose::STANDARD.encode(signature);
    let program = answering(folder.path(), &key.verify_key(), &signature);
    let signer = Signer::open(&format!("exec:{program} --with arguments")).unwrap();
    let signed = signer.sign(MeshId([1; 32]), envelope.clone()).unwrap();
    signed.verify(MeshId([1; 32]), &[key.verify_key()], 1).unwrap();
    assert!(signer.sign(MeshId([2; 32]), envelope).is_err(), "the same signature is not one for another mesh");
}

#[test]
fn a_wrong_signature_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let key = make_key_file(&folder.path().join("key")).unwrap().verify_key();
    let wrong = format!("{}==", "A".repeat(86));
    let signer = Signer::open(&format!("exec:{}", answering(folder.path(), &key, &wrong))).unwrap();
    assert!(matches!(signer.sign(MeshId([1; 32]), revocation(key)), Err(SignerError::Signature(_))));
}
