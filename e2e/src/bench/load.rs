//! Load generators: processes inside a namespace that print one JSON object at the end.
//!
//! They are hidden subcommands of the bench itself (`bench load ...`), so that what they cost is counted apart from the
//! daemons, and nothing has to be installed.

mod ping;
mod rr;
mod tcp;
mod udp;

use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use clap::Subcommand;
use serde_json::Value;

/// A connection that carries nothing for this long is dead.
const DEAD: Duration = Duration::from_secs(20);

/// What to generate.
#[derive(Debug, Subcommand)]
pub enum LoadCommand {
    /// Takes TCP streams until they end; checks what arrives
    TcpServe {
        /// Address to listen on
        address: Ipv4Addr,
        /// Streams to take
        streams: usize,
    },
    /// Sends over TCP streams
    TcpSend {
        /// Address of the other end
        address: Ipv4Addr,
        /// Streams to open
        streams: usize,
        /// How long to send, in seconds
        seconds: f64,
    },
    /// Answers one byte with one byte until its input ends
    RrServe {
        /// Address to listen on
        address: Ipv4Addr,
    },
    /// Sends one byte, waits for one byte
    Rr {
        /// Address of the other end
        address: Ipv4Addr,
        /// For how long, in seconds
        seconds: f64,
    },
    /// Counts datagrams until its input ends
    UdpSink {
        /// Address to listen on
        address: Ipv4Addr,
        /// Port
        port: u16,
        /// Bytes each must have
        size: usize,
    },
    /// Sends datagrams
    UdpBlast {
        /// Address of the other end
        address: Ipv4Addr,
        /// Port
        port: u16,
        /// Bytes of each
        size: usize,
        /// How many a second; 0 for as many as go
        rate: f64,
        /// For how long, in seconds
        seconds: f64,
    },
    /// Sends echo requests
    Ping {
        /// Address of the other end
        address: Ipv4Addr,
        /// How many
        count: usize,
        /// Time between two, in microseconds; 0 for back to back
        interval: u64,
    },
}

/// Runs one, and prints its figures.
///
/// # Errors
/// If a socket is refused or a connection breaks.
pub fn run(command: &LoadCommand) -> Result<()> {
    let figures = match *command {
        LoadCommand::TcpServe { address, streams } => tcp::serve(address, streams)?,
        LoadCommand::TcpSend { address, streams, seconds } => tcp::send(address, streams, seconds)?,
        LoadCommand::RrServe { address } => rr::serve(address)?,
        LoadCommand::Rr { address, seconds } => rr::request(address, seconds)?,
        LoadCommand::UdpSink { address, port, size } => udp::sink(address, port, size)?,
        LoadCommand::UdpBlast { address, port, size, rate, seconds } => {
            udp::blast((address, port), size, rate, seconds)?
        }
        LoadCommand::Ping { address, count, interval } => ping::ping(address, count, Duration::from_micros(interval))?,
    };
    print(&figures)
}

fn print(figures: &Value) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{figures}")?;
    Ok(out.flush()?)
}

/// Says that load may come.
fn ready() -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    Ok(out.flush()?)
}

/// Becomes true when this process's input ends.
fn input_ended() -> Arc<AtomicBool> {
    let ended = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&ended);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        flag.store(true, Ordering::Relaxed);
    });
    ended
}

/// The value at `share` of the way through, in microseconds with one decimal; `values` in nanoseconds, sorted.
fn percentile_us(values: &[u64], share: f64) -> f64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in a list")]
    let at = ((values.len() as f64 * share) as usize).min(values.len().saturating_sub(1));
    values.get(at).map_or(0.0, |nanos| (*nanos as f64 / 100.0).round() / 10.0)
}
