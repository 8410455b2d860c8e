//! The highest UDP rate that arrives with at most one per cent lost.

use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::Result;
use serde_json::{Value, json};

use super::child;
use super::cpu::Cpu;
use super::measure::{Pace, args, far, near, number};
use super::tunnel::Tunnel;

const MAX_LOSS: f64 = 0.01;
/// A rate counts only if the sender came this close to it.
const REACHED: f64 = 0.97;
/// How far the rate moves while only one side is known.
const STEP: f64 = 1.3;
const MAX_TRIALS: usize = 16;
/// A rate fails on two quiet attempts: one hiccup of a busy machine is not a limit of the tunnel.
const QUIET_FAILURES: u32 = 2;
const MAX_ATTEMPTS: u32 = 5;
const FIRST_PORT: u16 = 8000;
const PORTS: u16 = 1000;

static TRIALS: AtomicU16 = AtomicU16::new(0);

#[derive(Debug, Clone, Copy)]
struct Trial {
    sent_rate: f64,
    rate: f64,
    loss: f64,
    late: f64,
}

/// Searches with datagrams of `size` bytes.
///
/// # Errors
/// If the generators fail, or a datagram arrives damaged.
pub(super) fn udp(tunnel: &Tunnel<'_>, size: usize, cpu: &Cpu, pace: &Pace) -> Result<Value> {
    let flood = trial(tunnel, size, 0.0, pace.udp_seconds)?;
    let mut bracket = Bracket::new(flood.rate.max(2000.0), pace.udp_close);
    let mut best = None;
    while let Some(rate) = bracket.next() {
        let passed = attempt(tunnel, size, rate, cpu, pace)?;
        bracket.tell(passed.is_some());
        best = passed.or(best);
    }
    let best = best.unwrap_or(Trial { sent_rate: 0.0, rate: 0.0, loss: 1.0, late: 0.0 });
    Ok(json!({
        "packets_per_second": best.rate,
        "mbit_per_second": best.rate * size as f64 * 8.0 / 1e6,
        "loss": best.loss,
        "late": best.late,
        "flood_sent_per_second": flood.sent_rate,
        "flood_per_second": flood.rate,
    }))
}

/// Whether `rate` passes; the trial if so.
fn attempt(tunnel: &Tunnel<'_>, size: usize, rate: f64, cpu: &Cpu, pace: &Pace) -> Result<Option<Trial>> {
    let mut quiet = 0;
    for _ in 0..MAX_ATTEMPTS {
        let before = cpu.read(&[]);
        let trial = trial(tunnel, size, rate, pace.udp_seconds)?;
        if trial.loss <= MAX_LOSS && trial.sent_rate > REACHED * rate {
            return Ok(Some(trial));
        }
        let foreign = cpu.since(&before, &[]).foreign.unwrap_or_default();
        quiet += u32::from(foreign <= 2.0 * pace.max_foreign);
        if quiet == QUIET_FAILURES || pace.repeats == 0 {
            break;
        }
    }
    Ok(None)
}

fn trial(tunnel: &Tunnel<'_>, size: usize, rate: f64, seconds: f64) -> Result<Trial> {
    // Each its own: some tunnels deliver what was sent earlier after seconds in their queues.
    let port = FIRST_PORT + TRIALS.fetch_add(1, Ordering::Relaxed) % PORTS;
    let sink = far(tunnel, &args("udp-sink", tunnel, &[&port, &size]))?;
    let sent = near(tunnel, &args("udp-blast", tunnel, &[&port, &size, &rate, &seconds]), seconds)?;
    // What is still on its way arrives within this.
    child::pause(std::time::Duration::from_millis(300))?;
    let got = sink.finish()?;
    let damaged = number(&got, "damaged")?;
    anyhow::ensure!(damaged == 0.0, "{damaged} datagrams arrived damaged");
    let (sent_count, received) = (number(&sent, "sent")?, number(&got, "received")?);
    let time = number(&sent, "seconds")?;
    Ok(Trial {
        sent_rate: sent_count / time,
        rate: received / time,
        loss: 1.0 - received / sent_count.max(1.0),
        late: number(&got, "late")? / received.max(1.0),
    })
}

/// Which rate to try next: by steps until one passed and one failed, then half-way between.
#[derive(Debug)]
struct Bracket {
    passed: Option<f64>,
    failed: Option<f64>,
    rate: f64,
    close: f64,
    trials: usize,
}

impl Bracket {
    fn new(rate: f64, close: f64) -> Self {
        Self { passed: None, failed: None, rate, close, trials: 0 }
    }

    fn next(&mut self) -> Option<f64> {
        let is_close =
            matches!((self.passed, self.failed), (Some(passed), Some(failed)) if failed / passed < self.close);
        if is_close || self.trials == MAX_TRIALS || (self.passed.is_none() && self.rate < 500.0) {
            return None;
        }
        self.trials += 1;
        Some(self.rate)
    }

    fn tell(&mut self, passed: bool) {
        *(if passed { &mut self.passed } else { &mut self.failed }) = Some(self.rate);
        self.rate = match (self.passed, self.failed) {
            (Some(passed), Some(failed)) => (passed * failed).sqrt(),
            (Some(_), None) => self.rate * STEP,
            _ => self.rate / STEP,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(start: f64, limit: f64) -> f64 {
        let mut bracket = Bracket::new(start, 1.03);
        while let Some(rate) = bracket.next() {
            bracket.tell(rate <= limit);
        }
        bracket.passed.unwrap_or_default()
    }

    #[test]
    fn the_limit_is_found_from_either_side() {
        for start in [20_000.0, 50_000.0, 200_000.0] {
            let rate = found(start, 50_000.0);
            assert!((48_000.0..=50_000.0).contains(&rate), "from {start}: {rate}");
        }
    }

    #[test]
    fn a_tunnel_that_loses_at_any_rate_ends_the_search() {
        assert_eq!(found(20_000.0, 0.0), 0.0);
    }
}
