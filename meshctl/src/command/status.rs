//! `meshctl status`: this node, when meshd's socket is there, and the keyserver, when its admin socket is there.

use mesh_protocol::admin::{AdminReply, AdminRequest, IssuerProgress, KeyserverStatus};
use mesh_protocol::local::{DeviceStatus, IdentityPhase, IdentityStatus, LocalReply, LocalRequest, Status};
use serde::Serialize;

use super::Context;
use crate::client::{ClientError, Service};
use crate::output::{self, Table};

const HELP: &str = "\
Examples:
  meshctl status
  meshctl status --json

JSON: {\"node\": null or meshd's state, \"keyserver\": null or the keyserver's state}";

/// Show the state of this node, and of the keyserver on this machine
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct Args {}

#[derive(Serialize)]
struct Both {
    node: Option<Box<Status>>,
    keyserver: Option<Box<KeyserverStatus>>,
}

pub(crate) fn run(_: &Args, context: &Context) -> anyhow::Result<()> {
    let node = context.ask_node(&LocalRequest::Status).and_then(|reply| match reply {
        LocalReply::Status(status) => Ok(status),
        _ => Err(ClientError::Unexpected { service: Service::Node }),
    });
    let keyserver = context.ask_keyserver(&AdminRequest::Status).and_then(|reply| match reply {
        AdminReply::Status(status) => Ok(status),
        _ => Err(ClientError::Unexpected { service: Service::Keyserver }),
    });
    match (node, keyserver) {
        (Err(node @ ClientError::NoSocket { .. }), Err(ClientError::NoSocket { path, .. })) => {
            output::note(&format!("no keyserver at {} either", path.display()));
            Err(node.into())
        }
        (Err(node @ ClientError::NoSocket { .. }), Err(keyserver)) => {
            output::note(&format!("meshctl: {node}"));
            Err(keyserver.into())
        }
        (Err(node), Err(keyserver)) => {
            if !is_absent(&keyserver) {
                output::note(&format!("meshctl: {keyserver}"));
            }
            Err(node.into())
        }
        (node, keyserver) => show_what_answered(node, keyserver, context),
    }
}

/// At least one answered. The other's failure counts unless it is simply not on this machine, or not for this user.
fn show_what_answered(
    node: Result<Box<Status>, ClientError>,
    keyserver: Result<Box<KeyserverStatus>, ClientError>,
    context: &Context,
) -> anyhow::Result<()> {
    let (node, node_error) = split(node);
    let (keyserver, keyserver_error) = split(keyserver);
    let both = Both { node, keyserver };
    context.show(&both, || {
        let mut parts = Vec::new();
        parts.extend(both.node.as_deref().map(node_text));
        parts.extend(both.keyserver.as_deref().map(keyserver_text));
        parts.join("\n")
    })?;
    match node_error.or(keyserver_error) {
        Some(error @ ClientError::NotPermitted { .. }) => {
            output::note(&format!("meshctl: {error}"));
            Ok(())
        }
        Some(error) if !is_absent(&error) => Err(error.into()),
        _ => Ok(()),
    }
}

fn split<T>(result: Result<T, ClientError>) -> (Option<T>, Option<ClientError>) {
    match result {
        Ok(value) => (Some(value), None),
        Err(error) => (None, Some(error)),
    }
}

fn is_absent(error: &ClientError) -> bool {
    matches!(error, ClientError::NoSocket { .. })
}

fn node_text(status: &Status) -> String {
    let mut table = Table::fields();
    let waiting = || format!("no, waiting for {}", output::list(&status.waiting_for));
    table.field("mesh", format!("{} ({})", status.mesh, status.mesh_id.short()));
    table.field("cluster", &status.cluster);
    table.field("ready", if status.ready { "yes".to_owned() } else { waiting() });
    table.field("addresses", output::list(&status.addresses));
    table.field("pod CIDRs", output::list(&status.pod_cidrs));
    table.field("pods", status.pods);
    table.field(
        "peers",
        format!("{} of {} up, {} post-quantum", status.peers_up, status.peers_known, status.peers_post_quantum),
    );
    table.field("keyserver", control_text(status));
    table.field("checkpoint", checkpoint_text(status));
    table.field("keys", keys_text(status));
    if let Some(identity) = &status.identity {
        table.field("identity", identity_text(identity));
    }
    let device = &status.device;
    let mut lanes = output::plural(device.lanes as usize, "lane", "lanes");
    if let Some(reason) = &device.fewer_lanes {
        lanes.push_str(&format!(" (fewer than configured: {reason})"));
    }
    table.field(
        "device",
        format!("{} ({}), {lanes}, UDP {}, MTU {}", device.name, device.mode, device.port, device.mtu),
    );
    table.field("offloads", offloads_text(device));
    if let Some(buffers) = buffers_text(device) {
        table.field("buffers", buffers);
    }
    table.field("policy", format!("version {}", status.policy_version));
    table.field("version", format!("{}, up {}", status.version, output::seconds(status.uptime)));
    if !status.dropped.is_empty() {
        let reasons: Vec<_> = status.dropped.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        table.field("dropped", output::list(&reasons));
    }
    for alarm in &status.alarms {
        let (age, name) = (output::seconds(alarm.age), &alarm.name);
        table.field("ALARM", format!("{name}: {} (since {age})", alarm.message));
    }
    format!("node {} ({})\n{}", status.name, status.node.short(), table.render())
}

fn control_text(status: &Status) -> String {
    let control = &status.control;
    let address = control.keyserver.as_deref().unwrap_or("none known");
    let stale = if control.stale {
        ", STALE: it shows less than this node has seen, or two worlds: see meshctl audit"
    } else {
        ""
    };
    if control.connected {
        format!("{address}, connected by {}{stale}", control.transport.as_deref().unwrap_or("?"))
    } else {
        format!("{address}, not connected: {}{stale}", control.error.as_deref().unwrap_or("not tried yet"))
    }
}

fn checkpoint_text(status: &Status) -> String {
    let control = &status.control;
    let age = control.checkpoint_age.map_or_else(|| "none".to_owned(), |age| format!("{} old", output::seconds(age)));
    let position = control.position.map(|at| format!(", revision {}", at.revision)).unwrap_or_default();
    let (bound, left) = (output::seconds(control.exposure), output::seconds(control.exposure_left));
    format!("{age}{position}; without a newer one tunnels close after {bound} of running time, in {left}")
}

fn keys_text(status: &Status) -> String {
    let keys = &status.keys;
    let previous = keys.previous.map(|epoch| format!(", previous {epoch} still answers")).unwrap_or_default();
    let published = if keys.published { "" } else { ", NOT PUBLISHED yet" };
    let age = output::seconds(keys.current_age);
    let next = keys.rotates_in.map(|left| format!(", rotates in {}", output::seconds(left))).unwrap_or_default();
    let sealed = if keys.sealed { ", sealed on disk" } else { "" };
    format!("epoch {} since {age}{previous}, spare {}{next}{published}{sealed}", keys.current, keys.spare)
}

/// The identity key, and how far the next one is.
fn identity_text(identity: &IdentityStatus) -> String {
    let next = identity.next.map(|next| format!(", {} follows", next.short())).unwrap_or_default();
    let phase = match identity.phase {
        IdentityPhase::Settled => String::new(),
        IdentityPhase::Asking => ": no keyserver has answered yet".to_owned(),
        IdentityPhase::Waiting => ": its issuer has to sign, see meshctl grant".to_owned(),
        IdentityPhase::Refused => format!(": REFUSED: {}", identity.error.as_deref().unwrap_or("no reason was given")),
        IdentityPhase::Publishing => ", NOT PUBLISHED yet: the one before is kept".to_owned(),
    };
    format!("key {}{next}{phase}", identity.key.short())
}

/// Which offloads are on, and why the others are not.
fn offloads_text(device: &DeviceStatus) -> String {
    let on: Vec<&str> =
        device.offloads.iter().filter(|offload| offload.on).map(|offload| offload.name.as_str()).collect();
    let mut text = if on.is_empty() { "none".to_owned() } else { output::list(&on) };
    for offload in device.offloads.iter().filter(|offload| !offload.on) {
        text.push_str(&format!("; {} off: {}", offload.name, offload.reason.as_deref().unwrap_or("unknown")));
    }
    if let Some(reason) = &device.offloads_untried {
        text.push_str(&format!("; not tried on this kernel: {reason}"));
    }
    text
}

/// Buffers of the sockets: asked for, and the least that any lane got.
fn buffers_text(device: &DeviceStatus) -> Option<String> {
    let asked = device.sockets.iter().map(|socket| socket.asked_buffer).max()?;
    let receive = device.sockets.iter().map(|socket| socket.receive_buffer).min()?;
    let send = device.sockets.iter().map(|socket| socket.send_buffer).min()?;
    let less = if receive < asked || send < asked { ", LESS than asked: see docs/operating.md" } else { "" };
    let [asked, receive, send] = [asked, receive, send].map(output::bytes);
    Some(format!("{receive} to receive, {send} to send, of {asked} asked{less}"))
}

fn keyserver_text(status: &KeyserverStatus) -> String {
    let mut table = Table::fields();
    let trust = match status.trust.as_str() {
        "easy-with-root" => "easy, with the root key on this machine: who takes it owns the mesh",
        "easy" => "easy: who takes this machine can add nodes",
        "strict" if status.revokes => {
            "strict: who takes this machine can withhold news and cut nodes off, nothing more"
        }
        "strict" => "strict: who takes this machine can withhold news, nothing more",
        other => other,
    };
    let Position { epoch, revision } = Position::of(status);
    table.field("mesh", format!("{} ({})", status.mesh, status.mesh_id));
    table.field("trust", trust);
    table.field("nodes", format!("{} of {} connected", status.connected, status.nodes));
    if status.pending > 0 {
        table.field(
            "waiting",
            format!("{}: see meshctl grant list-pending", output::plural(status.pending as usize, "node", "nodes")),
        );
    }
    table.field("directory", format!("revision {revision} of history {epoch}"));
    table.field("policy", format!("version {}", status.policy_version));
    for issuer in &status.issuers {
        table.field("issuer", issuer_text(issuer));
    }
    table.field("listens on", output::list(&status.listen));
    table.field("version", format!("{}, up {}", status.version, output::seconds(status.uptime)));
    for alarm in &status.alarms {
        table.field("ALARM", alarm);
    }
    format!("keyserver\n{}", table.render())
}

/// How far an issuer's nodes are with the key that took the place of another.
fn issuer_text(issuer: &IssuerProgress) -> String {
    let former: Vec<String> = issuer.former.iter().map(|former| former.key.id().short()).collect();
    let mut text = format!(
        "{} in place of {}: {} of {} hold its grant",
        issuer.issuer.id().short(),
        output::list(&former),
        issuer.holding,
        output::plural(issuer.total as usize, "node", "nodes")
    );
    let lists =
        [("not granted anew", &issuer.ungranted), ("not through", &issuer.waiting), ("not connected", &issuer.absent)];
    for (what, names) in lists.into_iter().filter(|(_, names)| !names.is_empty()) {
        text.push_str(&format!("; {what}: {}", output::list(names)));
    }
    text
}

/// A position with its history shortened: the number is random and long.
struct Position {
    epoch: String,
    revision: u64,
}

impl Position {
    fn of(status: &KeyserverStatus) -> Self {
        let epoch = format!("{:016x}", status.position.epoch);
        Self { epoch: epoch[..8].to_owned(), revision: status.position.revision }
    }
}
