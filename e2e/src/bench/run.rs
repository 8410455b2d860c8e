//! A run: rounds over links and candidates, one after the other, so that a change of the machine meets all alike.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde_json::json;

use super::candidate::{Candidate, Field, wireguard};
use super::child;
use super::cpu::{self, Cpu};
use super::link::{Link, LinkKind};
use super::measure::{self, Figures, Pace, Test};
use super::report;
use super::results::{Results, Sample};
use super::tunnel::Tunnel;

/// What to run.
#[derive(Debug)]
pub struct Plan {
    /// In this order within a round.
    pub tests: Vec<Test>,
    /// In this order within a round.
    pub links: Vec<LinkKind>,
    /// All candidates are up all the time.
    pub together: bool,
    /// How often everything is measured.
    pub rounds: u32,
    /// In how many of the rounds many peers are.
    pub peer_rounds: u32,
    /// How long and how careful.
    pub pace: Pace,
    /// Where results go.
    pub out: PathBuf,
}

/// Runs it all; gives the results.
///
/// # Errors
/// If the lab cannot be made, results cannot be written, or the bench is interrupted. A candidate that fails is a
/// sample with an error, and the run goes on.
pub fn run(plan: &Plan, field: &Field) -> Result<Results> {
    ensure!(nix::unistd::geteuid().is_root(), "the bench makes network namespaces: run as root");
    wireguard::remove_leftovers();
    let cpu = Cpu::new()?;
    let mut results = Results::new(&plan.out, field)?;
    if plan.together {
        for kind in &plan.links {
            run_together(plan, field, &cpu, *kind, &mut results)?;
        }
        return Ok(results);
    }
    let links = plan.links.iter().map(|kind| Link::new(*kind, 0)).collect::<Result<Vec<_>>>()?;
    for round in 0..plan.rounds {
        for link in &links {
            // Another one begins in each round: none always follows the same neighbour.
            let many = field.present.len();
            for candidate in field.present.iter().cycle().skip(round as usize % many).take(many) {
                let mut turn = Turn { plan, cpu: &cpu, round, link, candidate, results: &mut results };
                if let Err(error) = turn.take() {
                    child::ensure_running()?;
                    turn.record("up", Err(error))?;
                }
            }
        }
    }
    Ok(results)
}

/// All rounds on one kind of link, of candidates that are all up: what does not come up is left out.
fn run_together(plan: &Plan, field: &Field, cpu: &Cpu, kind: LinkKind, results: &mut Results) -> Result<()> {
    let links =
        (0..field.present.len()).map(|place| Link::new(kind, u8::try_from(place)?)).collect::<Result<Vec<_>>>()?;
    let mut tunnels = Vec::new();
    for (candidate, link) in field.present.iter().zip(&links) {
        match Tunnel::up(candidate, link) {
            Ok(tunnel) => tunnels.push((candidate, link, tunnel)),
            Err(error) => {
                child::ensure_running()?;
                Turn { plan, cpu, round: 0, link, candidate, results }.record("up", Err(error))?;
            }
        }
    }
    for round in 0..plan.rounds {
        let many = tunnels.len();
        for (candidate, link, tunnel) in tunnels.iter().cycle().skip(round as usize % many.max(1)).take(many) {
            let mut turn = Turn { plan, cpu, round, link, candidate, results };
            for test in &plan.tests {
                let figures = turn.sample(*test, tunnel);
                child::ensure_running()?;
                turn.record(test.name(), figures)?;
            }
        }
    }
    Ok(())
}

/// One candidate's turn on one link in one round.
struct Turn<'a> {
    plan: &'a Plan,
    cpu: &'a Cpu,
    round: u32,
    link: &'a Link,
    candidate: &'a Candidate,
    results: &'a mut Results,
}

impl Turn<'_> {
    fn take(&mut self) -> Result<()> {
        let wanted = |test| self.plan.tests.contains(&test);
        let start = wanted(Test::Start);
        let peers = wanted(Test::Peers) && self.round < self.plan.peer_rounds && self.candidate.takes_peers();
        if start || self.plan.tests.iter().any(|test| test.is_load()) {
            self.loads(start)?;
        }
        if peers {
            // A fresh daemon: what it keeps of an earlier load is no memory for peers.
            let tunnel = Tunnel::up(self.candidate, self.link)?;
            self.cpu.wait_quiet(self.plan.pace.max_foreign, self.plan.pace.wait_quiet)?;
            let figures = measure::peers(&tunnel, &self.plan.pace);
            child::ensure_running()?;
            self.record(Test::Peers.name(), figures)?;
        }
        Ok(())
    }

    fn loads(&mut self, start: bool) -> Result<()> {
        let tunnel = Tunnel::up(self.candidate, self.link)?;
        let mut figures = Figures::new();
        figures.insert("first_packet_ms".to_owned(), json!(tunnel.first_packet.as_secs_f64() * 1e3));
        if let Some(resident) = resident(&tunnel)? {
            figures.insert("start_ms".to_owned(), json!(tunnel.start.as_secs_f64() * 1e3));
            figures.insert("rss_idle_mib".to_owned(), json!(resident));
        }
        for test in self.plan.tests.iter().filter(|test| test.is_load()) {
            let figures = self.sample(*test, &tunnel);
            child::ensure_running()?;
            self.record(test.name(), figures)?;
        }
        if let Some(resident) = resident(&tunnel)? {
            figures.insert("rss_loaded_mib".to_owned(), json!(resident));
        }
        drop(tunnel);
        if start { self.record(Test::Start.name(), Ok(figures)) } else { Ok(()) }
    }

    /// Takes a sample, again while others disturb it, and keeps the quietest.
    fn sample(&self, test: Test, tunnel: &Tunnel<'_>) -> Result<Figures> {
        let pace = &self.plan.pace;
        self.cpu.wait_quiet(pace.max_foreign, pace.wait_quiet)?;
        let mut best: Option<(f64, Result<Figures>)> = None;
        for _ in 0..=if test.is_repeated() { pace.repeats } else { 0 } {
            let (foreign, figures) = self.once(test, tunnel);
            child::ensure_running()?;
            let better =
                best.as_ref().is_none_or(|(least, kept)| kept.is_err() || (figures.is_ok() && foreign < *least));
            if better {
                best = Some((foreign, figures));
            }
            if matches!(&best, Some((foreign, Ok(_))) if *foreign <= pace.max_foreign) {
                break;
            }
        }
        best.map_or_else(|| Ok(Figures::new()), |(_, figures)| figures)
    }

    fn once(&self, test: Test, tunnel: &Tunnel<'_>) -> (f64, Result<Figures>) {
        let pids = tunnel.pids();
        let before = self.cpu.read(&pids);
        let figures = measure::load(test, tunnel, self.cpu, &self.plan.pace);
        let used = self.cpu.since(&before, &pids);
        let foreign = used.foreign.unwrap_or_default();
        let figures = figures.map(|mut figures| {
            for (amount, unit, factor) in [("gb", "s_per_gb", 1.0), ("exchanges", "us_per_exchange", 1e6)] {
                let Some(amount) = figures.get(amount).and_then(serde_json::Value::as_f64) else { continue };
                if used.foreign.is_some() {
                    figures.insert(format!("machine_cpu_{unit}"), json!(used.machine / amount * factor));
                }
                figures.insert(format!("daemon_cpu_{unit}"), json!(used.daemons / amount * factor));
            }
            figures.insert("foreign".to_owned(), used.foreign.map_or(serde_json::Value::Null, |cores| json!(cores)));
            figures
        });
        (foreign, figures)
    }

    fn record(&mut self, test: &str, figures: Result<Figures>) -> Result<()> {
        let (figures, error) = match figures {
            Ok(figures) => (figures, None),
            Err(error) => (Figures::new(), Some(format!("{error:#}"))),
        };
        let sample = Sample {
            round: self.round,
            candidate: self.candidate.name.clone(),
            link: self.link.kind.name().to_owned(),
            test: test.to_owned(),
            figures,
            error,
        };
        println!("{}", report::line(&sample));
        self.results.add(sample)
    }
}

/// Resident memory of the larger of both daemons, in MiB.
fn resident(tunnel: &Tunnel<'_>) -> Result<Option<f64>> {
    let each = tunnel.pids().into_iter().map(cpu::resident_mib).collect::<Result<Vec<f64>>>()?;
    Ok(each.into_iter().reduce(f64::max))
}
