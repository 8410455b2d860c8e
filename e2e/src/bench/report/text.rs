//! For a terminal.

use std::fmt::Write as _;

use super::figures::FIGURES;
use super::{digits, median};
use crate::bench::results::{Results, Sample};

/// Cores kept busy by others from which on a figure is marked.
const NOISY: f64 = 0.15;

/// One sample in one line.
#[must_use]
pub fn line(sample: &Sample) -> String {
    let Sample { round, candidate, link, test, .. } = sample;
    let mut line = format!("[{round}] {link:<6} {candidate:<18} {test:<7} ");
    if let Some(error) = &sample.error {
        return line + " ERROR " + &error.replace('\n', " ");
    }
    for (name, value) in &sample.figures {
        if let Some(value) = value.as_f64() {
            let _ = write!(line, " {name}={}", digits(value));
        }
    }
    line
}

/// Medians, spread, and the ratio to the bare link and from Mesh to each rival.
#[must_use]
pub fn text(results: &Results) -> String {
    let mut text = String::new();
    for link in ["trains", "wire"] {
        for figure in FIGURES {
            let of = |candidate: &str| results.values(candidate, link, figure.test, figure.name);
            let rows: Vec<_> = results.candidates.iter().map(|(name, _)| (name, of(name))).collect();
            if rows.iter().all(|(_, values)| values.is_empty()) {
                continue;
            }
            let (bare, mesh) = (median(&of("bare")), median(&of("mesh")));
            let _ = writeln!(text, "\n{} [{link}]", figure.title);
            for (name, values) in rows {
                let Some(middle) = median(&values) else { continue };
                let (low, high) = spread(&values);
                let ratio = |other: Option<f64>, title: &str| match other {
                    Some(other) if other != 0.0 && middle != 0.0 => format!("{title} {:>7.3}", middle / other),
                    _ => String::new(),
                };
                let mesh = mesh.filter(|_| name != "mesh" && name != "bare").filter(|_| middle != 0.0);
                let by_mesh = mesh.map(|mesh| format!("   mesh is {:.2} x", mesh / middle)).unwrap_or_default();
                let _ = writeln!(
                    text,
                    "  {name:<18} {:>10}   {:>9} .. {:<9} n={} {:<11} {}{by_mesh}",
                    digits(middle),
                    digits(low),
                    digits(high),
                    values.len(),
                    noise(results, name, link, figure.test),
                    ratio(bare.filter(|_| name != "bare"), "to bare"),
                );
            }
        }
    }
    for (name, reason) in &results.absent {
        let _ = writeln!(text, "\nleft out: {name}: {reason}");
    }
    let failed: Vec<_> = results.samples.iter().filter(|sample| sample.error.is_some()).collect();
    if !failed.is_empty() {
        let _ = writeln!(text, "\nfailed samples:");
        for sample in failed {
            let _ = writeln!(text, "  {}", line(sample));
        }
    }
    text
}

/// How many cores others kept busy meanwhile, if that is worth a word.
fn noise(results: &Results, candidate: &str, link: &str, test: &str) -> String {
    let foreign = median(&results.values(candidate, link, test, "foreign")).unwrap_or_default();
    if foreign < NOISY { String::new() } else { format!("noise {foreign:.2}") }
}

fn spread(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)))
}
