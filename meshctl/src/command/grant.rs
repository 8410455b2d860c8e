//! `meshctl grant`: grants whose issuer is not on the keyserver's machine.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use mesh_protocol::admin::{AdminReply, AdminRequest, PendingStatus};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::offline::{GrantReason, GrantRequest, GrantRequests, InFile as _, SignedGrants};
use mesh_protocol::trust::View;
use serde::Serialize;

use super::{Context, unexpected};
use crate::files::{self, Remembered, Signing};
use crate::output::{self, Table};
use crate::signer::Signer;

const HELP: &str = "\
On the keyserver: list-pending --out; where the issuer's key is: sign; on the keyserver: import. The nodes that wait get \
their grants then, without anybody touching them.

Examples:
  meshctl grant list-pending --out pending.txt
  meshctl grant sign pending.txt --signer issuer.key --out signed.txt
  meshctl grant import signed.txt";

const LIST_HELP: &str = "\
A node that asks to join waits here for seven days. Members whose grants come to their end, or whose issuer has another key, \
are in the list, too, and those that replace their identity key; 'regrant' is one that a stolen key granted to, 'restore' a revoked \
node that 'meshctl node restore' named.

Examples:
  meshctl grant list-pending
  meshctl grant list-pending --out pending.txt

JSON: {\"pending\": [{\"node\", \"name\", \"cluster\", \"issuer\", \"renewal\", \"regrant\", \"identity\", \"restoration\", \"prefixes\", \"serial\", \"until\"}], \
\"file\": text for 'grant sign'}";

const SIGN_HELP: &str = "\
Works without a network. Checked before anything is signed: the chain of trust policies from the mesh id, the token's \
signature by this issuer, the node's request by the token, that the grant is what was asked for and within the issuer's \
scope, and that its serial is above all that this key has signed (--memory).

Examples:
  meshctl grant sign pending.txt --signer issuer.key --out signed.txt
  meshctl grant sign pending.txt --signer exec:/usr/local/bin/mesh-sign --memory mesh.memory --only n1 --yes --out -

JSON: {\"signed\": [name], \"refused\": [{\"name\", \"error\"}], \"others\": grants for other issuers}
Exit status: 0 if every grant of this issuer that was asked for is signed";

const IMPORT_HELP: &str = "\
Examples:
  meshctl grant import signed.txt

JSON: {\"grants\": [{\"name\", \"error\": null or why it was refused}]}
Exit status: 0 if every grant is in force";

const REJECT_HELP: &str = "\
What was reserved for it is free again; the use of its token is not.

Examples:
  meshctl grant reject n1

JSON: {\"pending\": [the one that was rejected]}";

/// List, sign and import grants that wait for an issuer elsewhere
#[derive(Debug, clap::Subcommand)]
#[command(after_help = HELP)]
pub(crate) enum Verb {
    ListPending(ListPending),
    Sign(Sign),
    Import(Import),
    Reject(Reject),
}

/// List grants that wait for their issuer
#[derive(Debug, clap::Args)]
#[command(after_help = LIST_HELP)]
pub(crate) struct ListPending {
    /// Write the file for the issuer; - for standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Sign grants, where the issuer's key is
#[derive(Debug, clap::Args)]
#[command(after_help = SIGN_HELP)]
pub(crate) struct Sign {
    /// File of 'grant list-pending --out'; - for standard input
    file: PathBuf,
    /// The issuer's key signs.
    #[command(flatten)]
    signing: Signing,
    /// Only this node; repeat it for several
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Also nodes whose grant a stolen key signed: the thief may have made them up, so look at each
    #[arg(long)]
    regrant: bool,
    /// Also this revoked node, whose machine you know to be in good hands; repeat it for several
    #[arg(long, value_name = "NAME")]
    restore: Vec<String>,
}

/// Bring signed grants to the keyserver
#[derive(Debug, clap::Args)]
#[command(after_help = IMPORT_HELP)]
pub(crate) struct Import {
    /// File of 'grant sign'; - for standard input
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

/// Refuse a node that waits
#[derive(Debug, clap::Args)]
#[command(after_help = REJECT_HELP)]
pub(crate) struct Reject {
    /// Name, id, or the start of an id
    node: String,
}

pub(crate) fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    match verb {
        Verb::ListPending(args) => list(&args, context),
        Verb::Sign(args) => sign(&args, context),
        Verb::Import(args) => import(&args, context),
        Verb::Reject(args) => {
            let (pending, _) = pending(&AdminRequest::GrantReject { node: args.node }, context)?;
            context.show(&serde_json::json!({ "pending": pending }), || table(&pending))
        }
    }
}

fn pending(request: &AdminRequest, context: &Context) -> anyhow::Result<(Vec<PendingStatus>, String)> {
    match context.ask_keyserver(request)? {
        AdminReply::GrantsPending { pending, file } => Ok((pending, file)),
        other => Err(unexpected(other)),
    }
}

fn list(args: &ListPending, context: &Context) -> anyhow::Result<()> {
    let (pending, file) = pending(&AdminRequest::GrantsPending, context)?;
    match &args.out {
        Some(out) => {
            files::write(out, &file)?;
            let count = output::plural(pending.len(), "grant waits", "grants wait");
            output::note(&format!("{count}; to sign: meshctl grant sign {} --signer KEY --out FILE", out.display()));
            Ok(())
        }
        None => context.show(&serde_json::json!({ "pending": pending, "file": file }), || table(&pending)),
    }
}

fn table(pending: &[PendingStatus]) -> String {
    let mut table = Table::new(["NAME", "ID", "CLUSTER", "FOR", "SERIAL", "PREFIXES", "UNTIL", "ISSUER"]);
    for grant in pending {
        table.row([
            grant.name.to_string(),
            grant.node.short(),
            grant.cluster.to_string(),
            grant.identity.map_or_else(
                || if grant.restoration { "restore" } else { reason(grant.renewal, grant.regrant) }.to_owned(),
                |key| format!("identity key {}", key.short()),
            ),
            grant.serial.to_string(),
            output::list(&grant.prefixes),
            output::date(grant.until),
            grant.issuer.id().short(),
        ]);
    }
    table.render()
}

/// What a grant is for.
fn reason(renewal: bool, regrant: bool) -> &'static str {
    match (renewal, regrant) {
        (_, true) => "regrant",
        (true, false) => "renewal",
        (false, false) => "joining",
    }
}

#[derive(Debug, Default, Serialize)]
struct Outcome {
    signed: Vec<String>,
    refused: Vec<Refused>,
    others: usize,
}

#[derive(Debug, Serialize)]
struct Refused {
    name: String,
    error: String,
}

fn sign(args: &Sign, context: &Context) -> anyhow::Result<()> {
    let file: GrantRequests = files::read(&args.file)?;
    let signer = Signer::open(&args.signing.signer)?;
    let view = file.mesh.view().context("verify the trust policies in the file")?;
    let mut remembered = Remembered::open(&args.signing, &signer, &view)?;
    let mut outcome = Outcome::default();
    let good = judge(&file, &view, args, &signer, &mut remembered, &mut outcome);
    for refused in &outcome.refused {
        output::note(&format!("not signed: {}: {}", refused.name, refused.error));
    }
    if good.is_empty() {
        bail!("there is nothing to sign for key {}", signer.public().id().short());
    }
    let shown = requests_table(&good, &view);
    output::note_lines(&shown);
    let count = output::plural(good.len(), "grant", "grants");
    args.signing.confirm(&format!(
        "Sign {count} in mesh {} with key {}?",
        view.policy().name,
        signer.public().id().short()
    ))?;
    let mut grants = Vec::new();
    for request in good {
        grants.push(signer.sign(view.mesh(), Envelope::unsigned(&request.grant))?);
        outcome.signed.push(request.grant.name.to_string());
    }
    // First remembered, then given away.
    remembered.save()?;
    if args.signing.write(&SignedGrants { mesh: view.mesh(), grants }.to_text())? {
        context.show(&outcome, || format!("signed: {}", output::list(&outcome.signed)))?;
    }
    if !outcome.refused.is_empty() {
        bail!("{} not signed", output::plural(outcome.refused.len(), "grant was", "grants were"));
    }
    Ok(())
}

/// What may be signed, in the order of serials; each one is then a member, so that two of one file cannot collide.
fn judge<'a>(
    file: &'a GrantRequests,
    view: &View,
    args: &Sign,
    signer: &Signer,
    remembered: &mut Remembered,
    outcome: &mut Outcome,
) -> Vec<&'a GrantRequest> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let mut requests: Vec<&GrantRequest> = file.requests.iter().collect();
    requests.sort_by_key(|request| request.grant.serial);
    let mut good: Vec<&GrantRequest> = Vec::new();
    for request in requests {
        let name = request.grant.name.as_str();
        if !args.only.is_empty() && !args.only.iter().any(|only| only == name) {
            continue;
        }
        let collides = |other: &&GrantRequest| {
            let overlap = |one: ipnet::IpNet, two: ipnet::IpNet| one.contains(&two) || two.contains(&one);
            let grant = &other.grant;
            grant.name == request.grant.name
                || grant.prefixes().any(|one| request.grant.prefixes().any(|two| overlap(one, two)))
        };
        let judged = match view.check_request(request, now) {
            Ok(issuer) if issuer.key != signer.public() => {
                outcome.others += 1;
                continue;
            }
            Ok(_) if view.is_regrant(request) && !args.regrant => {
                Err("a stolen key granted to it: if you know this node, sign with --regrant".to_owned())
            }
            Ok(_) if comes_back(request) && !args.restore.iter().any(|restored| restored == name) => {
                Err(format!("it is revoked: if its machine is in good hands, sign with --restore {name}"))
            }
            Ok(_) if good.iter().any(collides) => Err("it collides with another grant of this file".to_owned()),
            Ok(_) => remembered.memory.sign(request).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match judged {
            Ok(()) => good.push(request),
            Err(error) => outcome.refused.push(Refused { name: name.to_owned(), error }),
        }
    }
    good
}

fn comes_back(request: &GrantRequest) -> bool {
    matches!(request.reason, GrantReason::Restoration { .. })
}

fn requests_table(requests: &[&GrantRequest], view: &View) -> String {
    let mut table =
        Table::new(["NAME", "NODE", "CLUSTER", "FOR", "PREFIXES", "TAGS", "PQ", "EXPIRES", "TOKEN", "USES"]);
    for request in requests {
        let grant = &request.grant;
        let (what, token, uses) = match &request.reason {
            GrantReason::Join { limits, .. } => {
                let limits = view.token_limits(limits).ok();
                let token = limits.as_ref().map(|limits| limits.id().short());
                ("joining", output::maybe(token), output::maybe(limits.map(|limits| limits.uses)))
            }
            GrantReason::Renewal { .. } => (reason(true, view.is_regrant(request)), "-".to_owned(), "-".to_owned()),
            GrantReason::Restoration { .. } => ("restore", "-".to_owned(), "-".to_owned()),
            GrantReason::Succession { .. } => ("identity key", "-".to_owned(), "-".to_owned()),
        };
        table.row([
            grant.name.to_string(),
            grant.node.short(),
            grant.cluster.to_string(),
            what.to_owned(),
            output::list(&grant.prefixes().collect::<Vec<_>>()),
            output::list(&grant.tags),
            format!("{:?}", grant.pq).to_lowercase(),
            output::date(grant.expires),
            token,
            uses,
        ]);
    }
    table.render()
}

fn import(args: &Import, context: &Context) -> anyhow::Result<()> {
    let mut all = Vec::new();
    for path in &args.files {
        let grants: SignedGrants = files::read(path)?;
        match context.ask_keyserver(&AdminRequest::GrantsImport { grants: grants.to_text() })? {
            AdminReply::GrantsImported { grants } => all.extend(grants),
            other => return Err(unexpected(other)),
        }
    }
    context.show(&serde_json::json!({ "grants": all }), || {
        let mut table = Table::new(["NAME", "STATE"]);
        for grant in &all {
            let state = grant.error.as_ref().map_or_else(|| "in force".to_owned(), |error| format!("refused: {error}"));
            table.row([grant.name.to_string(), state]);
        }
        table.render()
    })?;
    let refused: Vec<_> = all.iter().filter_map(|grant| Some((&grant.name, grant.error.as_ref()?))).collect();
    match refused.first() {
        Some((name, error)) => {
            bail!("{} refused; {name}: {error}", output::plural(refused.len(), "grant was", "grants were"))
        }
        None => Ok(()),
    }
}
