//! The node daemon of Mesh: holds a tunnel to every peer, brings the host's network in line, gives pods their addresses.

mod api;
mod app;
mod args;
mod config;
mod control;
mod desired;
mod directory;
mod down;
mod exchange;
mod facts;
mod guard;
mod host;
mod identity;
mod join;
mod metrics;
mod offloads;
mod paths;
mod pods;
mod psk;
mod ready;
mod reconcile;
mod shutdown;
mod state_dir;
mod telemetry;

use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};

use args::{Cli, Command};
use config::{Config, ConfigError};

/// `EX_CONFIG` of sysexits.h: starting again does not help.
const CONFIGURATION: u8 = 78;

/// Locks what is in memory, and what will be once it is used, where the limit allows all of it (`LimitMEMLOCK=infinity`): a
/// smaller limit would make allocations fail later. Without, `MemorySwapMax=0` of the unit stands.
fn keep_out_of_swap() {
    use nix::{
        libc,
        sys::{
            mman::{MlockAllFlags, mlockall},
            resource::{RLIM_INFINITY, Resource, getrlimit},
        },
    };
    if getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft == RLIM_INFINITY) {
        // Pages that nothing touches are not brought in.
        let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
        let _ = mlockall(MlockAllFlags::from_bits_retain(flags));
    }
}

fn main() -> ExitCode {
    // Keys in memory are nobody's to read: no core dump, no debugger. Where the kernel refuses, LimitCORE= stands.
    let _ = nix::sys::prctl::set_dumpable(false);
    keep_out_of_swap();
    let cli = Cli::parse();
    // Configurations of TLS made without a provider use this one; a second call changes nothing.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("meshd: {error:#}");
            let configuration = error.chain().any(|cause| cause.is::<ConfigError>());
            if configuration { ExitCode::from(CONFIGURATION) } else { ExitCode::FAILURE }
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let json = cli.json;
    match cli.command {
        Command::Run { config } => {
            let config = load(&config.config)?;
            runtime()?.block_on(async {
                join::finish_waiting(&config.state_dir, app::control_setup(&config)).await?;
                app::run(config).await
            })
        }
        Command::Join { config, join } => {
            let config = load(&config.config)?;
            let joined = runtime()?.block_on(join::run(join, &config.state_dir, app::control_setup(&config)))?;
            print(json, &joined)
        }
        Command::Guard { config } => print(json, &guard::run(&load(&config.config)?.state_dir)?),
        Command::Down { config } => {
            down::run(&load(&config.config)?)?;
            print(json, &Done { done: "removed: nothing of the mesh is on this host's network".into() })
        }
        Command::TryOffloads { config, again } => print(json, &offloads::run(&load(&config.config)?, again)?),
        Command::CheckConfig { file, print_default } => check_config(json, file.as_deref(), print_default),
        Command::Completion { shell } => {
            let mut cli = Cli::command();
            clap_complete::generate(shell, &mut cli, "meshd", &mut io::stdout());
            Ok(())
        }
        Command::Man => manual(),
    }
}

fn load(path: &Path) -> anyhow::Result<Config> {
    let config = Config::load_or_default(path)?;
    telemetry::init(&config.log);
    Ok(config)
}

/// Two threads: lanes are threads of their own, so this one only carries control and the local API.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).thread_name("control").enable_all().build().context("start the runtime")
}

fn check_config(json: bool, file: Option<&Path>, print_default: bool) -> anyhow::Result<()> {
    let config = match file {
        Some(file) => Config::load(file)?,
        None => Config::default(),
    };
    if json {
        return write(&format!("{}\n", serde_json::to_string(&config)?));
    }
    match file {
        _ if print_default => write(&toml::to_string(&config).context("write the defaults")?),
        Some(file) => write(&format!("{}: fine\n", file.display())),
        None => Ok(()),
    }
}

/// The page of the program, then those of its commands.
fn manual() -> anyhow::Result<()> {
    let mut page = Vec::new();
    let mut cli = Cli::command();
    cli.build();
    clap_mangen::Man::new(cli.clone()).render(&mut page)?;
    for command in cli.get_subcommands().filter(|command| command.get_name() != "help") {
        let man = clap_mangen::Man::new(command.clone());
        man.render_name_section(&mut page)?;
        man.render_synopsis_section(&mut page)?;
        man.render_description_section(&mut page)?;
        man.render_options_section(&mut page)?;
        man.render_extra_section(&mut page)?;
    }
    write(&String::from_utf8_lossy(&page))
}

/// What a command with nothing else to tell has to say.
#[derive(serde::Serialize)]
struct Done {
    done: String,
}

impl std::fmt::Display for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.done)
    }
}

fn print(json: bool, value: &(impl serde::Serialize + std::fmt::Display)) -> anyhow::Result<()> {
    let text = if json { serde_json::to_string(value)? } else { value.to_string() };
    write(&format!("{text}\n"))
}

/// Writes to standard output; a reader that closed it is no error.
fn write(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("write to standard output"),
        _ => Ok(()),
    }
}
