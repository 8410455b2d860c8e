//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand};

use super::candidate::{self, Field, Places};
use super::link::LinkKind;
use super::load::LoadCommand;
use super::measure::{Pace, Test};
use super::run::Plan;

/// Measures Mesh's data plane, its rivals and the bare link between two namespaces of this machine
#[derive(Debug, Parser)]
#[command(name = "bench", max_term_width = 110, subcommand_required = true, arg_required_else_help = true)]
#[command(
    after_help = "Examples:\n  bench run\n  bench run --quick --only bare,mesh --tests tcp1,rr --link trains\n  \
                        bench report target/bench/latest.json --markdown\n\nExit codes: 0 done, 1 failed, 2 usage."
)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measure. Needs root; removes all that it makes, also when interrupted
    Run(Box<RunArgs>),
    /// Show the results of an earlier run
    Report {
        /// What the run wrote
        file: PathBuf,
        /// As Markdown tables
        #[arg(long)]
        markdown: bool,
    },
    /// Name the candidates that can be had here, and those that cannot
    List(PlaceArgs),
    /// Generate load inside a namespace
    #[command(subcommand, hide = true)]
    Load(LoadCommand),
}

/// Where candidates are.
#[derive(Debug, Args)]
pub struct PlaceArgs {
    /// The mesh-wg to measure [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    pub mesh_wg: Option<PathBuf>,
    /// Another wireguard-go; takes part as `wireguard-go-given`
    #[arg(long, value_name = "PATH")]
    pub wireguard_go: Option<PathBuf>,
    /// Where the bench keeps its results, and rivals below `rivals/bin`; the search path comes after it
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub dir: PathBuf,
}

/// What to measure, and how.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Where candidates are
    #[command(flatten)]
    pub places: PlaceArgs,
    /// Only these candidates, by name
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Only these tests
    #[arg(long, value_name = "TEST", value_delimiter = ',', value_enum)]
    pub tests: Vec<Test>,
    /// Only this link
    #[arg(long, value_name = "LINK", value_enum)]
    pub link: Option<LinkKind>,
    /// One short round, without waiting for quiet: for a first look, not for a claim
    #[arg(long)]
    pub quick: bool,
    /// How often everything is measured [default: 3]
    #[arg(long)]
    pub rounds: Option<u32>,
    /// In how many of the rounds many peers are configured
    #[arg(long, default_value_t = 1)]
    pub peer_rounds: u32,
    /// Keep all candidates up, each on a link of its own, and take samples in turn: short ones then meet the same state of the
    /// machine. Not for `start` and `peers`
    #[arg(long)]
    pub together: bool,
    /// Seconds of each TCP and request/response sample [default: 8]
    #[arg(long)]
    pub secs: Option<f64>,
    /// Cores that others may keep busy in a sample that counts as quiet
    #[arg(long, value_name = "CORES", default_value_t = 0.15)]
    pub max_foreign: f64,
    /// Seconds to wait for quiet before each sample [default: 30]
    #[arg(long, value_name = "SECONDS")]
    pub wait_quiet: Option<f64>,
    /// Niceness of all that the bench starts; -19 keeps a busy neighbour away, but changes latencies
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub nice: Option<i32>,
    /// Where the results go [default: TIME.json in DIR, and latest.json beside it]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

impl PlaceArgs {
    /// Looks for candidates.
    #[must_use]
    pub fn find(&self) -> Field {
        candidate::find(&Places {
            mesh_wg: self.mesh_wg.clone(),
            wireguard_go: self.wireguard_go.clone(),
            rivals: self.dir.join("rivals"),
        })
    }
}

impl RunArgs {
    fn default_out(&self) -> PathBuf {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_secs());
        self.places.dir.join(format!("{now}.json"))
    }

    /// Where the newest results are found under a name that stays, unless they go to a file of the caller's choice.
    #[must_use]
    pub fn latest(&self) -> Option<PathBuf> {
        self.out.is_none().then(|| self.places.dir.join("latest.json"))
    }

    /// The candidates asked for.
    ///
    /// # Errors
    /// If one of them is unknown, or cannot be had.
    pub fn field(&self) -> Result<Field> {
        let mut field = self.places.find();
        if self.only.is_empty() {
            return Ok(field);
        }
        for name in &self.only {
            if let Some((_, reason)) = field.absent.iter().find(|(absent, _)| absent == name) {
                anyhow::bail!("{name} cannot be had here: {reason}");
            }
            let known: Vec<&str> = field.present.iter().map(|one| one.name.as_str()).collect();
            ensure!(known.contains(&name.as_str()), "no candidate {name}; there are {}", known.join(", "));
        }
        field.present.retain(|one| self.only.contains(&one.name));
        field.absent.clear();
        Ok(field)
    }

    /// What to run.
    ///
    /// # Errors
    /// If a number makes no sense.
    pub fn plan(&self) -> Result<Plan> {
        let quick = self.quick;
        let default = |slow: f64, fast: f64| if quick { fast } else { slow };
        let seconds = self.secs.unwrap_or(default(8.0, 1.0));
        ensure!((0.1..=3600.0).contains(&seconds), "--secs {seconds}: give 0.1 to 3600");
        let wait_quiet = self.wait_quiet.unwrap_or(default(30.0, 0.0));
        ensure!((0.0..=3600.0).contains(&wait_quiet), "--wait-quiet {wait_quiet}: give 0 to 3600");
        let rounds = self.rounds.unwrap_or(if quick { 1 } else { 3 });
        ensure!(rounds > 0, "--rounds 0: give at least 1");
        let mut tests = if self.tests.is_empty() { Test::ALL.to_vec() } else { self.tests.clone() };
        if self.together {
            let alone = self.tests.iter().find(|test| !test.is_load());
            ensure!(
                alone.is_none(),
                "--together: `{}` needs a daemon of its own",
                alone.map_or("", |test| test.name())
            );
            tests.retain(|test| test.is_load());
        }
        Ok(Plan {
            tests,
            together: self.together,
            links: self.link.map_or_else(|| vec![LinkKind::Trains, LinkKind::Wire], |link| vec![link]),
            rounds,
            peer_rounds: self.peer_rounds,
            pace: Pace {
                seconds,
                udp_seconds: default(1.5, 0.3),
                udp_close: default(1.03, 1.2),
                pings: if quick { 1000 } else { 10_000 },
                peers: &[1000, 10_000],
                idle_seconds: default(5.0, 1.0),
                max_foreign: self.max_foreign,
                wait_quiet: Duration::from_secs_f64(wait_quiet),
                repeats: if quick { 0 } else { 2 },
            },
            out: self.out.clone().unwrap_or_else(|| self.default_out()),
        })
    }
}
