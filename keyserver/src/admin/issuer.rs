//! An issuer's other key, as an operator follows it.

use std::io;
use std::time::Duration;

use mesh_protocol::admin::{AdminReply, IssuerProgress};
use mesh_protocol::control::Refusal;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use super::{failed, send};
use crate::writer::Operator;

/// Gives the issuer another key, unless that is under way, and tells how far its nodes are.
pub(super) async fn rotate(stream: &mut UnixStream, writer: &Operator, stolen: bool, wait: Duration) -> io::Result<()> {
    let voided = writer.call(move |directory| directory.rotate_issuer(stolen)).await.map_err(io::Error::other)?;
    let followed = match voided {
        Ok(voided) => follow(stream, writer, voided, false, wait).await?,
        Err(refusal) => Err(refusal),
    };
    last(stream, followed).await
}

/// Waits for the nodes, then takes the former keys out of the policy.
pub(super) async fn finish(
    stream: &mut UnixStream,
    writer: &Operator,
    leave_absent: bool,
    wait: Duration,
) -> io::Result<()> {
    let followed = follow(stream, writer, 0, !leave_absent, wait).await?;
    let finished = writer.call(move |directory| {
        followed?;
        directory.finish_issuer(leave_absent)?;
        directory.issuer_progress()
    });
    let finished = finished.await.map_err(io::Error::other)?;
    last(stream, finished).await
}

async fn last(stream: &mut UnixStream, told: Result<IssuerProgress, Refusal>) -> io::Result<()> {
    let reply = told.map_or_else(failed, |told| AdminReply::Issuer(IssuerProgress { done: true, ..told }));
    send(stream, &reply).await
}

/// Tells progress until every connected node is through, with `absent` those that are not connected too, or the wait is over;
/// gives the last of it.
async fn follow(
    stream: &mut UnixStream,
    writer: &Operator,
    voided_tokens: u32,
    absent: bool,
    wait: Duration,
) -> io::Result<Result<IssuerProgress, Refusal>> {
    let started = Instant::now();
    let mut happened = writer.call(|directory| directory.progress()).await.map_err(io::Error::other)?;
    let mut shown = None;
    loop {
        happened.mark_unchanged();
        let now = writer.call(|directory| directory.issuer_progress()).await.map_err(io::Error::other)?;
        let now = match now {
            Ok(now) => IssuerProgress { voided_tokens, ..now },
            Err(refusal) => return Ok(Err(refusal)),
        };
        let through = now.is_through() && (!absent || now.absent.is_empty());
        if through || started.elapsed() >= wait {
            return Ok(Ok(now));
        }
        if shown.as_ref() != Some(&now) {
            send(stream, &AdminReply::Issuer(now.clone())).await?;
            shown = Some(now);
        }
        // Over, or something happened: the loop looks.
        let _ = timeout_at(started + wait, happened.changed()).await;
    }
}
