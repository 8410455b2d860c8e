//! A node that waits for an issuer to sign its grant: what it asked for lies on disk, so that nobody has to type the token
//! again, and it asks from time to time.

use std::io;
use std::time::Duration;

use ipnet::IpNet;
use mesh_protocol::cbor;
use mesh_protocol::id::Name;
use mesh_protocol::token::JoinToken;
use minicbor::{Decode, Encode};
use sd_notify::NotifyState;
use tracing::{debug, info};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::{Asked, JoinError, Wish, ask_all};
use crate::control::ControlSetup;
use crate::control::enrol::Enrolled;
use crate::identity::Newcomer;
use crate::state_dir::{StateDir, StateError};

/// What the node asked for, with its token: a secret.
const WAITING: &str = "waiting";
const LABEL: &str = "mesh waiting 1";
const LIMIT: u64 = 64 * 1024;
const FIX: &str = "remove the file, and run meshd join with the token again";

/// First pause between two requests, and the longest: an issuer signs by hand, so nobody notices the difference.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// What systemd is told that it takes at least, each time.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Encode, Decode, Zeroize, ZeroizeOnDrop)]
#[cbor(map)]
struct OnDisk {
    #[n(0)]
    token: String,
    #[n(1)]
    #[zeroize(skip)]
    name: Name,
    #[cbor(n(2), with = "mesh_protocol::cbor::nets")]
    #[zeroize(skip)]
    pod_cidrs: Vec<IpNet>,
    #[n(3)]
    until: u64,
}

/// For people.
pub(super) fn words(name: &Name, until: u64) -> String {
    let until = humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + Duration::from_secs(until));
    format!("{name} waits for its grant, which the mesh's issuer has to sign (meshctl grant) until {until}")
}

/// Keeps what was asked for.
pub(super) fn store(state: &StateDir, wish: &Wish, until: u64) -> Result<(), StateError> {
    let (token, name, pod_cidrs) = (wish.token.to_line().to_string(), wish.name.clone(), wish.pod_cidrs.clone());
    let file = OnDisk { token, name, pod_cidrs, until };
    let bytes = zeroize::Zeroizing::new(cbor::to_vec(&file));
    state.write(WAITING, LABEL, &bytes)
}

/// What was asked for, if this node waits.
pub(super) fn load(state: &StateDir) -> Result<Option<(Wish, u64)>, StateError> {
    let Some(bytes) = state.read(WAITING, LABEL, LIMIT, FIX)? else { return Ok(None) };
    let damaged = |reason: String| state.damaged(WAITING, reason, FIX);
    let file: OnDisk = cbor::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    let token: JoinToken =
        file.token.parse().map_err(|error: mesh_protocol::token::TokenError| damaged(error.to_string()))?;
    Ok(Some((Wish { token, name: file.name.clone(), pod_cidrs: file.pod_cidrs.clone() }, file.until)))
}

/// The waiting is over.
pub(super) fn forget(state: &StateDir) {
    match std::fs::remove_file(state.path_of(WAITING)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => debug!(%error, "old request not removed"),
        _ => {}
    }
}

/// Asks until a keyserver grants, or one refuses for good. A keyserver that does not answer changes nothing.
pub(super) async fn until_granted(
    state: &StateDir,
    wish: &Wish,
    newcomer: &Newcomer,
    setup: &ControlSetup,
) -> Result<(String, Box<Enrolled>), JoinError> {
    let mut pause = FIRST_PAUSE;
    loop {
        tell_systemd(&wish.name);
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
        match ask_all(wish, newcomer, setup).await {
            Ok(Asked::Granted(keyserver, enrolled)) => {
                info!(node = %wish.name, "granted");
                return Ok((keyserver, enrolled));
            }
            Ok(Asked::Pending { until }) => debug!(until, "not signed yet"),
            Err(refused @ JoinError::Refused(_)) => {
                forget(state);
                return Err(refused);
            }
            Err(error) => debug!(%error, "no answer, asking again"),
        }
    }
}

/// It has its own limit for how long a start may take.
fn tell_systemd(name: &Name) {
    let micros = u32::try_from(PATIENCE.as_micros()).unwrap_or(u32::MAX);
    let status = format!("{name} waits for its grant");
    let told = sd_notify::notify(&[NotifyState::ExtendTimeoutUsec(micros), NotifyState::Status(&status)]);
    if let Err(error) = told {
        debug!(%error, "systemd not told");
    }
}
