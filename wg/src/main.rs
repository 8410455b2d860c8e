//! `mesh-wg IFACE`: see the library and `--help`.

mod args;
mod background;
mod run;

use std::{
    env,
    io::{self, IsTerminal as _},
    process::ExitCode,
};

use clap::{CommandFactory as _, Parser as _};
use tracing_subscriber::filter::LevelFilter;

use args::Cli;

fn main() -> ExitCode {
    // Keys in memory are nobody's to read: no core dump, no debugger.
    let _ = nix::sys::prctl::set_dumpable(false);
    let cli = Cli::parse();
    let done = if cli.man {
        clap_mangen::Man::new(Cli::command()).render(&mut io::stdout()).map(|()| ExitCode::SUCCESS)
    } else if let Some(shell) = cli.completion {
        clap_complete::generate(shell, &mut Cli::command(), "mesh-wg", &mut io::stdout());
        Ok(ExitCode::SUCCESS)
    } else {
        Ok(serve(&cli))
    };
    done.unwrap_or_else(|error| fail(&error.into()))
}

fn serve(cli: &Cli) -> ExitCode {
    let Some(iface) = &cli.iface else { return ExitCode::from(2) };
    let foreground = cli.foreground || env::var("WG_PROCESS_FOREGROUND").is_ok_and(|value| value == "1");
    if !foreground && !background::is_background() {
        return background::start().unwrap_or_else(|error| fail(&error.into()));
    }
    log();
    match run::run(iface, !foreground) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("mesh-wg: {error:#}");
    ExitCode::FAILURE
}

/// Logs to standard error at the level that wireguard-go's variable names.
fn log() {
    let level = match env::var("LOG_LEVEL").as_deref() {
        Ok("verbose" | "debug") => LevelFilter::DEBUG,
        Ok("silent") => LevelFilter::OFF,
        _ => LevelFilter::WARN,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .init();
}
