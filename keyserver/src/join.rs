//! One enrolment: the keyserver offers the policies, the node asks once, the keyserver answers.

use std::time::Duration;

use mesh_protocol::control::{JoinReply, JoinRequest, RefusalCode};
use tokio::io::AsyncWriteExt as _;
use tracing::debug;

use crate::directory::{JoinAttempt, refusal};
use crate::listen::Connection;
use crate::wire::{self, Arrived, WireError};
use crate::writer::Writer;

/// From the offer to the request: the node only has to verify a few signatures.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);

/// Serves one joining connection to its end.
pub(crate) async fn serve(writer: &Writer, mut connection: Connection) {
    let peer = connection.peer;
    if let Err(error) = enrol(writer, &mut connection).await {
        debug!(%peer, %error, "enrolment broken off");
    }
    // The stream's end tells the node that nothing follows; it may be gone already.
    let _ = connection.writer.shutdown().await;
}

async fn enrol(writer: &Writer, connection: &mut Connection) -> Result<(), WireError> {
    let stopped = |_| std::io::Error::from(std::io::ErrorKind::ConnectionAborted);
    for frame in writer.call(|directory| directory.offer()).await.map_err(stopped)?.iter() {
        wire::write(&mut connection.writer, frame).await?;
    }
    let reply = match wire::read(&mut connection.reader, REQUEST_WITHIN).await? {
        Arrived::Message(JoinRequest::Enrol { claim, signature }) => {
            let Connection { peer, identity, exporter, .. } = *connection;
            let attempt = JoinAttempt { peer, identity, exporter, claim, signature };
            let result = writer.call(move |directory| directory.enrol(&attempt)).await.map_err(stopped)?;
            match result {
                Ok(enrolled) => JoinReply::Granted { grant: enrolled.grant, checkpoint: enrolled.checkpoint },
                Err(refusal) => JoinReply::Refused { refusal },
            }
        }
        Arrived::Unknown(number) => {
            let message = format!("message {number} is not known to this keyserver");
            JoinReply::Refused { refusal: refusal(RefusalCode::BadMessage, message) }
        }
    };
    wire::send(&mut connection.writer, &reply).await
}
