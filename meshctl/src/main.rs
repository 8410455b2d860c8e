//! The operator's command line for Mesh.
//!
//! Each verb is one file under [`command`]: it asks `meshd` or the keyserver over a Unix socket ([`client`]) and prints a
//! table or one JSON document ([`output`]). Everything a verb produces goes to standard output, everything about how it
//! went (progress, hints, errors) to standard error.

mod args;
mod client;
mod command;
mod files;
mod output;
mod signer;

use std::io;
use std::process::ExitCode;

use clap::Parser as _;

use crate::args::Cli;
use crate::client::ClientError;

fn main() -> ExitCode {
    // Some verbs sign: keys in memory are nobody's to read, neither from a core dump nor with a debugger.
    let _ = nix::sys::prctl::set_dumpable(false);
    let cli = Cli::parse();
    let json = cli.json;
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::FAILURE,
        Err(error) => {
            output::error(&error, json);
            ExitCode::from(exit_code(&error))
        }
    }
}

/// 78 for a configuration that can never work, 1 for everything else that failed (2, usage, is clap's).
fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::BadPath { .. }) => 78,
        _ => 1,
    }
}

/// The reader of our standard output went away (`meshctl peers | head -1`): nobody is left to be told.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
