//! The bench's program: see [`mesh_e2e::bench`].

use std::process::ExitCode;
use std::thread;

use anyhow::{Context as _, Result, anyhow};
use clap::Parser as _;
use mesh_e2e::bench::args::{Cli, Command, PlaceArgs, RunArgs};
use mesh_e2e::bench::priority::Priority;
use mesh_e2e::bench::results::Results;
use mesh_e2e::bench::{child, load, report, run};
use nix::sys::signal::{SigSet, Signal};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => measure(*args),
        Command::Report { file, markdown } => show(&file, markdown),
        Command::List(places) => {
            list(&places);
            Ok(())
        }
        Command::Load(command) => load::run(&command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show(file: &std::path::Path, markdown: bool) -> Result<()> {
    let results = Results::read(file)?;
    print!("{}", if markdown { report::markdown(&results) } else { report::text(&results) });
    Ok(())
}

fn list(places: &PlaceArgs) {
    let field = places.find();
    for one in field.present {
        println!("{:<20} {}", one.name, one.version);
    }
    for (name, reason) in field.absent {
        println!("{name:<20} left out: {reason}");
    }
}

fn measure(args: RunArgs) -> Result<()> {
    // Before any thread starts: all of them leave these signals to the one that waits for them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGHUP);
    signals.thread_block().context("block signals")?;
    let _priority = args.nice.map(Priority::new).transpose()?;
    thread::spawn(move || {
        let _ = signals.wait();
        eprintln!("bench: interrupted, removing everything");
        child::interrupt();
    });
    // The kernel kills children with the thread that started them: one thread starts them all, and lives to the end.
    let worker = thread::spawn(move || work(&args));
    worker.join().map_err(|_| anyhow!("the bench panicked"))?
}

fn work(args: &RunArgs) -> Result<()> {
    let (plan, field) = (args.plan()?, args.field()?);
    for one in &field.present {
        println!("{:<20} {}", one.name, one.version);
    }
    for (name, reason) in &field.absent {
        println!("{name:<20} left out: {reason}");
    }
    let results = run::run(&plan, &field)?;
    print!("{}", report::text(&results));
    println!("\nwritten to {}", plan.out.display());
    if let Some(latest) = args.latest() {
        std::fs::copy(&plan.out, &latest).with_context(|| format!("write {}", latest.display()))?;
    }
    Ok(())
}
