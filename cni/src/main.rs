//! The CNI plugin of Mesh: attaches pods, for CNI 0.3.1 to 1.1.0.
//!
//! A runtime starts it once for each thing it wants, with the request in the environment and the configuration on standard
//! input, and reads the answer, or an error, as JSON from standard output. Nothing else is ever printed there.
//!
//! ```text
//! input  -> command -> attach, check, detach, collect -> reply
//!                         |        client: leases from meshd       released: what meshd could not be told
//!                         +------- hostnet: links, addresses, neighbours, routes
//! ```
//!
//! The plugin keeps no state: meshd knows the leases, the kernel the links, and a link's name follows from the attachment.
//! So whatever a crash leaves behind is found, and removed, by the same names.

mod attach;
mod check;
mod client;
mod collect;
mod command;
mod detach;
mod input;
mod released;
mod reply;
mod wiring;

use std::io::{self, Write as _};
use std::process::ExitCode;

fn main() -> ExitCode {
    let (version, outcome) = command::answer();
    let (text, code) = match outcome {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(failure) => (failure.to_json(&version), ExitCode::FAILURE),
    };
    if text.is_empty() {
        return code;
    }
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
        Ok(()) => code,
        // The runtime is gone, or will see no answer: either way it has to undo with DEL.
        Err(_) => ExitCode::FAILURE,
    }
}

/// Says something on standard error, where runtimes log it. Never fails.
fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "mesh-cni: {text}");
}
