//! `meshctl man`: manual pages, from the same definitions as `--help`.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_mangen::Man;

use super::Context;
use crate::args::Cli;

const HELP: &str = "\
Examples:
  meshctl man | man -l -
  meshctl man --dir /usr/local/share/man/man1

JSON: {\"pages\": {name of the file: its text}}";

/// Print the manual page, or write one for each verb
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct Args {
    /// Write a page for meshctl and one for each verb into this directory
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<()> {
    let mut pages = BTreeMap::new();
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    render(&root, &mut pages)?;
    let Some(dir) = &args.dir else {
        let first = pages.get("meshctl.1").cloned().unwrap_or_default();
        return context.show(&serde_json::json!({ "pages": pages }), || first);
    };
    fs::create_dir_all(dir).with_context(|| format!("make the directory {}", dir.display()))?;
    for (name, text) in &pages {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("write the manual page {}", path.display()))?;
    }
    context
        .show(&serde_json::json!({ "pages": pages }), || format!("{} pages written to {}", pages.len(), dir.display()))
}

/// The page of a command and of those beneath it. Building the definitions named each after its whole path.
fn render(command: &clap::Command, pages: &mut BTreeMap<String, String>) -> anyhow::Result<()> {
    let man = Man::new(command.clone());
    let mut page = Vec::new();
    man.render(&mut page)?;
    pages.insert(man.get_filename(), String::from_utf8(page)?);
    command.get_subcommands().try_for_each(|inner| render(inner, pages))
}
