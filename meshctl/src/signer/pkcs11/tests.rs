#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use cryptoki::object::KeyType;

use super::*;
use crate::signer::Signer;

/// Where Debian and others install SoftHSM (package softhsm2).
const MODULES: [&str; 4] = [
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/softhsm/libsofthsm.so",
];

#[test]
fn uris_say_which_key_and_nothing_that_is_not_understood() {
    let uri =
        Uri::parse("pkcs11:token=my%20mesh;object=issuer?module-path=/lib/x.so&pin-source=file:/etc/pin").unwrap();
    assert_eq!((uri.token.as_deref(), uri.object.as_str()), (Some("my mesh"), "issuer"));
    assert_eq!((uri.module.as_path(), uri.pin_file.as_deref()), (Path::new("/lib/x.so"), Some(Path::new("/etc/pin"))));
    for bad in [
        "pkcs11:",
        "pkcs11:object=a",
        "pkcs11:token=t?module-path=/x",
        "pkcs11:object=a;slot-id=3?module-path=/x",
        "pkcs11:object=%zz?module-path=/x",
        "pkcs11:object=%a?module-path=/x",
        "pkcs11:object?module-path=/x",
    ] {
        assert!(Uri::parse(bad).is_err(), "{bad}");
    }
    let missing = Signer::open("pkcs11:object=a?module-path=/nonexistent.so").map(|signer| signer.public());
    assert!(missing.unwrap_err().to_string().contains("cannot load"));
}

#[test]
fn a_key_in_softhsm_signs() {
    let Some(module) = MODULES.into_iter().find(|path| Path::new(path).exists()) else {
        eprintln!("SKIPPED a_key_in_softhsm_signs: SoftHSM is not installed (package softhsm2)");
        return;
    };
    // The module reads its configuration from the environment, which a test must not change for others: this test runs
    // itself again, alone.
    if std::env::var_os("SOFTHSM2_CONF").is_none() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = folder.path().join("tokens");
        fs::create_dir(&tokens).unwrap();
        let config = folder.path().join("softhsm2.conf");
        fs::write(&config, format!("directories.tokendir = {}\nobjectstore.backend = file\n", tokens.display()))
            .unwrap();
        let alone = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "signer::pkcs11::tests::a_key_in_softhsm_signs", "--nocapture"])
            .env("SOFTHSM2_CONF", &config)
            .env(PIN_VARIABLE, "1234")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&alone.stderr).into_owned();
        assert!(alone.status.success() && !text.contains("panicked"), "{text}");
        return;
    }
    make_key(module);
    let spec = format!("pkcs11:token=mesh;object=issuer?module-path={module}");
    let signer = Signer::open(&spec).unwrap();
    let envelope = mesh_protocol::envelope::Envelope::unsigned(&mesh_protocol::record::Revocation {
        number: 1,
        previous: None,
        node: signer.public().node_id(),
        up_to_generation: 1,
        reason: String::new(),
        time: 1,
    });
    let mesh = mesh_protocol::id::MeshId([1; 32]);
    let signed = signer.sign(mesh, envelope).unwrap();
    signed.verify(mesh, &[signer.public()], 1).unwrap();
    drop(signer);
    assert!(Signer::open(&spec.replace("object=issuer", "object=other")).is_err());
}

/// Makes a token and a key in it, as an operator does once.
fn make_key(module: &str) {
    let module = Pkcs11::new(module).unwrap();
    module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)).unwrap();
    let slot = module.get_slots_with_token().unwrap()[0];
    let pin = AuthPin::new("1234".into());
    module.init_token(slot, &pin, "mesh").unwrap();
    let slot = module.get_slots_with_initialized_token().unwrap()[0];
    let session = module.open_rw_session(slot).unwrap();
    session.login(UserType::So, Some(&pin)).unwrap();
    session.init_pin(&pin).unwrap();
    session.logout().unwrap();
    session.login(UserType::User, Some(&pin)).unwrap();
    // PrintableString "edwards25519" (RFC 8032, PKCS#11 3.0, section 2.3.10).
    let curve = [&[0x13, 0x0c][..], b"edwards25519"].concat();
    let public = [
        Attribute::Token(true),
        Attribute::KeyType(KeyType::EC_EDWARDS),
        Attribute::EcParams(curve),
        Attribute::Verify(true),
        Attribute::Label(b"issuer".to_vec()),
    ];
    let private =
        [Attribute::Token(true), Attribute::Private(true), Attribute::Sign(true), Attribute::Label(b"issuer".to_vec())];
    session.generate_key_pair(&Mechanism::EccEdwardsKeyPairGen, &public, &private).unwrap();
}
