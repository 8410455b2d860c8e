//! Lines to requests.

use std::{
    net::{IpAddr, SocketAddr, SocketAddrV6},
    str::FromStr,
};

use ipnet::IpNet;
use mesh_dataplane::{PresharedKey, PublicKey, SecretKey};
use zeroize::Zeroizing;

use super::{AllowedIp, DeviceChange, PeerChange, Request, UapiError};

/// Longest line, without its end. The longest of use has 80 bytes, a key in hex.
pub const MAX_LINE: usize = 512;

/// Reads one operation after another. Memory grows with what an operator configures and by nothing else.
#[derive(Debug, Default)]
pub struct Parser(State);

#[derive(Debug, Default)]
enum State {
    /// Between two operations.
    #[default]
    Idle,
    Get,
    Set(Box<DeviceChange>),
    /// An error was reported: nothing more is expected before the empty line.
    Skipping,
}

impl Parser {
    /// Takes the next line, without its end. `None` while an operation goes on; after an error the rest of the operation is
    /// passed over.
    ///
    /// # Errors
    ///
    /// [`UapiError::Protocol`] and [`UapiError::Invalid`], once for each operation.
    pub fn line(&mut self, line: &[u8]) -> Result<Option<Request>, UapiError> {
        let parsed = self.parse(line);
        if parsed.is_err() {
            self.0 = if line.is_empty() { State::Idle } else { State::Skipping };
        }
        parsed
    }

    fn parse(&mut self, line: &[u8]) -> Result<Option<Request>, UapiError> {
        if line.is_empty() {
            return Ok(match std::mem::take(&mut self.0) {
                State::Get => Some(Request::Get),
                State::Set(change) => Some(Request::Set(*change)),
                State::Idle | State::Skipping => None,
            });
        }
        match &mut self.0 {
            State::Skipping => {}
            _ if line.len() > MAX_LINE => return Err(UapiError::Protocol),
            State::Get => return Err(UapiError::Invalid),
            State::Idle => match line {
                b"get=1" => self.0 = State::Get,
                b"set=1" => self.0 = State::Set(Box::default()),
                _ => return Err(UapiError::Protocol),
            },
            State::Set(change) => {
                let text = str::from_utf8(line).map_err(|_| UapiError::Protocol)?;
                let (key, value) = text.split_once('=').ok_or(UapiError::Protocol)?;
                match change.peers.last_mut() {
                    // From the first peer on, all keys are a peer's.
                    Some(peer) if key != "public_key" => set_peer(peer, key, value)?,
                    _ => set_device(change, key, value)?,
                }
            }
        }
        Ok(None)
    }
}

fn set_device(change: &mut DeviceChange, key: &str, value: &str) -> Result<(), UapiError> {
    match key {
        "private_key" => change.private_key = Some(secret(value)?.map(|bytes| SecretKey::new(*bytes))),
        "listen_port" => change.listen_port = Some(number(value)?),
        "fwmark" => change.fwmark = Some(number(value)?),
        "replace_peers" => change.replace_peers = is_true(value)?,
        "public_key" => change.peers.push(PeerChange::new(public_key(value)?)),
        _ => return Err(UapiError::Invalid),
    }
    Ok(())
}

fn set_peer(peer: &mut PeerChange, key: &str, value: &str) -> Result<(), UapiError> {
    match key {
        "remove" => peer.remove = is_true(value)?,
        "update_only" => peer.update_only = is_true(value)?,
        "preshared_key" => peer.preshared_key = Some(secret(value)?.map(|bytes| PresharedKey::new(*bytes))),
        "endpoint" => peer.endpoint = Some(endpoint(value)?),
        "persistent_keepalive_interval" => peer.keepalive = Some(number(value)?),
        "replace_allowed_ips" => peer.replace_allowed_ips = is_true(value)?,
        "allowed_ip" => peer.allowed_ips.push(allowed_ip(value)?),
        "protocol_version" if value == "1" => {}
        _ => return Err(UapiError::Invalid),
    }
    Ok(())
}

fn is_true(value: &str) -> Result<bool, UapiError> {
    if value == "true" { Ok(true) } else { Err(UapiError::Invalid) }
}

/// A decimal number without sign.
fn number<T: FromStr>(value: &str) -> Result<T, UapiError> {
    if !value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(UapiError::Invalid);
    }
    value.parse().map_err(|_| UapiError::Invalid)
}

fn key_bytes(value: &str) -> Result<Zeroizing<[u8; 32]>, UapiError> {
    let mut bytes = Zeroizing::new([0; 32]);
    hex::decode_to_slice(value, &mut *bytes).map_err(|_| UapiError::Invalid)?;
    Ok(bytes)
}

fn public_key(value: &str) -> Result<PublicKey, UapiError> {
    key_bytes(value).map(|bytes| PublicKey::new(*bytes))
}

/// A secret of 32 bytes; nothing and zeros take it away.
fn secret(value: &str) -> Result<Option<Zeroizing<[u8; 32]>>, UapiError> {
    if value.is_empty() {
        return Ok(None);
    }
    key_bytes(value).map(|bytes| Some(bytes).filter(|bytes| **bytes != [0; 32]))
}

/// `192.0.2.1:51820`, `[2001:db8::1]:51820`, `[fe80::1%eth0]:51820`.
fn endpoint(value: &str) -> Result<SocketAddr, UapiError> {
    if let Ok(endpoint) = value.parse::<SocketAddr>() {
        return Ok(match endpoint {
            // What it is on the wire.
            SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
                Some(v4) => (v4, v6.port()).into(),
                None => endpoint,
            },
            SocketAddr::V4(_) => endpoint,
        });
    }
    // The name of a link in place of its number.
    let (address, port) = value.strip_prefix('[').and_then(|rest| rest.split_once("]:")).ok_or(UapiError::Invalid)?;
    let (address, link) = address.split_once('%').ok_or(UapiError::Invalid)?;
    let address = address.parse().map_err(|_| UapiError::Invalid)?;
    let scope = nix::net::if_::if_nametoindex(link).map_err(|_| UapiError::Invalid)?;
    Ok(SocketAddrV6::new(address, number(port)?, 0, scope).into())
}

/// `10.0.0.0/8`, `-10.0.0.0/8`; host bits are cleared, an address alone is a prefix of its full length.
fn allowed_ip(value: &str) -> Result<AllowedIp, UapiError> {
    let (remove, value) = match value.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let prefix = match value.split_once('/') {
        Some((address, len)) => {
            let address: IpAddr = address.parse().map_err(|_| UapiError::Invalid)?;
            IpNet::new(address, number(len)?).map_err(|_| UapiError::Invalid)?
        }
        None => value.parse::<IpAddr>().map_err(|_| UapiError::Invalid)?.into(),
    };
    Ok(AllowedIp { remove, prefix: prefix.trunc() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    /// All requests in `text`, and the errors.
    fn requests(text: &[u8]) -> Vec<Result<Request, UapiError>> {
        let mut parser = Parser::default();
        text.split(|byte| *byte == b'\n').filter_map(|line| parser.line(line).transpose()).collect()
    }

    fn hex() -> impl Strategy<Value = String> {
        any::<[u8; 32]>().prop_map(hex::encode)
    }

    fn line() -> impl Strategy<Value = String> {
        prop_oneof![
            3 => Just(String::new()),
            3 => prop_oneof![Just("set=1".to_owned()), Just("get=1".to_owned())],
            4 => hex().prop_map(|key| format!("public_key={key}")),
            1 => hex().prop_map(|key| format!("private_key={key}")),
            1 => hex().prop_map(|key| format!("preshared_key={key}")),
            2 => (any::<std::net::IpAddr>(), 0..140u8).prop_map(|(ip, len)| format!("allowed_ip={ip}/{len}")),
            1 => any::<SocketAddr>().prop_map(|to| format!("endpoint={to}")),
            1 => any::<u32>().prop_map(|port| format!("listen_port={port}")),
            2 => prop_oneof![Just("remove=true"), Just("update_only=true"), Just("replace_allowed_ips=true")]
                .prop_map(str::to_owned),
            1 => "[a-z_]{0,30}=?.{0,100}",
        ]
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(text in proptest::collection::vec(any::<u8>(), 0..2000)) {
            requests(&text);
        }

        /// Each operation has one answer: as many as there are empty lines at most, and one more that is cut short.
        #[test]
        fn each_operation_has_one_answer(lines in proptest::collection::vec(line(), 0..60)) {
            let text = lines.join("\n");
            let ends = lines.iter().filter(|line| line.is_empty()).count();
            prop_assert!(requests(text.as_bytes()).len() <= ends + 1);
        }

        /// Whatever came before, after an empty line the next operation is read as if it were the first.
        #[test]
        fn nothing_leaks_into_the_next_operation(lines in proptest::collection::vec(line(), 0..30), key in hex()) {
            let next = format!("set=1\npublic_key={key}\nremove=true\n\n");
            let after = format!("{}\n\n{next}", lines.join("\n"));
            prop_assert_eq!(requests(after.as_bytes()).pop(), requests(next.as_bytes()).pop());
        }

        #[test]
        fn endpoints_and_prefixes_mean_what_they_say(to in any::<SocketAddr>(), ip in any::<IpAddr>(), len in 0..=32u8) {
            let key = "01".repeat(32);
            let text = format!("set=1\npublic_key={key}\nendpoint={to}\nallowed_ip={ip}/{len}\nallowed_ip=-{ip}\n\n");
            let Some(Ok(Request::Set(change))) = requests(text.as_bytes()).pop() else { panic!("{text}") };
            let peer = &change.peers[0];
            prop_assert_eq!(peer.endpoint.map(|to| (to.ip().to_canonical(), to.port())), Some((to.ip().to_canonical(), to.port())));
            let prefix = IpNet::new(ip, len).unwrap().trunc();
            let whole = AllowedIp { remove: true, prefix: ip.into() };
            prop_assert_eq!(&peer.allowed_ips, &[AllowedIp { remove: false, prefix }, whole]);
        }
    }

    #[test]
    fn long_lines_are_errors_and_do_not_hang() {
        let text = format!("set=1\nlisten_port={}\nmore\n\nget=1\n\n", "1".repeat(MAX_LINE));
        assert_eq!(requests(text.as_bytes()), [Err(UapiError::Protocol), Ok(Request::Get)]);
    }

    #[test]
    fn nothing_and_zeros_take_a_secret_away() {
        for value in [String::new(), "00".repeat(32)] {
            let text = format!("set=1\nprivate_key={value}\npublic_key={}\npreshared_key={value}\n\n", "02".repeat(32));
            let Some(Ok(Request::Set(change))) = requests(text.as_bytes()).pop() else { panic!("{text}") };
            assert_eq!((change.private_key, change.peers[0].preshared_key.clone()), (Some(None), Some(None)));
        }
    }
}
