//! `keyserver keys rotate issuer`: the key that grants is replaced, without a node that has to join anew.

use std::io::{self, Write as _};
use std::time::Duration;

use anyhow::{Context as _, bail};
use mesh_protocol::admin::{AdminReply, AdminRequest, IssuerProgress};
use mesh_protocol::id::Name;

use crate::ask;
use crate::config::Config;

/// What an operator wants.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Order {
    pub(crate) stolen: bool,
    pub(crate) finish: bool,
    pub(crate) leave_absent: bool,
    pub(crate) wait: Duration,
    pub(crate) json: bool,
}

/// Has the running keyserver do it, and says how far it is.
pub(crate) fn rotate(config: &Config, order: Order) -> anyhow::Result<()> {
    let wait = u64::try_from(order.wait.as_millis()).unwrap_or(u64::MAX);
    let request = match order.finish {
        true => AdminRequest::IssuerFinish { leave_absent: order.leave_absent, wait },
        false => AdminRequest::IssuerRotate { stolen: order.stolen, wait },
    };
    let context = if order.finish { "take the former issuer out of the policy" } else { "replace the issuer's key" };
    let told = match ask::last_answer(&config.admin_socket, &request, order.wait).context(context)? {
        AdminReply::Issuer(told) => told,
        _ => bail!("the keyserver answered another question"),
    };
    let mut out = io::stdout();
    if order.json {
        writeln!(out, "{}", serde_json::to_string(&told)?)?;
    } else {
        print(&mut out, &told, order)?;
    }
    if !told.is_through() {
        let (count, wait) = (told.waiting.len() + told.ungranted.len(), humantime::format_duration(order.wait));
        bail!("{count} nodes are not through within {wait}; it goes on by itself: run this again");
    }
    Ok(())
}

fn print(out: &mut impl io::Write, told: &IssuerProgress, order: Order) -> io::Result<()> {
    let issuer = told.issuer.id().short();
    if told.former.is_empty() {
        writeln!(out, "trust policy {}: issuer {issuer}, and no key that it had before", told.policy_version)?;
        return list(out, "hold a grant of an earlier key and get another when they connect", &told.absent);
    }
    for former in &told.former {
        let stands = if former.generation == 0 { "nothing of it stands" } else { "its grants stand until replaced" };
        writeln!(
            out,
            "trust policy {}: issuer {issuer} in place of {}; {stands}",
            told.policy_version,
            former.key.id().short()
        )?;
    }
    writeln!(out, "{} of {} nodes hold a grant of the new key", told.holding, told.total)?;
    if told.voided_tokens > 0 {
        writeln!(out, "{} join tokens are void: make new ones with 'meshctl token create'", told.voided_tokens)?;
    }
    list(out, "to be granted anew", &told.ungranted)?;
    list(out, "connected, not through yet", &told.waiting)?;
    list(out, "not connected, get their grant when they come", &told.absent)?;
    if order.stolen {
        writeln!(out, "\nLook at 'meshctl node list': revoke every node that you do not know")?;
    }
    let absent = if told.absent.is_empty() { "" } else { " --leave-absent, or once they are back without it" };
    writeln!(out, "\nNext: keyserver keys rotate issuer --finish{absent}")
}

fn list(out: &mut impl io::Write, what: &str, names: &[Name]) -> io::Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    writeln!(out, "{what}: {}", names.join(", "))
}
