//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::DEFAULT_PATH;
use crate::join::JoinArgs;

/// The node daemon of Mesh.
///
/// Holds an encrypted tunnel to every other node of the mesh, routes the pod CIDRs of all clusters through them, and gives
/// pods their addresses.
#[derive(Debug, Parser)]
#[command(name = "meshd", version, propagate_version = true, max_term_width = 110)]
#[command(after_help = "Examples:\n  meshd join < token\n  meshd run --config /etc/mesh/meshd.toml\n\n\
                        Exit codes: 0 done, 1 failed, 2 usage, 78 configuration.")]
pub(crate) struct Cli {
    /// Print one JSON object instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// What to do
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Where the configuration lies.
#[derive(Debug, Args)]
pub(crate) struct ConfigArg {
    /// Configuration; without the default file, defaults hold
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    pub(crate) config: PathBuf,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the daemon
    ///
    /// Starts from what is on disk, with a keyserver or without. When it stops, device, routes and filter stay, so that
    /// nothing leaves in clear text; `meshd down` removes them.
    #[command(after_help = "Example:\n  meshd run --config /etc/mesh/meshd.toml")]
    Run {
        /// Where the configuration lies
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Enrol this node with a join token
    Join {
        /// Where the configuration lies
        #[command(flatten)]
        config: ConfigArg,
        /// How
        #[command(flatten)]
        join: JoinArgs,
    },
    /// Close the host to clear text of the mesh, before anything can send
    ///
    /// Puts routing table, ip rules and nftables table back from what meshd saved on disk. For a oneshot unit ordered before
    /// network-pre.target. Does nothing while meshd runs, or on a host that never joined.
    #[command(after_help = "Example:\n  meshd guard --config /etc/mesh/meshd.toml")]
    Guard {
        /// Where the configuration lies
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Remove everything of Mesh from this host's network, and stop meshd
    ///
    /// Device, pod links, routes, ip rules, nftables table and changed settings; nothing that is not ours. Keys, directory and
    /// leases stay on disk. Packets to mesh prefixes are not stopped from leaving in clear text after that.
    #[command(after_help = "Example:\n  meshd down")]
    Down {
        /// Where the configuration lies
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Try on scratch devices which offloads of this kernel work
    ///
    /// Sends trains through two devices in a network namespace of its own and compares every byte. `meshd run` does without
    /// what came out wrong. Under the unit it runs before meshd, which has not the rights for it; what it found is kept in
    /// offloads.json beside the socket, and holds until the next boot.
    #[command(after_help = "Example:\n  meshd try-offloads --again --json")]
    TryOffloads {
        /// Where the configuration lies
        #[command(flatten)]
        config: ConfigArg,
        /// Also if it is known already
        #[arg(long)]
        again: bool,
    },
    /// Check a configuration, or print the default one
    #[command(
        after_help = "Examples:\n  meshd check-config /etc/mesh/meshd.toml\n  meshd check-config --print-default > meshd.toml"
    )]
    CheckConfig {
        /// The file
        #[arg(value_name = "FILE", required_unless_present = "print_default", conflicts_with = "print_default")]
        file: Option<PathBuf>,
        /// Print the defaults as TOML, or with --json as JSON
        #[arg(long)]
        print_default: bool,
    },
    /// Print a shell completion script
    #[command(after_help = "Example:\n  meshd completion bash > /usr/share/bash-completion/completions/meshd")]
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the man page
    #[command(after_help = "Example:\n  meshd man | man -l -")]
    Man,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn definitions_are_sound_and_every_command_has_an_example() {
        let mut cli = Cli::command();
        cli.build();
        cli.clone().debug_assert();
        for command in cli.get_subcommands().filter(|command| command.get_name() != "help") {
            let help = command.clone().render_long_help().to_string();
            assert!(help.contains("Example"), "{}: {help}", command.get_name());
            assert!(help.contains("--json"), "{}: {help}", command.get_name());
        }
    }

    #[test]
    fn check_config_wants_a_file_or_the_defaults() {
        assert!(Cli::try_parse_from(["meshd", "check-config"]).is_err());
        assert!(Cli::try_parse_from(["meshd", "check-config", "--print-default", "x"]).is_err());
        assert!(Cli::try_parse_from(["meshd", "check-config", "x", "--json"]).is_ok());
        assert!(Cli::try_parse_from(["meshd", "join", "--config", "x", "--node-name", "n1"]).is_ok());
    }
}
