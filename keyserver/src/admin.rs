//! The operators' Unix socket: JSON lines, this user only.

mod issuer;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_protocol::admin::{
    AdminError, AdminErrorCode, AdminReply, AdminRequest, KeyserverStatus, LONGEST_WAIT, TransportRotation,
};
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::id::{Name, NodeId};
use mesh_protocol::line::{self, LineBuffer};
use mesh_protocol::offline::InFile as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, info, warn};

use crate::directory::{ClusterRequest, Restored, RevocationTicket, RotationProgress, TokenRequest};
use crate::writer::{Operator, Stopped, Writer};

/// Operators at once. Each may hold one line of 1 MiB.
const MAX_CLIENTS: usize = 32;
/// A client that says nothing for so long is closed.
const IDLE: Duration = Duration::from_secs(60);
/// A client takes an answer within this.
const WRITE_WITHIN: Duration = Duration::from_secs(10);

/// What the process knows and the directory does not.
#[derive(Debug)]
pub(crate) struct About {
    /// Addresses it listens on.
    pub(crate) listen: Vec<SocketAddr>,
    /// When it started.
    pub(crate) started: std::time::Instant,
}

/// Opens the socket, mode 0600. One that a dead keyserver left is replaced; one that answers is not.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another keyserver answers there"));
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is no socket is there")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // The process's umask, set before there are threads, keeps others out until the mode is set.
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves operators until cancelled.
pub(crate) async fn run(listener: UnixListener, writer: Writer, about: Arc<About>) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (writer, about) = (Operator::new(writer.clone(), actor(&stream)), about.clone());
                tokio::spawn(async move {
                    if let Err(error) = serve(stream, &writer, &about).await {
                        debug!(%error, "operator's connection over");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                warn!(%error, "operator's connection not accepted");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Who is at the other end, by the kernel's word: for the audit log.
fn actor(stream: &UnixStream) -> String {
    let Ok(peer) = stream.peer_cred() else { return "somebody at the admin socket".to_owned() };
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(peer.uid())).ok().flatten();
    let name = user.map(|user| format!(" ({})", user.name)).unwrap_or_default();
    let pid = peer.pid().map(|pid| format!(" pid {pid}")).unwrap_or_default();
    format!("uid {}{name}{pid}", peer.uid())
}

async fn serve(mut stream: UnixStream, writer: &Operator, about: &About) -> io::Result<()> {
    let mut lines = LineBuffer::default();
    let mut chunk = [0; 4096];
    loop {
        let read = timeout(IDLE, stream.read(&mut chunk)).await??;
        if read == 0 {
            return Ok(());
        }
        lines.push(&chunk[..read]);
        loop {
            match lines.next_line() {
                Ok(Some(text)) => answer(&mut stream, writer, about, &text).await?,
                Ok(None) => break,
                Err(error) => return send(&mut stream, &bad_request(error.to_string())).await,
            }
        }
    }
}

fn bad_request(message: String) -> AdminReply {
    AdminReply::Error(AdminError { code: AdminErrorCode::BadRequest, message })
}

async fn send(stream: &mut UnixStream, reply: &AdminReply) -> io::Result<()> {
    let bytes = line::encode(reply).or_else(|error| line::encode(&bad_request(error.to_string())));
    let bytes = bytes.map_err(io::Error::other)?;
    timeout(WRITE_WITHIN, stream.write_all(&bytes)).await?
}

async fn answer(stream: &mut UnixStream, writer: &Operator, about: &About, text: &[u8]) -> io::Result<()> {
    let request: AdminRequest = match line::decode(text) {
        Ok(request) => request,
        Err(error) => return send(stream, &bad_request(error.to_string())).await,
    };
    let (words, changes) = words(&request);
    if changes {
        info!(request = %words, "operator asks");
    } else {
        debug!(request = %words, "operator asks");
    }
    let stopped = |stopped: Stopped| io::Error::other(stopped);
    match request {
        AdminRequest::NodeRevoke { node, reason, void_tokens, wait, signed } => {
            let revoked = writer.call(move |directory| {
                (directory.revoke(&node, &reason, void_tokens, signed.as_deref()), directory.progress())
            });
            match revoked.await.map_err(stopped)? {
                (Ok(ticket), progress) => {
                    let name = ticket.name.clone();
                    let reply = |seen: &Confirmations| AdminReply::Revocation {
                        node: name.clone(),
                        online: seen.online,
                        confirmed: seen.confirmed,
                        waiting: seen.waiting.clone(),
                        offline: seen.offline.clone(),
                        millis: seen.millis,
                        done: seen.done,
                    };
                    follow_confirmations(stream, writer, ticket, progress, wait_of(wait), reply).await
                }
                (Err(refusal), _) => send(stream, &failed(refusal)).await,
            }
        }
        AdminRequest::Rotate { order, wait } if !order.dry_run => {
            let job = writer.call(move |directory| directory.order_rotation(&order)).await.map_err(stopped)?;
            match job {
                Ok(job) => follow_rotation(stream, writer, job, wait_of(wait)).await,
                Err(refusal) => send(stream, &failed(refusal)).await,
            }
        }
        AdminRequest::TransportRotate { next, wait } => {
            let announced = writer.call(move |directory| {
                let ticket = directory.announce_transport(next);
                (ticket, directory.progress(), directory.status().policy_version)
            });
            match announced.await.map_err(stopped)? {
                (Ok(ticket), progress, policy_version) => {
                    let reply = |seen: &Confirmations| {
                        AdminReply::TransportRotation(TransportRotation {
                            policy_version,
                            online: seen.online,
                            confirmed: seen.confirmed,
                            waiting: seen.waiting.clone(),
                            offline: seen.offline.clone(),
                            done: seen.done,
                        })
                    };
                    follow_confirmations(stream, writer, ticket, progress, wait_of(wait), reply).await
                }
                (Err(refusal), ..) => send(stream, &failed(refusal)).await,
            }
        }
        AdminRequest::IssuerRotate { stolen, wait } => issuer::rotate(stream, writer, stolen, wait_of(wait)).await,
        AdminRequest::IssuerFinish { leave_absent, wait } => {
            issuer::finish(stream, writer, leave_absent, wait_of(wait)).await
        }
        AdminRequest::RotationFollow { job, wait } => follow_rotation(stream, writer, job, wait_of(wait)).await,
        AdminRequest::AuditExport { from } => export_audit(stream, writer, from).await,
        request => {
            let reply = one_answer(writer, about, request).await.map_err(stopped)?;
            send(stream, &reply.unwrap_or_else(failed)).await
        }
    }
}

/// For the log: the kind of request, without what it carries, and whether it changes anything. Programs that watch ask
/// all the time.
fn words(request: &AdminRequest) -> (&'static str, bool) {
    match request {
        AdminRequest::Status => ("status", false),
        AdminRequest::ClusterList => ("cluster list", false),
        AdminRequest::TokenList => ("token list", false),
        AdminRequest::NodeList => ("node list", false),
        AdminRequest::ClusterAdd { .. } => ("cluster add", true),
        AdminRequest::MeshFile => ("mesh file", false),
        AdminRequest::RevocationDraft { .. } => ("revocation draft", false),
        AdminRequest::SetPostQuantum { .. } => ("set post-quantum", true),
        AdminRequest::GrantsPending => ("grants pending", false),
        AdminRequest::PolicyImport { .. } => ("policy import", true),
        AdminRequest::GrantsImport { .. } => ("grants import", true),
        AdminRequest::GrantReject { .. } => ("grant reject", true),
        AdminRequest::TokenCreate { .. } => ("token create", true),
        AdminRequest::TokenRevoke { .. } => ("token revoke", true),
        AdminRequest::AuditExport { .. } => ("audit export", false),
        AdminRequest::NodeRestore { .. } => ("node restore", true),
        AdminRequest::NodeRevoke { .. } => ("node revoke", true),
        AdminRequest::Rotate { order, .. } => ("rotate", !order.dry_run),
        AdminRequest::RotationFollow { .. } => ("rotation follow", false),
        AdminRequest::TransportRotate { .. } => ("transport rotate", true),
        AdminRequest::IssuerRotate { .. } => ("issuer rotate", true),
        AdminRequest::IssuerFinish { .. } => ("issuer finish", true),
        AdminRequest::RotationList => ("rotation list", false),
        AdminRequest::RotationChange { .. } => ("rotation change", true),
    }
}

async fn one_answer(
    writer: &Operator,
    about: &About,
    request: AdminRequest,
) -> Result<Result<AdminReply, Refusal>, Stopped> {
    Ok(match request {
        AdminRequest::Status => Ok(status(writer, about).await?),
        AdminRequest::ClusterAdd { cluster, pod_cidrs, node_prefix, node_prefix6 } => {
            let request = ClusterRequest { cluster, pod_cidrs, node_prefix, node_prefix6 };
            let added = writer.call(move |directory| directory.add_cluster(request)).await?;
            added.map(|cluster| AdminReply::Clusters { clusters: vec![cluster] })
        }
        AdminRequest::ClusterList => {
            Ok(AdminReply::Clusters { clusters: writer.call(|directory| directory.list_clusters()).await? })
        }
        AdminRequest::TokenCreate { cluster, uses, ttl, cidrs, tags } => {
            let request = TokenRequest { cluster, uses, ttl, cidrs, tags };
            let made = writer.call(move |directory| directory.create_token(request)).await?;
            made.map(|(line, token)| AdminReply::Token { line: line.to_string(), token })
        }
        AdminRequest::TokenList => {
            let tokens = writer.call(|directory| directory.list_tokens()).await?;
            tokens.map(|tokens| AdminReply::Tokens { tokens })
        }
        AdminRequest::TokenRevoke { token } => {
            let voided = writer.call(move |directory| directory.revoke_token(&token)).await?;
            voided.map(|token| AdminReply::Tokens { tokens: vec![token] })
        }
        AdminRequest::RevocationDraft { node, reason, revoker } => {
            let file = writer.call(move |directory| directory.draft_revocation(&node, &reason, revoker)).await?;
            file.map(|file| AdminReply::RevocationDraft { file })
        }
        AdminRequest::MeshFile => {
            Ok(AdminReply::Mesh { file: writer.call(|directory| directory.mesh_file().to_text()).await? })
        }
        AdminRequest::PolicyImport { proposal, drop_nodes } => {
            writer.call(move |directory| directory.import_policy(&proposal, drop_nodes)).await?
        }
        AdminRequest::SetPostQuantum { pq, clusters } => {
            let set = writer.call(move |directory| directory.set_post_quantum(pq, &clusters)).await?;
            set.map(AdminReply::PostQuantum)
        }
        AdminRequest::GrantsPending => {
            let pending = writer.call(|directory| directory.pending_grants()).await?;
            pending.map(|(pending, file)| AdminReply::GrantsPending { pending, file })
        }
        AdminRequest::GrantsImport { grants } => {
            let imported = writer.call(move |directory| directory.import_grants(&grants)).await?;
            imported.map(|grants| AdminReply::GrantsImported { grants })
        }
        AdminRequest::GrantReject { node } => {
            let rejected = writer.call(move |directory| directory.reject_grant(&node)).await?;
            rejected.map(|status| AdminReply::GrantsPending { pending: vec![status], file: String::new() })
        }
        AdminRequest::NodeList => {
            Ok(AdminReply::Nodes { nodes: writer.call(|directory| directory.list_nodes()).await? })
        }
        AdminRequest::NodeRestore { node } => {
            let restored = writer.call(move |directory| directory.restore(&node)).await?;
            restored.map(|restored| match restored {
                Restored::Granted(node) => AdminReply::Nodes { nodes: vec![node] },
                Restored::Pending(waits) => AdminReply::GrantsPending { pending: vec![waits], file: String::new() },
            })
        }
        AdminRequest::Rotate { order, .. } => {
            let plan = writer.call(move |directory| directory.plan_rotation(&order)).await?;
            plan.map(|nodes| AdminReply::RotationPlan { nodes })
        }
        AdminRequest::RotationList => {
            let (jobs, nodes) = writer.call(|directory| directory.list_rotations()).await?;
            Ok(AdminReply::Rotations { jobs, nodes })
        }
        AdminRequest::RotationChange { job, change } => {
            let changed = writer.call(move |directory| directory.change_rotation(job, change)).await?;
            changed.map(|jobs| AdminReply::Rotations { jobs, nodes: Vec::new() })
        }
        AdminRequest::NodeRevoke { .. }
        | AdminRequest::RotationFollow { .. }
        | AdminRequest::TransportRotate { .. }
        | AdminRequest::IssuerRotate { .. }
        | AdminRequest::IssuerFinish { .. }
        | AdminRequest::AuditExport { .. } => Ok(bad_request("has more than one answer".to_owned())),
    })
}

async fn status(writer: &Operator, about: &About) -> Result<AdminReply, Stopped> {
    let status = writer.call(|directory| directory.status()).await?;
    Ok(AdminReply::Status(Box::new(KeyserverStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        mesh: status.mesh,
        mesh_id: status.mesh_id,
        trust: status.trust.to_owned(),
        revokes: status.revokes,
        pending: status.pending,
        issuers: status.issuers,
        policy_version: status.policy_version,
        position: status.position,
        listen: about.listen.clone(),
        nodes: status.nodes,
        connected: status.connected,
        uptime: about.started.elapsed().as_secs(),
        alarms: status.alarms,
    })))
}

fn failed(refusal: Refusal) -> AdminReply {
    let code = match refusal.code {
        RefusalCode::Token => AdminErrorCode::NotFound,
        RefusalCode::Taken => AdminErrorCode::Conflict,
        RefusalCode::Unavailable | RefusalCode::Exhausted | RefusalCode::Busy => AdminErrorCode::Unavailable,
        RefusalCode::BadMessage | RefusalCode::OutOfScope | RefusalCode::Revoked | RefusalCode::Record => {
            AdminErrorCode::BadRequest
        }
    };
    AdminReply::Error(AdminError { code, message: refusal.message })
}

fn wait_of(millis: u64) -> Duration {
    Duration::from_millis(millis).min(LONGEST_WAIT)
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// The log up to where it ends now, page by page: others are served in between.
async fn export_audit(stream: &mut UnixStream, writer: &Operator, from: u64) -> io::Result<()> {
    let head = writer.call(|directory| directory.audit_head()).await.map_err(io::Error::other)?;
    let (mut next, until) = (from.max(1), head.number);
    loop {
        let page = writer.call(move |directory| directory.audit_page(next, until)).await.map_err(io::Error::other)?;
        let lines = match page {
            Ok(lines) => lines,
            Err(refusal) => return send(stream, &failed(refusal)).await,
        };
        next += lines.len() as u64;
        let done = lines.is_empty() || next > until;
        send(stream, &AdminReply::Audit { lines, head: head.clone(), done }).await?;
        if done {
            return Ok(());
        }
    }
}

/// How far a change is that every node has to have in force.
struct Confirmations {
    online: u32,
    confirmed: u32,
    waiting: Vec<Name>,
    offline: Vec<Name>,
    millis: u64,
    done: bool,
}

async fn follow_confirmations(
    stream: &mut UnixStream,
    writer: &Operator,
    ticket: RevocationTicket,
    mut progress: tokio::sync::watch::Receiver<u64>,
    wait: Duration,
    reply: impl Fn(&Confirmations) -> AdminReply,
) -> io::Result<()> {
    let started = Instant::now();
    let RevocationTicket { position, online, mut offline, .. } = ticket;
    let mut left: BTreeMap<NodeId, Name> = online.clone();
    let mut confirmed = 0;
    let mut shown = None;
    loop {
        progress.mark_unchanged();
        let nodes: Vec<NodeId> = left.keys().copied().collect();
        let now = writer.call(move |directory| directory.confirmed(nodes.iter(), position));
        let (done, waiting) = now.await.map_err(io::Error::other)?;
        confirmed += u32::try_from(done.len()).unwrap_or(u32::MAX);
        for (node, gone) in std::mem::take(&mut left) {
            if waiting.contains(&node) {
                left.insert(node, gone);
            } else if !done.contains(&node) {
                offline.push(gone);
            }
        }
        let over = left.is_empty() || started.elapsed() >= wait;
        if over || shown != Some(confirmed) {
            shown = Some(confirmed);
            let seen = Confirmations {
                online: u32::try_from(online.len()).unwrap_or(u32::MAX),
                confirmed,
                waiting: left.values().cloned().collect(),
                offline: offline.clone(),
                millis: millis(started),
                done: over,
            };
            send(stream, &reply(&seen)).await?;
        }
        if over {
            return Ok(());
        }
        // Over, or something happened: the loop looks.
        let _ = timeout_at(started + wait, progress.changed()).await;
    }
}

async fn follow_rotation(stream: &mut UnixStream, writer: &Operator, job: u64, wait: Duration) -> io::Result<()> {
    let started = Instant::now();
    let mut progress = writer.call(|directory| directory.progress()).await.map_err(io::Error::other)?;
    let mut shown = None;
    loop {
        progress.mark_unchanged();
        let now = writer.call(move |directory| directory.rotation_progress(job)).await.map_err(io::Error::other)?;
        let now = match now {
            Ok(now) => now,
            Err(refusal) => return send(stream, &failed(refusal)).await,
        };
        let over = now.done || started.elapsed() >= wait;
        if over || shown.as_ref() != Some(&now) {
            shown = Some(now.clone());
            let RotationProgress { job, wave, waves, total, promoted, confirmed, failed, offline, .. } = now;
            let millis = millis(started);
            let reply = AdminReply::Rotation {
                job,
                wave,
                waves,
                total,
                promoted,
                confirmed,
                failed,
                offline,
                millis,
                done: over,
            };
            send(stream, &reply).await?;
        }
        if over {
            return Ok(());
        }
        // Over, or something happened: the loop looks.
        let _ = timeout_at(started + wait, progress.changed()).await;
    }
}
