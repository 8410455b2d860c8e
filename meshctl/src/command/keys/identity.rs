//! `meshctl keys rotate --identity`: this node takes another identity key.

use std::time::{Duration, Instant};

use anyhow::bail;
use mesh_protocol::id::KeyId;
use mesh_protocol::local::{IdentityPhase, LocalReply, LocalRequest};
use serde::Serialize;

use crate::client::{ClientError, Conversation};
use crate::command::{Context, unexpected};
use crate::output::{self, Progress};

#[derive(Debug, Serialize)]
struct IdentityRotation {
    scope: &'static str,
    from: KeyId,
    to: KeyId,
    phase: IdentityPhase,
    error: Option<String>,
    peers: u32,
    confirmed: u32,
    done: bool,
}

impl TryFrom<LocalReply> for IdentityRotation {
    type Error = anyhow::Error;

    fn try_from(reply: LocalReply) -> anyhow::Result<Self> {
        match reply {
            LocalReply::Identity { from, to, phase, error, peers, confirmed, done } => {
                Ok(Self { scope: "identity", from, to, phase, error, peers, confirmed, done })
            }
            other => Err(unexpected(other)),
        }
    }
}

impl IdentityRotation {
    fn text(&self) -> String {
        let (from, to) = (self.from.short(), self.to.short());
        let (confirmed, peers) = (self.confirmed, self.peers);
        match self.phase {
            IdentityPhase::Settled => format!(
                "identity key {to} is in use, {from} is wiped; {confirmed} of {peers} connected peers know this node by it"
            ),
            IdentityPhase::Publishing => {
                format!("identity key {to} is in use; {from} is wiped once a keyserver has what the new one signed")
            }
            IdentityPhase::Waiting => format!(
                "identity key {to} waits for its grant, which the mesh's issuer has to sign (meshctl grant); {from} stays \
                 in use until then"
            ),
            IdentityPhase::Asking => {
                format!("identity key {to} is on disk, no keyserver has answered; {from} is in use")
            }
            IdentityPhase::Refused => format!(
                "identity key {to} was refused: {}; {from} is in use, it is asked for again",
                output::visible(self.error.as_deref().unwrap_or("no reason was given"))
            ),
        }
    }

    /// A word for each phase, for the bar.
    fn stage(&self) -> &'static str {
        match self.phase {
            IdentityPhase::Asking => "asked for",
            IdentityPhase::Waiting => "waits for the issuer",
            IdentityPhase::Refused => "refused, asked for again",
            IdentityPhase::Publishing => "granted, in use",
            IdentityPhase::Settled => "peers know the new key",
        }
    }
}

/// Replaces the identity key and waits until peers know; where an issuer elsewhere has to sign, only if `wait` was given.
pub(super) fn rotate(wait: Option<Duration>, context: &Context) -> anyhow::Result<()> {
    let patience = wait.unwrap_or(super::DEFAULT_WAIT);
    let deadline = Instant::now() + patience;
    let mut conversation = Conversation::<LocalReply>::start(&context.socket, &LocalRequest::RotateIdentity)?;
    let mut progress = Progress::new(context.json);
    let mut newest: Option<IdentityRotation> = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let reply = match conversation.next(left) {
            Err(ClientError::Timeout { .. }) if newest.is_some() => break,
            reply => reply?,
        };
        let rotation = IdentityRotation::try_from(reply)?;
        progress.update(rotation.confirmed as usize, rotation.peers as usize, rotation.stage());
        let over = rotation.done || (rotation.phase == IdentityPhase::Waiting && wait.is_none());
        newest = Some(rotation);
        if over || deadline <= Instant::now() {
            break;
        }
    }
    drop(progress);
    let Some(rotation) = newest else {
        bail!("meshd said nothing about the identity key; look at its log");
    };
    context.show(&rotation, || rotation.text())?;
    if !rotation.done && (wait.is_some() || rotation.phase != IdentityPhase::Waiting) {
        let wait = humantime::format_duration(patience);
        bail!("not through within {wait}; it goes on by itself, see meshctl status");
    }
    Ok(())
}
