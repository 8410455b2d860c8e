//! `meshctl ping`: echo requests to a node through the tunnel.

use std::net::IpAddr;

use anyhow::bail;
use mesh_protocol::local::{LocalReply, LocalRequest};
use serde::Serialize;

use super::{Context, unexpected};
use crate::client::{Conversation, PATIENCE};
use crate::output;

const HELP: &str = "\
Examples:
  meshctl ping n2
  meshctl ping n2 -c 3 -6

JSON: {\"target\", \"sent\", \"received\", \"echoes\": [{\"number\", \"address\", \"micros\": null if lost}]}
Exit status: 0 if at least one answer came";

/// Send echo requests to a node through the tunnel
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct Args {
    /// Name, id or the start of an id, or an address in the mesh
    node: String,
    /// How many
    #[arg(short = 'c', long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: u32,
    /// IPv6 instead of IPv4
    #[arg(short = '6', long = "ipv6")]
    v6: bool,
}

#[derive(Debug, Serialize)]
struct Echo {
    number: u32,
    address: IpAddr,
    micros: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Summary {
    target: String,
    sent: usize,
    received: usize,
    echoes: Vec<Echo>,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    let request = LocalRequest::Ping { target: args.node.clone(), count: args.count, v6: args.v6 };
    let mut conversation = Conversation::<LocalReply>::start(&context.socket, &request)?;
    let mut echoes = Vec::new();
    loop {
        match conversation.next(PATIENCE)? {
            LocalReply::Echo { number, address, micros } => {
                let echo = Echo { number, address, micros };
                if !context.json {
                    output::print(&line(&echo))?;
                }
                echoes.push(echo);
            }
            LocalReply::Done => break,
            other => return Err(unexpected(other)),
        }
    }
    let received = echoes.iter().filter(|echo| echo.micros.is_some()).count();
    let summary = Summary { target: args.node, sent: echoes.len(), received, echoes };
    context.show(&summary, || summary_text(&summary))?;
    if received == 0 {
        bail!("no answer from {}; see meshctl peers for its endpoint and its last handshake", summary.target);
    }
    Ok(())
}

fn line(echo: &Echo) -> String {
    match echo.micros {
        Some(micros) => format!("{}: answer {} after {} ms", echo.address, echo.number, fraction(micros)),
        None => format!("{}: no answer {} within a second", echo.address, echo.number),
    }
}

fn summary_text(summary: &Summary) -> String {
    let times: Vec<u64> = summary.echoes.iter().filter_map(|echo| echo.micros).collect();
    let counts = format!("{} sent, {} answered", summary.sent, summary.received);
    let (Some(least), Some(most)) = (times.iter().min(), times.iter().max()) else {
        return counts;
    };
    let mean = times.iter().fold(0_u64, |sum, time| sum.saturating_add(*time)) / times.len() as u64;
    format!(
        "{counts}; round trip {} / {} / {} ms (least, mean, most)",
        fraction(*least),
        fraction(mean),
        fraction(*most)
    )
}

/// Microseconds as milliseconds with three digits.
fn fraction(micros: u64) -> String {
    format!("{}.{:03}", micros / 1000, micros % 1000)
}
