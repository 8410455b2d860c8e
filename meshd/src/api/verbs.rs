//! What each request does.

use std::io;
use std::time::Duration;

use mesh_protocol::local::{Attachment, Lease, LocalError, LocalErrorCode, LocalReply, LocalRequest};
use tokio::time::timeout;
use tracing::info;

use super::connection::{Answers, Replies, error};
use super::{identity, path, ping, rotation, status};
use crate::app::Node;
use crate::shutdown::Reason;

/// How long a new lease may take to be let through the filter.
const FILTERING: Duration = Duration::from_secs(10);
/// Longest id of a container, as runtimes make them, with room.
const MAX_CONTAINER: usize = 256;
/// Longest interface name inside a pod (IFNAMSIZ).
const MAX_INTERFACE: usize = 15;
/// Longest name of a pod: two names of Kubernetes and a slash.
const MAX_POD: usize = 512;

/// The request's name, for logs.
pub(super) fn name(request: &LocalRequest) -> &'static str {
    match request {
        LocalRequest::Status => "status",
        LocalRequest::Peers => "peers",
        LocalRequest::Routes => "routes",
        LocalRequest::Path { .. } => "path",
        LocalRequest::Audit => "audit",
        LocalRequest::Ping { .. } => "ping",
        LocalRequest::Rotate { .. } => "rotate",
        LocalRequest::RotateIdentity => "rotate-identity",
        LocalRequest::Attach { .. } => "attach",
        LocalRequest::Detach { .. } => "detach",
        LocalRequest::Check { .. } => "check",
        LocalRequest::AttachStatus => "attach-status",
        LocalRequest::Collect { .. } => "collect",
        LocalRequest::Down => "down",
    }
}

impl Answers for Node {
    async fn answer(&self, request: LocalRequest, replies: &mut Replies) -> io::Result<()> {
        // Held until the last reply is out: stopping waits for it.
        let Ok(_busy) = self.requests.acquire().await else {
            return replies.send(&error(LocalErrorCode::NotReady, "meshd is stopping: try again".into())).await;
        };
        let reply = match request {
            LocalRequest::Ping { target, count, v6 } => return ping::run(self, &target, count, v6, replies).await,
            LocalRequest::Rotate { force } => return rotation::run(self, force, replies).await,
            LocalRequest::RotateIdentity => return identity::run(self, replies).await,
            request => answer(request, self).await,
        };
        replies.send(&reply).await
    }
}

/// The one reply to a request that has no progress to tell.
async fn answer(request: LocalRequest, node: &Node) -> LocalReply {
    match request {
        LocalRequest::Status => LocalReply::Status(Box::new(status::status(node).await)),
        LocalRequest::Peers => LocalReply::Peers { peers: status::peers(node).await },
        LocalRequest::Routes => LocalReply::Routes { routes: status::routes(node) },
        LocalRequest::Path { target } => reply(path::report(node, &target).await, LocalReply::Path),
        LocalRequest::Audit => reply(status::audit(node), |reply| reply),
        LocalRequest::Attach { attachment, pod } => reply(attach(node, attachment, pod).await, LocalReply::Lease),
        LocalRequest::Detach { attachment } => reply(detach(node, attachment).await, |()| LocalReply::Done),
        LocalRequest::Check { attachment } => reply(check(node, attachment).await, LocalReply::Lease),
        LocalRequest::AttachStatus => reply(attach_status(node).await, |()| LocalReply::Done),
        LocalRequest::Collect { valid } => {
            let collected = node.pods.collect(valid.into_iter().collect()).await;
            reply(collected, |count| LocalReply::Released { count })
        }
        LocalRequest::Down => down(node).await,
        // With progress: answered by the caller.
        LocalRequest::Ping { .. } | LocalRequest::Rotate { .. } | LocalRequest::RotateIdentity => {
            error(LocalErrorCode::Internal, "this request tells progress".into())
        }
    }
}

fn reply<T>(result: Result<T, LocalError>, done: impl FnOnce(T) -> LocalReply) -> LocalReply {
    result.map_or_else(LocalReply::Error, done)
}

fn check_attachment(attachment: &Attachment, pod: Option<&str>) -> Result<(), LocalError> {
    let printable = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
    let fine = |text: &str, most: usize| !text.is_empty() && text.len() <= most && printable(text);
    if fine(&attachment.container, MAX_CONTAINER)
        && fine(&attachment.interface, MAX_INTERFACE)
        && pod.is_none_or(|pod| fine(pod, MAX_POD))
    {
        return Ok(());
    }
    Err(LocalError {
        code: LocalErrorCode::BadRequest,
        message: format!(
            "container, interface and pod must be printable, at most {MAX_CONTAINER}, {MAX_INTERFACE} and {MAX_POD} bytes"
        ),
    })
}

/// A lease, once the filter lets the pod send.
async fn attach(node: &Node, attachment: Attachment, pod: Option<String>) -> Result<Lease, LocalError> {
    check_attachment(&attachment, pod.as_deref())?;
    let lease = node.pods.attach(attachment, pod).await?;
    let mut applied = node.applied_pods.clone();
    let is_in = |leases: &std::sync::Arc<Vec<Lease>>| {
        leases.iter().any(|other| other.attachment == lease.attachment && other.addresses == lease.addresses)
    };
    let waited = timeout(FILTERING, applied.wait_for(is_in)).await;
    match waited {
        Ok(Ok(_)) => {}
        _ => {
            return Err(LocalError {
                code: LocalErrorCode::NotReady,
                message: "the host's network does not take the new pod yet: see meshctl status, and try again".into(),
            });
        }
    }
    info!(container = lease.attachment.container, pod = lease.pod.as_deref(), addresses = ?lease.addresses, "pod attached");
    Ok(lease)
}

async fn detach(node: &Node, attachment: Attachment) -> Result<(), LocalError> {
    let container = attachment.container.clone();
    node.pods.detach(attachment).await?;
    info!(container, "pod detached");
    Ok(())
}

async fn check(node: &Node, attachment: Attachment) -> Result<Lease, LocalError> {
    let unknown = format!("container {} has no lease for {}", attachment.container, attachment.interface);
    let found = node.pods.check(attachment).await?;
    found.ok_or(LocalError { code: LocalErrorCode::UnknownPod, message: unknown })
}

async fn attach_status(node: &Node) -> Result<(), LocalError> {
    let waiting = node.ready.waiting_for();
    if !waiting.is_empty() {
        let message = format!("not ready, waiting for: {}", waiting.join(", "));
        return Err(LocalError { code: LocalErrorCode::NotReady, message });
    }
    node.pods.room().await
}

/// Clears the host before it answers, and stops after.
async fn down(node: &Node) -> LocalReply {
    info!("down: removing everything of the mesh from this host's network");
    let refused = match node.host.down().await {
        Ok(refused) => refused,
        Err(error) => vec![error.to_string()],
    };
    node.shutdown.begin(Reason::Down);
    if refused.is_empty() {
        return LocalReply::Done;
    }
    error(LocalErrorCode::Internal, format!("removed what could be, but: {}", refused.join("; ")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn odd_attachments_are_refused() {
        let who =
            |container: &str, interface: &str| Attachment { container: container.into(), interface: interface.into() };
        check_attachment(&who("0123abc", "eth0"), Some("ns/pod")).unwrap();
        for (attachment, pod) in [
            (who("", "eth0"), None),
            (who("a", ""), None),
            (who("a", "sixteen-letters-"), None),
            (who(&"a".repeat(257), "eth0"), None),
            (who("a\nb", "eth0"), None),
            (who("a", "eth0"), Some("")),
            (who("a", "eth0"), Some("a b")),
        ] {
            let error = check_attachment(&attachment, pod).unwrap_err();
            assert_eq!(error.code, LocalErrorCode::BadRequest, "{attachment:?} {pod:?}");
        }
    }
}
