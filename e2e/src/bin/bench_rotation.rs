//! `make bench-rotation`: packets lost while keys rotate, at full load and at one packet a second, with few nodes and many.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use mesh_e2e::rotation::{Line, Rate, Ring, table};

/// Counts packets while every node's keys rotate
#[derive(Debug, Parser)]
struct Args {
    /// Nodes in the mesh; several numbers make several meshes, one after the other
    #[arg(long, value_delimiter = ',', default_values_t = [2, 5, 50])]
    nodes: Vec<usize>,
    /// Rotations of every node at each rate
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10))]
    rotations: u32,
    /// Post-quantum preshared keys: `off`, `required`; both make a mesh of each
    #[arg(long, value_delimiter = ',', default_values_t = ["off".to_owned(), "required".to_owned()])]
    pq: Vec<String>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(lines) => {
            let lost = lines.iter().any(|line| line.lost > 0 || line.duplicated > 0);
            if lost {
                eprintln!("packets were lost or came twice");
            }
            if lost { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Err(error) => {
            eprintln!("bench-rotation: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for nodes in &args.nodes {
        for pq in &args.pq {
            eprintln!("{nodes} nodes, pq {pq}");
            let mut ring = Ring::new(*nodes, pq)?;
            for rate in [Rate::OnePerSecond, Rate::Full] {
                let line = ring.measure(rate, args.rotations).inspect_err(|_| eprintln!("{}", ring.logs()))?;
                eprintln!("  {} packets/s: {} sent, {} lost", line.per_second, line.sent, line.lost);
                lines.push(line);
            }
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&lines)?);
    } else {
        print!("{}", table(&lines));
    }
    Ok(lines)
}
