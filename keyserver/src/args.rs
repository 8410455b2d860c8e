//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use ipnet::Ipv4Net;
use mesh_protocol::id::Name;
use mesh_protocol::key::VerifyKey;
use mesh_protocol::record::PostQuantum;

use crate::config::{DEFAULT_DIR, check_address};

/// Enrols nodes into a mesh and tells each who its peers are.
#[derive(Debug, Parser)]
#[command(
    name = "keyserver",
    version,
    after_help = "Example:
  keyserver init --name prod --address keys.example.net:7443
  keyserver run --config /etc/mesh-keyserver/keyserver.toml"
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a new mesh: keys, first trust policy, store and configuration
    ///
    /// With --strict the keys of roots and issuers stay where they are, and only their public halves are given here. The
    /// first trust policy is then written to a file, for the roots to sign (meshctl policy sign), and the mesh is made
    /// from the signed files by a second call with --signed.
    #[command(after_help = "Examples:
  keyserver init --dir /etc/mesh-keyserver --name prod --address keys.example.net:7443
  keyserver init --strict --name prod --address keys.example.net:7443 --root KEY1 --root KEY2 --root KEY3 \\
    --threshold 2 --issuer KEY4
  keyserver init --signed policy-by-1.txt --signed policy-by-2.txt")]
    Init {
        /// Directory for keys, store and configuration; made with mode 0700
        #[arg(long, value_name = "DIR", default_value = DEFAULT_DIR)]
        dir: PathBuf,
        /// Name of the mesh: one DNS label
        #[arg(long, required_unless_present = "signed")]
        name: Option<Name>,
        /// Address under which nodes reach this keyserver; goes into join tokens
        #[arg(long, value_name = "HOST:PORT", value_parser = address, required_unless_present = "signed")]
        address: Option<String>,
        /// Keep no key here that can grant or change the trust policy
        #[arg(long, requires = "roots", requires = "issuers")]
        strict: bool,
        /// Public key of a root, with --strict; repeat it for several
        #[arg(long = "root", value_name = "KEY", requires = "strict")]
        roots: Vec<VerifyKey>,
        /// How many roots have to sign a trust policy
        #[arg(long, value_name = "N", default_value_t = 1, requires = "strict", value_parser = clap::value_parser!(u8).range(1..=16))]
        threshold: u8,
        /// Public key of an issuer, with --strict; repeat it for several
        #[arg(long = "issuer", value_name = "KEY", requires = "strict")]
        issuers: Vec<VerifyKey>,
        /// Public key of a revoker, with --strict; without it one is made and kept here, so that nodes can be cut off at once
        #[arg(long = "revoker", value_name = "KEY", requires = "strict")]
        revokers: Vec<VerifyKey>,
        /// The first trust policy, signed: finish what --strict began; repeat it for each file with a signature
        #[arg(long, value_name = "FILE", conflicts_with_all = ["name", "address", "strict"])]
        signed: Vec<PathBuf>,
        /// Pool for the nodes' own IPv4 addresses; must not overlap networks that the nodes are in
        #[arg(long, value_name = "CIDR", default_value = "100.96.0.0/16", value_parser = mesh_cidr)]
        mesh_cidr: Ipv4Net,
        /// Running time after which a node that hears from no keyserver closes its tunnels
        #[arg(long, value_name = "DURATION", default_value = "7d", value_parser = humantime::parse_duration)]
        exposure: Duration,
        /// Whether tunnels need a post-quantum preshared key; with "off" only where a grant says so
        #[arg(long, value_enum, default_value_t = Pq::Required)]
        pq: Pq,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Run the keyserver (systemd: Type=notify)
    #[command(after_help = "Example:
  keyserver run --config /etc/mesh-keyserver/keyserver.toml")]
    Run {
        /// Configuration file
        #[arg(long, value_name = "FILE", default_value = "/etc/mesh-keyserver/keyserver.toml")]
        config: PathBuf,
    },
    /// Check a configuration file without running anything
    #[command(after_help = "Example:
  keyserver check-config /etc/mesh-keyserver/keyserver.toml")]
    CheckConfig {
        /// Configuration file
        file: PathBuf,
    },
    /// Check every page of the store and every signature in it; the keyserver must not be running
    #[command(after_help = "Example:
  keyserver verify --config /etc/mesh-keyserver/keyserver.toml")]
    Verify {
        /// Configuration file
        #[arg(long, value_name = "FILE", default_value = "/etc/mesh-keyserver/keyserver.toml")]
        config: PathBuf,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Let a keyserver write again whose store was restored from a copy: it starts a new history
    #[command(after_help = "Example:
  keyserver resume --config /etc/mesh-keyserver/keyserver.toml")]
    Resume {
        /// Configuration file
        #[arg(long, value_name = "FILE", default_value = "/etc/mesh-keyserver/keyserver.toml")]
        config: PathBuf,
    },
    /// The keyserver's own keys
    #[command(subcommand)]
    Keys(Keys),
    /// Print a completion script
    #[command(after_help = "Example:
  keyserver completion bash > /etc/bash_completion.d/keyserver")]
    Completion {
        /// For which shell
        shell: Shell,
    },
    /// Print the man page
    #[command(after_help = "Example:
  keyserver man | man -l -")]
    Man,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Keys {
    /// Replace one
    #[command(subcommand)]
    Rotate(Rotate),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Rotate {
    /// Replace the key that nodes know this keyserver by; it has to be running, and is restarted afterwards
    ///
    /// The next key is named in the trust policy beside the one in use, and every connected node confirms that. With its next
    /// start the keyserver takes it into use and takes the old one out of the policy. No node joins anew; one that was away
    /// hears of it from its peers. Where the policy is signed elsewhere, the key is named by meshctl policy propose.
    #[command(after_help = "Example:
  sudo -u mesh-keyserver keyserver keys rotate transport && systemctl restart keyserver

JSON: {\"policy_version\", \"online\", \"confirmed\", \"waiting\": [..], \"offline\": [..], \"done\"}")]
    Transport {
        /// Configuration file
        #[arg(long, value_name = "FILE", default_value = "/etc/mesh-keyserver/keyserver.toml")]
        config: PathBuf,
        /// How long to wait for connected nodes to confirm
        #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
        wait: Duration,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Replace the key that grants; no node joins anew, no packet is lost
    ///
    /// The keyserver, which has to be running, makes the next key, names it in the trust policy with the one in use as its
    /// former key, and grants every node anew. What the former key granted stands until then; its join tokens are void. Run
    /// again it says how far that is; with --finish the former key leaves the policy and is good for nothing. Ended at any
    /// step, by whatever, it goes on with the keyserver's next start, or when it is run again.
    ///
    /// Where the policy is signed elsewhere it says which meshctl policy propose to run; where the issuer's key is elsewhere
    /// too, everything is done by files (docs/operating.md).
    #[command(after_help = "Examples:
  keyserver keys rotate issuer
  keyserver keys rotate issuer --finish
  keyserver keys rotate issuer --finish --leave-absent
  keyserver keys rotate issuer --stolen

JSON: {\"policy_version\", \"issuer\", \"former\": [{\"key\", \"generation\", \"serial\"}], \"total\", \"holding\", \
\"waiting\": [..], \"absent\": [..], \"ungranted\": [..], \"voided_tokens\", \"done\"}
Exit status: 0 if every connected node holds a grant of the new key")]
    Issuer {
        /// Configuration file
        #[arg(long, value_name = "FILE", default_value = "/etc/mesh-keyserver/keyserver.toml")]
        config: PathBuf,
        /// The key in use is in other hands: nothing that it signed stands, and every node is granted anew at once
        #[arg(long, conflicts_with = "finish")]
        stolen: bool,
        /// Take the former key out of the policy, once every node is through
        #[arg(long)]
        finish: bool,
        /// Also while nodes are away: they get their grants when they come, and need not join again
        #[arg(long, requires = "finish")]
        leave_absent: bool,
        /// How long to wait for connected nodes; with --finish for all, unless --leave-absent
        #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
        wait: Duration,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
}

/// [`PostQuantum`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pq {
    /// No tunnel without one
    Required,
    /// Plain WireGuard
    Off,
}

impl From<Pq> for PostQuantum {
    fn from(pq: Pq) -> Self {
        match pq {
            Pq::Required => Self::Required,
            Pq::Off => Self::Off,
        }
    }
}

/// A pool in which nodes can have addresses: at least two, none of them special.
fn mesh_cidr(text: &str) -> Result<Ipv4Net, String> {
    let pool: Ipv4Net = text.parse().map_err(|_| format!("'{text}' is not an IPv4 network such as 100.96.0.0/16"))?;
    if pool.trunc() != pool {
        return Err(format!("'{text}' has bits beyond its prefix length: write {}", pool.trunc()));
    }
    if !(8..=30).contains(&pool.prefix_len()) {
        return Err(format!("'{text}' is not between /8 and /30"));
    }
    let special = ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"].map(str::parse::<Ipv4Net>);
    match special.into_iter().flatten().find(|special| special.contains(&pool) || pool.contains(special)) {
        Some(special) => Err(format!("'{text}' overlaps {special}, which is not for nodes")),
        None => Ok(pool),
    }
}

fn address(text: &str) -> Result<String, String> {
    check_address(text).map(|()| text.to_owned())
}
