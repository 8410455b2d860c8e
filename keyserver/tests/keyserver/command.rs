//! The command line and the files it makes.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;

use mesh_protocol::admin::AdminErrorCode;

use crate::client::{Node, Transport};
use crate::server::{DEADLINE, Server, binary};

fn mode(path: &std::path::Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn init_makes_private_files_and_never_twice() {
    let server = Server::stopped();
    assert_eq!(mode(&server.dir()), 0o700);
    assert_eq!(mode(&server.dir().join("keys")), 0o700);
    for file in ["keys/root", "keys/issuer", "keys/revoker", "keys/transport", "store.redb", "keyserver.toml"] {
        assert_eq!(mode(&server.dir().join(file)), 0o600, "{file}");
    }
    let again = binary().args(["init", "--name", "x", "--address", "a:1", "--dir"]).arg(server.dir()).output().unwrap();
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("already"));
}

#[tokio::test]
async fn keys_are_sealed_where_systemd_hands_over_a_credential() {
    let mut server = Server::stopped();
    let credentials = server.folder.path().join("credentials");
    std::fs::create_dir(&credentials).unwrap();
    std::fs::write(credentials.join("mesh.seal"), [9; 32]).unwrap();
    let keys = ["root", "issuer", "revoker", "transport"].map(|name| server.dir().join("keys").join(name));
    let before = keys.each_ref().map(|path| std::fs::read(path).unwrap());
    server.credentials = Some(credentials);
    server.run();
    for (path, before) in keys.iter().zip(&before) {
        let now = std::fs::read(path).unwrap();
        assert!(now.starts_with(b"mesh sealed 1\n") && !now.windows(16).any(|window| *window == before[..16]));
        assert_eq!(mode(path), 0o600);
    }
    server.stop();
    // The same keys: a node that knows the transport key is served.
    server.run();
    server.add_cluster("east", &["10.1.0.0/16"]).unwrap();
    let token = server.token(1);
    Node::new("n1").join(server.address, &token).await.unwrap();
    server.stop();
    let out = server.command("run");
    assert_eq!(out.status.code(), Some(78));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.contains("is sealed: start by the unit, which hands over the credential mesh.seal"), "{text}");
}

#[test]
fn exit_codes_and_help_are_as_promised() {
    let code = |args: &[&str]| binary().args(args).output().unwrap().status.code();
    assert_eq!(code(&["init", "--name", "No Name", "--address", "a:1"]), Some(2));
    assert_eq!(code(&["init", "--name", "x", "--address", "nowhere"]), Some(2));
    assert_eq!(code(&["check-config", "/nonexistent"]), Some(78));
    assert_eq!(code(&["run", "--config", "/nonexistent"]), Some(78));
    for verb in ["init", "run", "check-config", "verify", "resume", "completion", "man"] {
        let help = binary().args([verb, "--help"]).output().unwrap();
        assert!(String::from_utf8_lossy(&help.stdout).contains("Example"), "{verb}");
    }
    assert_eq!(code(&["man"]), Some(0));
    assert_eq!(code(&["completion", "bash"]), Some(0));
}

#[test]
fn wrong_arguments_of_init_are_explained_and_make_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("ks");
    for (arguments, hint) in [
        (["--address", "keys.example.net", "--mesh-cidr", "100.96.0.0/16"], "as in keys.example.net:7443"),
        (["--address", "fd00::1", "--mesh-cidr", "100.96.0.0/16"], "[fd00::1]:7443"),
        (["--address", "a:7443", "--mesh-cidr", "fd00::/64"], "not an IPv4 network"),
        (["--address", "a:7443", "--mesh-cidr", "100.96.1.0/16"], "write 100.96.0.0/16"),
        (["--address", "a:7443", "--mesh-cidr", "100.96.0.0/31"], "between /8 and /30"),
        (["--address", "a:7443", "--mesh-cidr", "0.0.0.0/0"], "between /8 and /30"),
        (["--address", "a:7443", "--mesh-cidr", "169.254.0.0/24"], "overlaps 169.254.0.0/16"),
        (["--address", "100.96.0.5:7443", "--mesh-cidr", "100.96.0.0/16"], "lies inside --mesh-cidr 100.96.0.0/16"),
    ] {
        let out = binary().args(["init", "--name", "x"]).args(arguments).arg("--dir").arg(&dir).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{arguments:?}: {text}");
        assert!(text.contains(hint), "{arguments:?}: {text}");
        assert!(!dir.exists(), "{arguments:?}");
    }
    let v6 = ["init", "--name", "x", "--address", "[fd00::1]:7443", "--dir"];
    assert!(binary().args(v6).arg(&dir).output().unwrap().status.success());
    assert_eq!(binary().arg("check-config").arg(dir.join("keyserver.toml")).output().unwrap().status.code(), Some(0));
}

#[test]
fn missing_and_foreign_stores_say_what_to_do() {
    let (server, other) = (Server::stopped(), Server::stopped());
    let says = |hint: &str| {
        for verb in ["run", "verify"] {
            let out = server.command(verb);
            let text = String::from_utf8_lossy(&out.stderr).into_owned();
            assert_eq!(out.status.code(), Some(78), "{verb}: {text}");
            assert!(text.contains(hint), "{verb}: {text}");
        }
    };
    let store = server.dir().join("store.redb");
    std::fs::copy(other.dir().join("store.redb"), &store).unwrap();
    says("restore keys and store of the same mesh");
    std::fs::remove_file(&store).unwrap();
    says("restore a copy, then run 'keyserver resume'");
    assert!(!store.exists(), "nothing is made in its place");
    assert_eq!(server.command("resume").status.code(), Some(78));
    std::fs::remove_dir_all(server.dir().join("keys")).unwrap();
    says("make one with 'keyserver init'");
}

#[test]
fn a_file_in_the_place_of_the_admin_socket_is_left_alone() {
    let server = Server::stopped();
    std::fs::write(server.socket(), "precious").unwrap();
    let out = server.command("run");
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("no socket"), "{out:?}");
    assert_eq!(std::fs::read_to_string(server.socket()).unwrap(), "precious");
}

#[test]
fn asking_is_not_logged_and_changing_is() {
    let server = Server::start();
    let before = std::fs::read_to_string(server.log()).unwrap();
    server.status();
    server.nodes();
    server.tokens();
    assert_eq!(std::fs::read_to_string(server.log()).unwrap(), before);
    server.token(1);
    let log = std::fs::read_to_string(server.log()).unwrap();
    assert!(log[before.len()..].contains("token create"), "{log}");
}

#[test]
fn damaged_keys_and_stores_stop_the_start() {
    let server = Server::stopped();
    let key = server.dir().join("keys/transport");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let refused = server.command("run");
    assert_eq!(refused.status.code(), Some(78));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("chmod 600"));
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let store = server.dir().join("store.redb");
    let length = std::fs::metadata(&store).unwrap().len();
    std::fs::File::options().write(true).open(&store).unwrap().set_len(length / 2).unwrap();
    for verb in ["run", "verify"] {
        let refused = server.command(verb);
        assert_eq!(refused.status.code(), Some(1));
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(text.contains("damaged") && text.contains("keyserver resume"), "{text}");
    }
}

#[test]
fn the_admin_socket_is_private_and_survives_nonsense() {
    let mut server = Server::start();
    assert_eq!(mode(&server.socket()), 0o600);
    for nonsense in [b"\n".to_vec(), b"{}\n".to_vec(), vec![0; 4096], vec![b'['; 200_000], b"{\"request\":".to_vec()] {
        let mut stream = UnixStream::connect(server.socket()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let _ = stream.write_all(&[nonsense.as_slice(), b"\n"].concat());
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert!(answer.contains("bad-request"), "{answer:?}");
    }
    let mut endless = UnixStream::connect(server.socket()).unwrap();
    while endless.write_all(&[b'x'; 65536]).is_ok() {}
    assert_eq!(server.add_cluster("east", &["10.9.0.0/16"]).unwrap_err().code, AdminErrorCode::Conflict);
    let overlap = server.add_cluster("west", &["10.1.128.0/17"]).unwrap_err();
    assert_eq!(overlap.code, AdminErrorCode::Conflict);
    assert!(overlap.message.contains("cluster east"), "{overlap}");
    assert_eq!(server.token_with("nowhere", 1, 60, &[]).unwrap_err().code, AdminErrorCode::NotFound);
    assert_eq!(server.status().trust, "easy-with-root");
    assert_eq!(server.stop(), Some(0));
    assert!(!server.socket().exists());
    server.run();
    assert_eq!(server.status().policy_version, 2);
}

#[tokio::test]
async fn neither_token_nor_keys_are_in_the_log() {
    let mut server = Server::stopped();
    let text = std::fs::read_to_string(server.config()).unwrap();
    std::fs::write(server.config(), text + "\nlog_level = \"trace\"\n").unwrap();
    server.run();
    server.add_cluster("east", &["10.1.0.0/16"]).unwrap();
    let token = server.token(1);
    let mut node = Node::new("n1");
    node.join(server.address, &token).await.unwrap();
    node.open(server.address, None, Transport::Quic).await.unwrap();
    let log = std::fs::read_to_string(server.log()).unwrap();
    assert!(log.contains("node enrolled"));
    assert!(!log.contains(&*token.to_line()) && !log.contains(&hex::encode(*token.secret.seed())));
    for key in ["root", "issuer", "revoker", "transport"] {
        let seed = std::fs::read_to_string(server.dir().join("keys").join(key)).unwrap();
        assert!(!log.contains(seed.trim()), "{key}");
    }
}
