//! `meshctl audit`: what somebody has to look at on this node, and the keyserver's log of who did what.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use mesh_protocol::admin::{AdminReply, AdminRequest};
use mesh_protocol::audit::{AuditEnd, AuditHead, Verifier};
use mesh_protocol::id::{KeyId, MeshId};
use mesh_protocol::local::{Alarm, EvidenceStatus, LocalReply, LocalRequest};
use serde::Serialize;

use super::{Context, unexpected};
use crate::client::{Conversation, PATIENCE};
use crate::output::{self, Table};

const HELP: &str = "\
Without a verb: alarms and evidence of this node. Evidence are signed objects that contradict each other: of a keyserver \
that shows two worlds, or of two machines with one identity.

Examples:
  meshctl audit
  meshctl audit export > audit.jsonl
  meshctl audit verify audit.jsonl

JSON: {\"alarms\": [{\"name\", \"message\", \"age\"}], \"evidence\": [{\"file\", \"kind\", \"says\", \"signers\", \"stored\"}]}";

const EXPORT_HELP: &str = "\
One JSON object a line: number, time, actor, action, subject, detail, and the hash of the line before. The last line is signed by \
the keyserver and says where the log ends. The output is the same with --json.

Examples:
  meshctl audit export > audit.jsonl
  meshctl audit export --from 1000";

const VERIFY_HELP: &str = "\
A line that was changed, removed or added is named; a log that was cut off has no signed end. Who signed the end is printed: \
compare it with the keys the trust policy names, or give it with --key.

Examples:
  meshctl audit verify audit.jsonl
  meshctl audit verify --live

JSON: {\"entries\", \"mesh\", \"signed_by\", \"time\"}";

/// Longest line of a log, in bytes: each of four texts of 512 bytes may take six times that in JSON.
const LONGEST_LINE: u64 = 16 * 1024;

/// Show alarms and evidence of this node, or the keyserver's audit log
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    Export(Export),
    Verify(Verify),
}

/// Print the keyserver's audit log as JSON lines
#[derive(Debug, clap::Args)]
#[command(after_help = EXPORT_HELP)]
struct Export {
    /// Number of the first entry
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    from: u64,
}

/// Verify an audit log, and name the first broken line
#[derive(Debug, clap::Args)]
#[command(after_help = VERIFY_HELP)]
struct Verify {
    /// What `meshctl audit export` printed
    #[arg(required_unless_present = "live")]
    file: Option<PathBuf>,
    /// Verify the keyserver's own log, without a file
    #[arg(long, conflicts_with = "file")]
    live: bool,
    /// Number of the first entry in it
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    from: u64,
    /// Id of the key that has to have signed its end
    #[arg(long, value_name = "ID")]
    key: Option<KeyId>,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    match args.verb {
        None => node(context),
        Some(Verb::Export(args)) => export(&args, context),
        Some(Verb::Verify(args)) => verify(&args, context),
    }
}

#[derive(Serialize)]
struct Findings {
    alarms: Vec<Alarm>,
    evidence: Vec<EvidenceStatus>,
}

fn node(context: &Context) -> anyhow::Result<()> {
    let findings = match context.ask_node(&LocalRequest::Audit)? {
        LocalReply::Audit { alarms, evidence } => Findings { alarms, evidence },
        other => return Err(unexpected(other)),
    };
    context.show(&findings, || findings.text())
}

impl Findings {
    fn text(&self) -> String {
        let mut text = String::new();
        for alarm in &self.alarms {
            text.push_str(&format!("ALARM {}: {} (for {} s)\n", alarm.name, alarm.message, alarm.age));
        }
        if self.alarms.is_empty() {
            text.push_str("no alarm\n");
        }
        if self.evidence.is_empty() {
            return text + "no evidence\n";
        }
        let mut table = Table::new(["EVIDENCE", "SAYS", "SIGNED BY", "SINCE", "FILE"]);
        for found in &self.evidence {
            let signers: Vec<String> = found.signers.iter().map(KeyId::short).collect();
            let since = output::date(found.stored);
            table.row([found.kind.clone(), found.says.clone(), output::list(&signers), since, found.file.clone()]);
        }
        text + &table.render()
    }
}

/// Hands each line of the keyserver's log to `take`, the signed end last.
fn fetch(context: &Context, from: u64, mut take: impl FnMut(&str) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let request = AdminRequest::AuditExport { from };
    let mut conversation = Conversation::<AdminReply>::start(&context.admin_socket, &request)?;
    loop {
        let (lines, head, done) = match conversation.next(PATIENCE)? {
            AdminReply::Audit { lines, head, done } => (lines, head, done),
            other => return Err(unexpected(other)),
        };
        lines.iter().try_for_each(|line| take(line))?;
        if done {
            return take(&serde_json::to_string(&AuditEnd { head })?);
        }
    }
}

fn export(args: &Export, context: &Context) -> anyhow::Result<()> {
    fetch(context, args.from, |line| Ok(output::print(&format!("{line}\n"))?))
}

#[derive(Serialize)]
struct Verified {
    entries: u64,
    mesh: MeshId,
    signed_by: KeyId,
    time: u64,
}

fn verify(args: &Verify, context: &Context) -> anyhow::Result<()> {
    let mut verifier = Verifier::new(args.from);
    let from = match &args.file {
        None => {
            fetch(context, args.from, |line| Ok(verifier.line(line)?))?;
            "the keyserver's log".to_owned()
        }
        Some(file) => {
            let name = file.display().to_string();
            let mut lines = BufReader::new(File::open(file).with_context(|| format!("open {name}"))?);
            loop {
                let mut line = String::new();
                // Longer than any line of ours: what follows is read as another one, and refused.
                let read = lines.by_ref().take(LONGEST_LINE).read_line(&mut line);
                if read.with_context(|| format!("read {name}"))? == 0 {
                    break;
                }
                verifier.line(line.trim_end_matches('\n')).with_context(|| name.clone())?;
            }
            name
        }
    };
    let head = verifier.finish().with_context(|| from.clone())?;
    let verified = checked(&head, args.key)?;
    context.show(&verified, || {
        format!(
            "{from} is whole: entries {} to {}, signed by keyserver key {} at {}\n",
            args.from,
            verified.entries,
            verified.signed_by,
            output::date(verified.time)
        )
    })
}

fn checked(head: &AuditHead, wanted: Option<KeyId>) -> anyhow::Result<Verified> {
    let signed_by = head.signer().context("the signature of the end does not match")?;
    if let Some(wanted) = wanted.filter(|wanted| *wanted != signed_by) {
        bail!("the end is signed by key {signed_by}, not by {wanted}: it is another keyserver's log, or a forged one");
    }
    Ok(Verified { entries: head.number, mesh: head.mesh, signed_by, time: head.time })
}
