#![allow(clippy::unwrap_used, reason = "tests")]

use rustls::{ClientConnection, HandshakeKind, NamedGroup, ProtocolVersion, ServerConnection};

use super::*;
use crate::control::{ALPN_JOIN, ALPN_NODE};
use crate::token::EXPORTER_LABEL;

fn key(seed: u8) -> SigningKey {
    SigningKey::from_seed([seed; 32])
}

/// Carries records between the two in memory until both are still.
fn handshake(client: ClientConfig, server: ServerConfig) -> Result<(ClientConnection, ServerConnection), Error> {
    let name = ServerName::try_from("mesh.invalid").unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name)?;
    let mut server = ServerConnection::new(Arc::new(server))?;
    while client.wants_write() || server.wants_write() {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut wire = wire.as_slice();
        while !wire.is_empty() {
            server.read_tls(&mut wire).unwrap();
            server.process_new_packets()?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut wire = wire.as_slice();
        while !wire.is_empty() {
            client.read_tls(&mut wire).unwrap();
            client.process_new_packets()?;
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok((client, server))
}

fn known() -> ServerKeys {
    ServerKeys::OneOf(vec![key(8).verify_key(), key(2).verify_key()])
}

#[test]
fn both_sides_know_each_other_and_share_an_exporter() {
    let server = server(&key(2), &[ALPN_JOIN, ALPN_NODE]).unwrap();
    let (client, server) = handshake(client(&key(1), known(), ALPN_NODE).unwrap(), server).unwrap();
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(client.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
    assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
    assert_eq!(server.alpn_protocol(), Some(ALPN_NODE));
    assert_eq!(peer_key(&client.peer_certificates().unwrap()[0]).unwrap(), key(2).verify_key());
    assert_eq!(peer_key(&server.peer_certificates().unwrap()[0]).unwrap(), key(1).verify_key());
    let export = |keys: Result<[u8; 32], Error>| keys.unwrap();
    let ours = export(client.export_keying_material([0; 32], EXPORTER_LABEL, None));
    assert_eq!(ours, export(server.export_keying_material([0; 32], EXPORTER_LABEL, None)));
    assert_ne!(ours, [0; 32]);
}

#[test]
fn exporters_of_two_connections_differ() {
    let export = || {
        let server = server(&key(2), &[ALPN_JOIN]).unwrap();
        let (client, _) = handshake(client(&key(1), ServerKeys::Any, ALPN_JOIN).unwrap(), server).unwrap();
        client.export_keying_material([0; 32], EXPORTER_LABEL, None).unwrap()
    };
    assert_ne!(export(), export());
}

#[test]
fn a_server_key_that_is_not_pinned_is_refused() {
    let server = server(&key(3), &[ALPN_NODE]).unwrap();
    let error = handshake(client(&key(1), known(), ALPN_NODE).unwrap(), server).unwrap_err();
    assert_eq!(error, Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
}

#[test]
fn another_alpn_is_refused() {
    let server = server(&key(2), &[ALPN_NODE]).unwrap();
    let error = handshake(client(&key(1), known(), b"h2").unwrap(), server).unwrap_err();
    assert_eq!(error, Error::NoApplicationProtocol);
}

#[test]
fn a_classical_group_is_refused_by_either_side() {
    let classical = || {
        let provider = CryptoProvider { kx_groups: vec![aws_lc_rs::kx_group::X25519], ..provider() };
        Arc::new(provider)
    };
    let verifier = KnownServer { servers: known(), algorithms: provider().signature_verification_algorithms };
    let weak_client = ClientConfig::builder_with_provider(classical())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(certified(&key(1)).unwrap())));
    let server_config = server(&key(2), &[ALPN_NODE]).unwrap();
    assert!(matches!(handshake(weak_client, server_config), Err(Error::PeerIncompatible(_))));

    let verifier = AnyClient { algorithms: provider().signature_verification_algorithms };
    let weak_server = ServerConfig::builder_with_provider(classical())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(certified(&key(2)).unwrap())));
    assert!(matches!(
        handshake(client(&key(1), known(), ALPN_NODE).unwrap(), weak_server),
        Err(Error::PeerIncompatible(_))
    ));
}

#[test]
fn a_client_without_a_raw_key_is_refused() {
    let verifier = KnownServer { servers: known(), algorithms: provider().signature_verification_algorithms };
    let anonymous = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    handshake(anonymous, server(&key(2), &[ALPN_NODE]).unwrap()).unwrap_err();
}

/// A ClientHello as TLS 1.2 has it: no supported_versions, ECDHE with X25519.
#[test]
fn tls_1_2_is_refused() {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
    let extensions = [0, 10, 0, 4, 0, 2, 0, 0x1d, 0, 13, 0, 4, 0, 2, 4, 3];
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let handshake = [&[1, 0, 0, body.len() as u8][..], &body].concat();
    let record = [&[22, 3, 1, 0, handshake.len() as u8][..], &handshake].concat();
    let mut server = ServerConnection::new(Arc::new(server(&key(2), &[ALPN_NODE]).unwrap())).unwrap();
    server.read_tls(&mut record.as_slice()).unwrap();
    let error = server.process_new_packets().unwrap_err();
    assert!(matches!(error, Error::PeerIncompatible(_)), "{error:?}");
}

#[test]
fn peer_keys_are_exactly_ed25519() {
    let spki = [SPKI_PREFIX.as_slice(), key(1).verify_key().as_bytes()].concat();
    assert_eq!(peer_key(&CertificateDer::from(spki.clone())).unwrap(), key(1).verify_key());
    let mut weak = spki.clone();
    weak[12..].fill(0);
    let longer = [spki.as_slice(), &[0]].concat();
    for bad in [&spki[..43], &longer, &weak, &[]] {
        peer_key(&CertificateDer::from(bad.to_vec())).unwrap_err();
    }
}
