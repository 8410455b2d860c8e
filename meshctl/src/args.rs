//! The command line: what completion scripts and man pages are made from, too.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use mesh_protocol::{admin, local};

use crate::command::{
    Context, audit, cluster, completion, down, grant, keys, man, node, path, peers, ping, policy, routes, signer,
    status, token,
};

const LONG_ABOUT: &str = "\
Shows and changes a mesh.

Verbs about this node ask meshd through its socket; verbs about the whole mesh ask the keyserver through its admin socket, \
on the keyserver's machine. Results go to standard output, progress, hints and errors to standard error.

With --json a verb prints exactly one JSON document. Members may be added to it in later versions; none is removed or \
changes its meaning. Times are seconds unless the name says otherwise, `expires` is seconds since 1970. An error is one \
line on standard error: {\"error\":{\"code\":\"no-socket\",\"message\":\"...\"}}.

Exit status: 0 done, 1 failed, 2 wrong usage, 78 wrong configuration.";

const EXAMPLES: &str = "\
Examples:
  meshctl status
  meshctl ping n2 -c 3
  meshctl cluster add east --pod-cidr 10.1.0.0/16
  meshctl token create --cluster east --uses 3 --ttl 1h
  meshctl node revoke n1 --reason stolen";

/// Shows and changes a mesh
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, long_about = LONG_ABOUT, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// Socket of meshd
    #[arg(long, global = true, env = "MESHD_SOCKET", value_name = "PATH", default_value = local::DEFAULT_SOCKET)]
    pub(crate) socket: PathBuf,

    /// Admin socket of the keyserver
    #[arg(long, global = true, env = "MESH_ADMIN_SOCKET", value_name = "PATH", default_value = admin::DEFAULT_SOCKET)]
    pub(crate) admin_socket: PathBuf,

    /// Print one JSON document
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Status(status::Args),
    Peers(peers::Args),
    Routes(routes::Args),
    Path(path::Args),
    Ping(ping::Args),
    #[command(subcommand)]
    Keys(keys::Verb),
    #[command(subcommand)]
    Node(node::Verb),
    #[command(subcommand)]
    Cluster(cluster::Verb),
    #[command(subcommand)]
    Token(token::Verb),
    Audit(audit::Args),
    #[command(subcommand)]
    Grant(grant::Verb),
    #[command(subcommand)]
    Policy(policy::Verb),
    #[command(subcommand)]
    Signer(signer::Verb),
    Down(down::Args),
    Completion(completion::Args),
    Man(man::Args),
}

impl Cli {
    /// Does what was asked.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let context = Context { socket: self.socket, admin_socket: self.admin_socket, json: self.json };
        match self.verb {
            Verb::Status(args) => status::run(&args, &context),
            Verb::Peers(args) => peers::run(&args, &context),
            Verb::Routes(args) => routes::run(&args, &context),
            Verb::Path(args) => path::run(args, &context),
            Verb::Ping(args) => ping::run(args, &context),
            Verb::Keys(verb) => keys::run(verb, &context),
            Verb::Node(verb) => node::run(verb, &context),
            Verb::Cluster(verb) => cluster::run(verb, &context),
            Verb::Token(verb) => token::run(verb, &context),
            Verb::Audit(args) => audit::run(args, &context),
            Verb::Grant(verb) => grant::run(verb, &context),
            Verb::Policy(verb) => policy::run(verb, &context),
            Verb::Signer(verb) => signer::run(verb, &context),
            Verb::Down(args) => down::run(&args, &context),
            Verb::Completion(args) => completion::run(&args, &context),
            Verb::Man(args) => man::run(&args, &context),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_has_help_with_an_example_that_parses() {
        let mut root = Cli::command();
        root.build();
        let mut seen = 0;
        check(&root, &mut seen);
        assert!(seen >= 16, "only {seen} examples");
    }

    fn check(command: &clap::Command, seen: &mut usize) {
        let name = command.get_name();
        if name == "help" {
            return;
        }
        assert!(command.get_about().is_some(), "{name} says nothing about itself");
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let mut examples = 0;
        for line in help.lines().filter(|line| line.trim_start().starts_with("meshctl ")) {
            let words = line.split_whitespace().take_while(|word| !matches!(*word, "<" | ">" | "|"));
            Cli::try_parse_from(words).unwrap_or_else(|error| panic!("'{line}' of {name}: {error}"));
            examples += 1;
        }
        assert!(examples > 0, "{name} has no example");
        *seen += examples;
        for inner in command.get_subcommands() {
            check(inner, seen);
        }
    }
}
