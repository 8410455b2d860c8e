//! `meshctl completion`: a script for the shell.

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::Context;
use crate::args::Cli;

const HELP: &str = "\
Examples:
  meshctl completion bash > /etc/bash_completion.d/meshctl
  meshctl completion zsh

JSON: {\"shell\", \"script\"}";

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct Args {
    /// Which shell
    shell: Shell,
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "meshctl", &mut script);
    let script = String::from_utf8(script)?;
    context.show(&serde_json::json!({ "shell": args.shell.to_string(), "script": script }), || script.clone())
}
