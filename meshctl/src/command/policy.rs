//! `meshctl policy`: the trust policy, and the next one, signed by its roots wherever they are.

mod change;
mod post_quantum;

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use mesh_protocol::admin::{AdminReply, AdminRequest};
use mesh_protocol::envelope::{Envelope, NO_MESH};
use mesh_protocol::id::MeshId;
use mesh_protocol::offline::{InFile as _, MeshFile, PolicyProposal};
use mesh_protocol::record::TrustPolicy;
use mesh_protocol::trust::{View, check_policy};

use super::{Context, unexpected};
use crate::files::{self, Remembered, Signing};
use crate::output::{self, Table};
use crate::signer::Signer;

const HELP: &str = "\
A policy is in force once enough roots of the one before have signed it. Nodes follow by themselves: nobody joins again.

Examples:
  meshctl policy show
  meshctl policy propose --add-cluster west=10.2.0.0/16 --out next.txt
  meshctl policy sign next.txt --signer root-1.key --out next-by-1.txt
  meshctl policy import next-by-1.txt next-by-2.txt
  meshctl policy set-pq required";

const SHOW_HELP: &str = "\
With --out it writes the mesh as machines without a network need it: for 'token create --mesh', 'policy propose --mesh'.

Examples:
  meshctl policy show
  meshctl policy show --out mesh.txt
  meshctl policy show --mesh mesh.txt --json

JSON: {\"mesh_id\", \"name\", \"version\", \"hash\", \"threshold\", \"roots\": [key], \"issuers\": [{\"key\", \"clusters\", \
\"tags\", \"longest_grant\", \"former\": [{\"key\", \"generation\", \"serial\"}]}], \"revokers\", \"keyservers\", \"exposure\", \"pq\", \"mesh_pool\"}";

const PROPOSE_HELP: &str = "\
KEY is a public key (meshctl signer show); to remove one, the start of its id will do. Removing an issuer puts every node \
out whose grant it signed; replacing one does not: its successor signs what 'meshctl grant list-pending' lists, and once all nodes \
have that, --forget-issuer ends the former key.

Examples:
  meshctl policy propose --add-issuer 11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo= --add-cluster west=10.2.0.0/16 --out next.txt
  meshctl policy propose --replace-issuer 3f9a12bc 11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo= --out next.txt
  meshctl policy propose --forget-issuer 3f9a12bc --out next.txt
  meshctl policy propose --remove-root 3f9a12bc --threshold 2 --out next.txt

JSON: {\"version\", \"changes\": [text]}";

const SIGN_HELP: &str = "\
Works without a network. Shows what the policy changes, and adds this root's signature.

Examples:
  meshctl policy sign next.txt --signer root-1.key --out next-by-1.txt
  meshctl policy sign next.txt --signer exec:/usr/local/bin/mesh-sign --memory mesh.memory --yes --out -

JSON: {\"version\", \"changes\": [text], \"signed\": roots that have, \"needed\"}";

const IMPORT_HELP: &str = "\
Files with signatures over the same policy are put together.

Examples:
  meshctl policy import next-by-1.txt next-by-2.txt

JSON: {\"version\", \"adopted\", \"signed\", \"needed\", \"dropped\", \"pending\": grants that wait for an issuer}
Exit status: 0 if the policy is in force";

/// Show, propose, sign and import trust policies
#[derive(Debug, clap::Subcommand)]
#[command(after_help = HELP)]
pub(crate) enum Verb {
    Show(Show),
    Propose(Box<Propose>),
    Sign(Sign),
    Import(Import),
    SetPq(post_quantum::SetPq),
}

/// Show the trust policy: roots, issuers and their scopes, revokers, keyservers
#[derive(Debug, clap::Args)]
#[command(after_help = SHOW_HELP)]
pub(crate) struct Show {
    /// Read it from a file of 'policy show --out' instead of asking the keyserver
    #[arg(long, value_name = "FILE")]
    mesh: Option<PathBuf>,
    /// Write the mesh to this file; - for standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Write the next trust policy to a file, for its roots to sign
#[derive(Debug, clap::Args)]
#[command(after_help = PROPOSE_HELP)]
pub(crate) struct Propose {
    /// Start from a file of 'policy show --out' instead of asking the keyserver
    #[arg(long, value_name = "FILE")]
    mesh: Option<PathBuf>,
    /// Where the proposal goes; - for standard output
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    changes: change::Changes,
}

/// Sign a proposed policy, where a root's key is
#[derive(Debug, clap::Args)]
#[command(after_help = SIGN_HELP)]
pub(crate) struct Sign {
    /// File of 'policy propose' or 'keyserver init --strict'; - for standard input
    file: PathBuf,
    /// A root's key signs.
    #[command(flatten)]
    signing: Signing,
}

/// Bring a signed policy to the keyserver
#[derive(Debug, clap::Args)]
#[command(after_help = IMPORT_HELP)]
pub(crate) struct Import {
    /// Files of 'policy sign'; - for standard input
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Also if it leaves nodes outside, which are out at once
    #[arg(long)]
    drop_nodes: bool,
}

pub(crate) fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    match verb {
        Verb::Show(args) => show(&args, context),
        Verb::Propose(args) => propose(&args, context),
        Verb::Sign(args) => sign(&args, context),
        Verb::Import(args) => import(&args, context),
        Verb::SetPq(args) => post_quantum::run(&args, context),
    }
}

/// The mesh from a file, or from the keyserver; verified from the mesh id it names.
pub(super) fn mesh(file: Option<&std::path::Path>, context: &Context) -> anyhow::Result<(MeshFile, View)> {
    let mesh: MeshFile = match file {
        Some(path) => files::read(path)?,
        None => match context.ask_keyserver(&AdminRequest::MeshFile)? {
            AdminReply::Mesh { file } => MeshFile::from_text(&file).context("read the keyserver's answer")?,
            other => return Err(unexpected(other)),
        },
    };
    let view = mesh.view().context("verify the trust policies")?;
    Ok((mesh, view))
}

fn show(args: &Show, context: &Context) -> anyhow::Result<()> {
    let (mesh, view) = mesh(args.mesh.as_deref(), context)?;
    if let Some(out) = &args.out {
        return files::write(out, &mesh.to_text());
    }
    let policy = view.policy();
    let issuers: Vec<_> = policy
        .issuers
        .iter()
        .map(|issuer| {
            let clusters: Vec<_> = issuer
                .clusters
                .iter()
                .map(|scope| serde_json::json!({ "cluster": scope.cluster, "pools": scope.pools }))
                .collect();
            serde_json::json!({
                "key": issuer.key, "clusters": clusters, "tags": issuer.tags, "longest_grant": issuer.longest_grant,
                "former": issuer.former.iter().map(|former| serde_json::json!({
                    "key": former.key, "generation": former.generation, "serial": former.serial,
                })).collect::<Vec<_>>(),
            })
        })
        .collect();
    let value = serde_json::json!({
        "mesh_id": view.mesh(), "name": policy.name, "version": policy.version, "hash": view.policy_hash(),
        "threshold": policy.threshold, "roots": policy.roots, "issuers": issuers, "revokers": policy.revokers,
        "keyservers": policy.keyservers, "exposure": policy.exposure, "pq": policy.pq, "mesh_pool": policy.mesh_pool,
    });
    context.show(&value, || format!("mesh {} ({})\n{}", policy.name, view.mesh(), policy_text(policy)))
}

fn policy_text(policy: &TrustPolicy) -> String {
    let mut table = Table::fields();
    table.field(
        "policy",
        format!("version {}, {} of {} roots sign the next", policy.version, policy.threshold, policy.roots.len()),
    );
    for key in &policy.roots {
        table.field("root", format!("{} {key}", key.id().short()));
    }
    for issuer in &policy.issuers {
        table.field("issuer", format!("{} {}", issuer.key.id().short(), issuer.key));
        for scope in &issuer.clusters {
            table.field("  cluster", format!("{} {}", scope.cluster, output::list(&scope.pools)));
        }
        table.field("  tags", output::list(&issuer.tags));
        table.field("  longest grant", output::seconds(issuer.longest_grant));
        for former in &issuer.former {
            let stands = match former.stands() {
                true => format!("its grants stand up to generation {}, serial {}", former.generation, former.serial),
                false => "stolen: nothing of it stands".to_owned(),
            };
            table.field("  in place of", format!("{} {}, {stands}", former.key.id().short(), former.key));
        }
    }
    for key in &policy.revokers {
        table.field("revoker", format!("{} {key}", key.id().short()));
    }
    for key in &policy.keyservers {
        table.field("keyserver", format!("{} {key}", key.id().short()));
    }
    table.field("exposure", output::seconds(policy.exposure));
    table.field("post-quantum", format!("{:?}", policy.pq).to_lowercase());
    table.field("mesh pool", policy.mesh_pool);
    table.render()
}

fn propose(args: &Propose, context: &Context) -> anyhow::Result<()> {
    let (mesh, view) = mesh(args.mesh.as_deref(), context)?;
    let next = args.changes.apply(&view, mesh.reached)?;
    check_policy(&next)?;
    let changes = change::differences(view.policy(), &next);
    if changes.is_empty() {
        bail!("nothing would change: say what (meshctl policy propose --help)");
    }
    let version = next.version;
    files::write(&args.out, &PolicyProposal { mesh, proposal: Envelope::unsigned(&next) }.to_text())?;
    if args.out == std::path::Path::new("-") {
        return Ok(());
    }
    context.show(&serde_json::json!({ "version": version, "changes": changes }), || {
        format!("policy {version}\n  {}", changes.join("\n  "))
    })?;
    let needed = view.policy().threshold;
    output::note(&format!("{needed} of {} roots have to sign it: meshctl policy sign", view.policy().roots.len()));
    Ok(())
}

fn sign(args: &Sign, context: &Context) -> anyhow::Result<()> {
    let file: PolicyProposal = files::read(&args.file)?;
    let signer = Signer::open(&args.signing.signer)?;
    let policy: TrustPolicy = file.proposal.unverified().context("read the proposed policy")?;
    check_policy(&policy)?;
    if policy.version == 1 {
        return sign_first(args, &signer, file, &policy, context);
    }
    let view = file.mesh.view().context("verify the trust policies in the file")?;
    let remembered = Remembered::open(&args.signing, &signer, &view)?;
    let held = view.policy();
    if policy.version != held.version + 1 || policy.previous != Some(view.policy_hash()) {
        bail!("the proposal does not follow policy {} of the file", held.version);
    }
    if !held.roots.contains(&signer.public()) {
        bail!("key {} is not a root of policy {}", signer.public().id().short(), held.version);
    }
    let changes = change::differences(held, &policy);
    let (version, needed) = (policy.version, usize::from(held.threshold));
    output::note_lines(&format!(
        "policy {version} of mesh {} ({})\n  {}\n",
        held.name,
        view.mesh(),
        changes.join("\n  ")
    ));
    args.signing.confirm(&format!("Sign it with root {}?", signer.public().id().short()))?;
    let proposal = signer.sign(view.mesh(), file.proposal)?;
    let signed = proposal.signers().filter(|id| held.roots.iter().any(|root| root.id() == *id)).count();
    remembered.save()?;
    finish(args, PolicyProposal { mesh: file.mesh, proposal }, (version, changes), (signed, needed), context)
}

/// The first policy makes the mesh id: there is nothing to verify it against but what the operator sees.
fn sign_first(
    args: &Sign,
    signer: &Signer,
    file: PolicyProposal,
    policy: &TrustPolicy,
    context: &Context,
) -> anyhow::Result<()> {
    if !policy.roots.contains(&signer.public()) {
        bail!("key {} is not a root of the proposed policy", signer.public().id().short());
    }
    let mesh = MeshId(file.proposal.hash(NO_MESH).0);
    output::note_lines(&format!(
        "first policy of mesh {}, whose id will be {mesh}\n{}",
        policy.name,
        policy_text(policy)
    ));
    args.signing.confirm(&format!("Sign it with root {}?", signer.public().id().short()))?;
    let proposal = signer.sign(NO_MESH, file.proposal)?;
    let signed = proposal.signers().filter(|id| policy.roots.iter().any(|root| root.id() == *id)).count();
    let changes = vec![format!("makes mesh {mesh}")];
    let file = PolicyProposal { mesh: file.mesh, proposal };
    finish(args, file, (1, changes), (signed, usize::from(policy.threshold)), context)
}

fn finish(
    args: &Sign,
    file: PolicyProposal,
    (version, changes): (u64, Vec<String>),
    (signed, needed): (usize, usize),
    context: &Context,
) -> anyhow::Result<()> {
    if !args.signing.write(&file.to_text())? {
        return Ok(());
    }
    let value = serde_json::json!({ "version": version, "changes": changes, "signed": signed, "needed": needed });
    context.show(&value, || format!("policy {version}: signed by {signed} roots, {needed} needed"))
}

fn import(args: &Import, context: &Context) -> anyhow::Result<()> {
    let mut merged: Option<PolicyProposal> = None;
    for path in &args.files {
        let file: PolicyProposal = files::read(path)?;
        merged = Some(match merged {
            None => file,
            Some(held) => {
                let other = || format!("{} holds another policy than the file before", path.display());
                PolicyProposal { proposal: held.proposal.merged(&file.proposal).with_context(other)?, ..held }
            }
        });
    }
    let proposal = merged.context("no file was given")?.to_text();
    let request = AdminRequest::PolicyImport { proposal, drop_nodes: args.drop_nodes };
    match context.ask_keyserver(&request)? {
        AdminReply::Policy { version, adopted, signed, needed, dropped, pending } => {
            let value = serde_json::json!({
                "version": version, "adopted": adopted, "signed": signed, "needed": needed, "dropped": dropped,
                "pending": pending,
            });
            let state = if adopted { "in force" } else { "not in force" };
            context.show(&value, || {
                format!("policy {version}: {state}, signed by {signed} roots, {needed} needed; {dropped} nodes are out")
            })?;
            if adopted && pending > 0 {
                let count = output::plural(pending as usize, "grant waits", "grants wait");
                output::note(&format!("{count} for an issuer: meshctl grant list-pending --out pending.txt"));
            }
            if adopted { Ok(()) } else { bail!("{signed} of {needed} signatures: have more roots sign it") }
        }
        other => Err(unexpected(other)),
    }
}
