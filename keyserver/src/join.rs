//! One enrolment: the node shows that it holds a token, the keyserver offers the policies, the node asks once, the
//! keyserver answers. Who shows no token hears nothing of the mesh.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_protocol::control::{JoinReply, JoinRequest, Refusal, RefusalCode};
use mesh_protocol::id::TokenId;
use tokio::io::AsyncWriteExt as _;
use tracing::debug;

use crate::directory::{Enrolment, JoinAttempt, ShowError, Shown, refusal};
use crate::listen::{Connection, source};
use crate::throttle::Throttle;
use crate::wire::{self, Arrived, WireError};
use crate::writer::Writer;

/// From the handshake to the token.
const SHOW_WITHIN: Duration = Duration::from_secs(5);
/// From the offer to the request: the node only has to verify a few signatures.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);

/// Serves one joining connection to its end.
pub(crate) async fn serve(writer: &Writer, throttle: &Mutex<Throttle>, mut connection: Connection) {
    let peer = connection.peer;
    let result = match enrol(writer, throttle, &mut connection).await {
        Ok(reply) => wire::send(&mut connection.writer, &reply).await,
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        debug!(%peer, %error, "enrolment broken off");
    }
    // The stream's end tells the node that nothing follows; it may be gone already.
    let _ = connection.writer.shutdown().await;
}

async fn enrol(
    writer: &Writer,
    throttle: &Mutex<Throttle>,
    connection: &mut Connection,
) -> Result<JoinReply, WireError> {
    let stopped = |_| std::io::Error::from(std::io::ErrorKind::ConnectionAborted);
    let (token, signature, limits) = match wire::read(&mut connection.reader, SHOW_WITHIN).await? {
        Arrived::Message(JoinRequest::Show { token, signature, limits }) => (token, signature, limits),
        Arrived::Message(JoinRequest::Enrol { .. }) => return Ok(out_of_order("a token has to be shown first")),
        Arrived::Unknown(number) => return Ok(out_of_order(&format!("message {number} is not known"))),
    };
    let place = Place { throttle, source: source(connection.peer.ip()), token };
    if !place.is_free() {
        return Ok(refused(refusal(RefusalCode::Busy, "too many failed attempts from this address")));
    }
    let Connection { peer, identity, exporter, .. } = *connection;
    let shown = Shown { peer, identity, exporter, token, signature, limits };
    let limits = shown.limits.clone();
    let offer = match writer.call(move |directory| directory.show(&shown)).await.map_err(stopped)? {
        Ok(offer) => offer,
        Err(error) => {
            if matches!(error, ShowError::Stranger) {
                place.count_failure();
            }
            return Ok(refused(error.into_refusal()));
        }
    };
    for frame in offer.iter() {
        wire::write(&mut connection.writer, frame).await?;
    }
    let (claim, signature) = match wire::read(&mut connection.reader, REQUEST_WITHIN).await? {
        Arrived::Message(JoinRequest::Enrol { claim, signature }) if claim.token == token => (claim, signature),
        Arrived::Message(_) => return Ok(out_of_order("the token shown has to be the one of the request")),
        Arrived::Unknown(number) => return Ok(out_of_order(&format!("message {number} is not known"))),
    };
    let attempt = JoinAttempt { peer, identity, exporter, claim, signature, limits };
    Ok(match writer.call(move |directory| directory.enrol(&attempt)).await.map_err(stopped)? {
        Ok(Enrolment::Granted { grant, checkpoint }) => JoinReply::Granted { grant, checkpoint },
        Ok(Enrolment::Pending { until }) => JoinReply::Pending { until },
        Err(refusal) => refused(refusal),
    })
}

/// Where a failure is counted.
struct Place<'a> {
    throttle: &'a Mutex<Throttle>,
    source: IpAddr,
    token: TokenId,
}

impl Place<'_> {
    fn is_free(&self) -> bool {
        self.lock().allows(self.source, self.token, Instant::now())
    }

    fn count_failure(&self) {
        self.lock().failed(self.source, self.token, Instant::now());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Throttle> {
        // Each change is whole, whoever panicked.
        self.throttle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refused(refusal: Refusal) -> JoinReply {
    JoinReply::Refused { refusal }
}

fn out_of_order(message: &str) -> JoinReply {
    refused(refusal(RefusalCode::BadMessage, message))
}
