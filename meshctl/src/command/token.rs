//! `meshctl token`: join tokens.

mod offline;

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use mesh_protocol::admin::{AdminReply, AdminRequest, TokenStatus};
use mesh_protocol::id::Name;
use mesh_protocol::token::{JoinToken, TokenLimits};
use zeroize::Zeroizing;

use super::{Context, cluster, parse_duration, unexpected};
use crate::output::{self, Table};

/// More than any token is long.
const MAX_INPUT_BYTES: u64 = 64 * 1024;

const HELP: &str = "\
Examples:
  meshctl token create --cluster east --uses 3 --ttl 1h
  meshctl token list";

const CREATE_HELP: &str = "\
Prints one line on standard output: the token. It is a secret until it is used up or expired. Where the issuer's key is \
not on the keyserver's machine, make it where the key is: the keyserver learns of it when the first node shows it.

Examples:
  meshctl token create --cluster east --uses 3 --ttl 1h
  meshctl token create --cluster east --uses 1 --ttl 10m --cidr 10.1.7.0/24 --tag edge > token
  meshctl token create --cluster east --uses 2 --ttl 1d --mesh mesh.txt --signer issuer.key > token

JSON: {\"line\": the token, \"token\": {\"id\", \"cluster\", \"uses\", \"used\", \"expires\", \"revoked\", \"cidrs\", \"tags\"}}";

const LIST_HELP: &str = "\
Examples:
  meshctl token list

JSON: {\"tokens\": [{\"id\", \"cluster\", \"uses\", \"used\", \"expires\", \"revoked\", \"cidrs\", \"tags\"}]}";

const REVOKE_HELP: &str = "\
Examples:
  meshctl token revoke 3f9a12bc

JSON: {\"tokens\": [the one that was voided]}";

const INSPECT_HELP: &str = "\
Reads the token from a file, or from standard input, and asks nobody; what it says is checked when a node joins. The \
secret is not shown.

Examples:
  meshctl token inspect < token
  meshctl token inspect token.txt --json

JSON: {\"id\", \"mesh_id\", \"policy_version\", \"keyservers\", \"cluster\", \"uses\", \"expires\", \"expired\", \"cidrs\", \"tags\"}";

/// Make, list, void and read join tokens
#[derive(Debug, clap::Subcommand)]
#[command(after_help = HELP)]
pub(crate) enum Verb {
    Create(Create),
    List(List),
    Revoke(Revoke),
    Inspect(Inspect),
}

/// Make a join token and print it
#[derive(Debug, clap::Args)]
#[command(after_help = CREATE_HELP)]
pub(crate) struct Create {
    /// Where its nodes enrol
    #[arg(long)]
    cluster: Name,
    /// How many nodes may enrol with it
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,
    /// How long it lives
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_duration)]
    ttl: Duration,
    /// A node may ask for a pod CIDR inside this one; repeat it for several
    #[arg(long = "cidr", value_name = "CIDR", value_parser = cluster::parse_pool)]
    cidrs: Vec<IpNet>,
    /// Tag its nodes get; repeat it for several
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<Name>,
    /// Make it here, without the keyserver: with the mesh from a file of 'policy show --out'
    #[arg(long, value_name = "FILE", requires = "signer")]
    mesh: Option<PathBuf>,
    /// The issuer's key, with --mesh: a key file, exec:COMMAND or pkcs11:.. (meshctl signer show --help)
    #[arg(long, requires = "mesh")]
    signer: Option<String>,
}

/// List join tokens, newest first
#[derive(Debug, clap::Args)]
#[command(after_help = LIST_HELP)]
pub(crate) struct List {}

/// Void a join token; nodes that have joined with it stay
#[derive(Debug, clap::Args)]
#[command(after_help = REVOKE_HELP)]
pub(crate) struct Revoke {
    /// Its id, or at least the first eight digits
    id: String,
}

/// Show what a join token allows, without asking anybody
#[derive(Debug, clap::Args)]
#[command(after_help = INSPECT_HELP)]
pub(crate) struct Inspect {
    /// File to read it from; standard input if not given
    file: Option<PathBuf>,
}

pub(crate) fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    match verb {
        Verb::Create(args) => create(args, context),
        Verb::List(_) => list(&AdminRequest::TokenList, context),
        Verb::Revoke(args) => list(&AdminRequest::TokenRevoke { token: args.id }, context),
        Verb::Inspect(args) => inspect(args, context),
    }
}

fn create(args: Create, context: &Context) -> anyhow::Result<()> {
    let (line, token) = match (&args.mesh, &args.signer) {
        (Some(mesh), Some(signer)) => offline::create(&args, mesh, signer)?,
        _ => ask(args, context)?,
    };
    context.show(&serde_json::json!({ "line": *line, "token": token }), || line.to_string())?;
    if !context.json {
        let nodes = output::plural(token.uses as usize, "node", "nodes");
        let (id, cluster, until) = (token.id.short(), &token.cluster, output::date(token.expires));
        output::note(&format!("token {id}: {nodes} may join {cluster} until {until}; keep it secret"));
        output::note("on the node: meshd join < token");
    }
    Ok(())
}

fn ask(args: Create, context: &Context) -> anyhow::Result<(Zeroizing<String>, TokenStatus)> {
    let request = AdminRequest::TokenCreate {
        cluster: args.cluster,
        uses: args.uses,
        ttl: args.ttl.as_secs(),
        cidrs: args.cidrs,
        tags: args.tags,
    };
    let (line, token) = match context.ask_keyserver(&request)? {
        AdminReply::Token { line, token } => (Zeroizing::new(line), token),
        other => return Err(unexpected(other)),
    };
    if line.contains(char::is_control) {
        bail!("the keyserver's token is not one line of text");
    }
    Ok((line, token))
}

fn list(request: &AdminRequest, context: &Context) -> anyhow::Result<()> {
    let tokens = match context.ask_keyserver(request)? {
        AdminReply::Tokens { tokens } => tokens,
        other => return Err(unexpected(other)),
    };
    context.show(&serde_json::json!({ "tokens": tokens }), || list_text(&tokens))
}

fn list_text(tokens: &[TokenStatus]) -> String {
    let now = now();
    let mut table = Table::new(["ID", "CLUSTER", "USED", "EXPIRES", "STATE", "CIDRS", "TAGS"]);
    for token in tokens {
        let state = match token {
            TokenStatus { revoked: true, .. } => "revoked",
            TokenStatus { expires, .. } if *expires <= now => "expired",
            TokenStatus { used, uses, .. } if used >= uses => "used up",
            _ => "open",
        };
        table.row([
            token.id.short(),
            token.cluster.to_string(),
            format!("{}/{}", token.used, token.uses),
            output::date(token.expires),
            state.to_owned(),
            output::list(&token.cidrs),
            output::list(&token.tags),
        ]);
    }
    table.render()
}

fn inspect(args: Inspect, context: &Context) -> anyhow::Result<()> {
    let token: JoinToken = match args.file {
        Some(path) => {
            let file = File::open(&path).with_context(|| format!("open the token file {}", path.display()))?;
            read_token(file).with_context(|| format!("read a join token from {}", path.display()))?
        }
        None => read_token(io::stdin().lock()).context("read a join token from standard input")?,
    };
    let limits: TokenLimits = token.limits.unverified().context("read the limits of the join token")?;
    let expired = limits.expires <= now();
    let value = serde_json::json!({
        "id": token.id(),
        "mesh_id": token.mesh,
        "policy_version": token.policy_version,
        "keyservers": token.keyservers,
        "cluster": limits.cluster,
        "uses": limits.uses,
        "expires": limits.expires,
        "expired": expired,
        "cidrs": limits.cidrs,
        "tags": limits.tags,
    });
    context.show(&value, || {
        let mut table = Table::fields();
        let tail = if expired { ", expired" } else { "" };
        table.field("mesh", token.mesh);
        table.field("policy", format!("version {}", token.policy_version));
        table.field("keyservers", output::list(&token.keyservers));
        table.field("cluster", &limits.cluster);
        table.field("uses", limits.uses);
        table.field("expires", format!("{}{tail}", output::date(limits.expires)));
        table.field("CIDRs", output::list(&limits.cidrs));
        table.field("tags", output::list(&limits.tags));
        format!("token {}\n{}", token.id(), table.render())
    })
}

fn read_token(input: impl Read) -> anyhow::Result<JoinToken> {
    let mut text = Zeroizing::new(String::new());
    input.take(MAX_INPUT_BYTES).read_to_string(&mut text)?;
    Ok(text.trim().parse()?)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
