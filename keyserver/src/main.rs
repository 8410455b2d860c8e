//! Enrols nodes and tells each who its peers are.
//!
//! ```text
//! listen ──┬── join ──────┐                                     ┌── watch ── session
//!          └── session ───┤                                     │
//! admin ──────────────────┴── writer ── directory ── store ── history
//! ```

mod admin;
mod app;
mod args;
mod ask;
mod config;
mod directory;
mod init;
mod issuer;
mod join;
mod keys;
mod listen;
mod metrics;
mod reset;
mod resume;
mod session;
mod store;
mod throttle;
mod transport;
mod verify;
mod watermark;
mod wire;
mod writer;

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};

use crate::args::{Args, Command, Keys, Rotate};
use crate::config::{Config, ConfigError};

/// `EX_CONFIG` of sysexits.h: systemd is told not to try again.
const EXIT_CONFIG: u8 = 78;
/// Arguments that do not go together; clap ends with the same code.
const EXIT_USAGE: u8 = 2;

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
    // Nothing that this program makes is anybody else's: files, directories, the operators' socket.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    // Keys in memory neither: no core dump, no debugger. Where the kernel refuses, LimitCORE= stands.
    let _ = nix::sys::prctl::set_dumpable(false);
    keep_out_of_swap();
    match dispatch(Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be closed; the exit code still tells.
            let _ = writeln!(std::io::stderr(), "keyserver: {error:#}");
            if error.is::<init::Overlap>() {
                return ExitCode::from(EXIT_USAGE);
            }
            let config = error.chain().any(|cause| {
                cause.is::<ConfigError>() || cause.is::<keys::KeyFileError>() || cause.is::<app::NoMesh>()
            });
            if config { ExitCode::from(EXIT_CONFIG) } else { ExitCode::FAILURE }
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Init { dir, signed, json, .. } if !signed.is_empty() => {
            print_made(&init::finish(&dir, &signed).context("make a mesh")?, json)
        }
        Command::Init {
            dir,
            name,
            address,
            mesh_cidr,
            exposure,
            pq,
            json,
            strict,
            roots,
            threshold,
            issuers,
            revokers,
            ..
        } => {
            let (Some(name), Some(address)) = (name, address) else {
                anyhow::bail!("--name and --address are needed");
            };
            let elsewhere = strict.then_some(init::Elsewhere { roots, threshold, issuers, revokers });
            let new = init::NewMesh { dir, name, address, mesh_cidr, exposure, pq: pq.into(), elsewhere };
            print_made(&init::init(&new).context("make a mesh")?, json)
        }
        Command::Run { config } => run(&config),
        Command::CheckConfig { file } => {
            Config::load(&file)?;
            Ok(writeln!(std::io::stdout(), "{}: good", file.display())?)
        }
        Command::Verify { config, json } => verify::verify(&Config::load(&config)?, json),
        Command::Keys(Keys::Rotate(Rotate::Transport { config, wait, json })) => {
            transport::rotate(&Config::load(&config)?, wait, json)
        }
        Command::Keys(Keys::Rotate(Rotate::Issuer { config, stolen, finish, leave_absent, wait, json })) => {
            let order = issuer::Order { stolen, finish, leave_absent, wait, json };
            issuer::rotate(&Config::load(&config)?, order)
        }
        Command::Resume { config } => resume::resume(&Config::load(&config)?),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Args::command(), "keyserver", &mut std::io::stdout());
            Ok(())
        }
        Command::Man => Ok(clap_mangen::Man::new(Args::command()).section("8").render(&mut std::io::stdout())?),
    }
}

fn run(path: &Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    app::start_logging(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    let result = runtime.block_on(app::run(config));
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result
}

fn print_made(made: &init::Made, json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    if json {
        let document = serde_json::json!({
            "mesh": made.name, "mesh_id": made.mesh, "config": made.config, "proposal": made.proposal,
        });
        return Ok(writeln!(out, "{document}")?);
    }
    let (config, keys) = (made.config.display(), made.keys.display());
    let Some(mesh) = made.mesh else {
        let proposal = made.proposal.as_deref().unwrap_or(Path::new("?")).display();
        writeln!(
            out,
            "mesh {} is begun: its first trust policy waits for its roots in\n  {proposal}\n\nNext:",
            made.name
        )?;
        writeln!(
            out,
            "  meshctl policy sign {proposal} --signer ROOT-KEY --out SIGNED   (each root, where its key is)"
        )?;
        return Ok(writeln!(out, "  keyserver init --dir {} --signed SIGNED", made.keys.with_file_name("").display())?);
    };
    writeln!(out, "mesh {} is made, its id is {mesh}\n", made.name)?;
    writeln!(out, "Its keys are in {keys}: keep a copy in a safe place.\n\nNext:")?;
    writeln!(out, "  keyserver run --config {config}")?;
    writeln!(out, "  meshctl cluster add east --pod-cidr 10.1.0.0/16 --node-prefix 24")?;
    Ok(writeln!(out, "  meshctl token create --cluster east --uses 1 --ttl 1h")?)
}
