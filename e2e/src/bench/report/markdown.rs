//! For the documentation.

use std::fmt::Write as _;

use super::figures::{Better, FIGURES};
use super::{digits, median};
use crate::bench::results::Results;

/// Tables of medians, one for each link; the best tunnel of each line is in bold, and the last column says how Mesh
/// compares with the best of its rivals.
#[must_use]
pub fn markdown(results: &Results) -> String {
    let mut text = format!("{}.\n", results.machine);
    let versions: Vec<String> = results.candidates.iter().map(|(name, version)| format!("{name}: {version}")).collect();
    let _ = writeln!(text, "Versions: {}.", versions.join("; "));
    if !results.absent.is_empty() {
        let absent: Vec<&str> = results.absent.iter().map(|(name, _)| name.as_str()).collect();
        let _ = writeln!(text, "Left out, because not to be had there: {}.", absent.join(", "));
    }
    let names: Vec<&str> = results.candidates.iter().map(|(name, _)| name.as_str()).collect();
    for link in ["trains", "wire"] {
        let lines: Vec<String> = FIGURES
            .iter()
            .filter_map(|figure| {
                let medians: Vec<Option<f64>> =
                    names.iter().map(|name| median(&results.values(name, link, figure.test, figure.name))).collect();
                medians.iter().any(Option::is_some).then(|| row(figure.title, figure.better, &names, &medians))
            })
            .collect();
        if lines.is_empty() {
            continue;
        }
        let rounds = results.samples.iter().map(|sample| sample.round + 1).max().unwrap_or_default();
        let foreign: Vec<f64> = names.iter().flat_map(|name| foreign(results, name, link)).collect();
        let busy = median(&foreign).map_or_else(String::new, |cores| format!("; others kept {cores:.2} cores busy"));
        let rounds = if rounds == 1 { "one round".to_owned() } else { format!("medians of {rounds} rounds") };
        let _ = writeln!(text, "\nLink `{link}`, {rounds}{busy}:\n");
        let _ = writeln!(text, "| | {} | mesh : best rival |", names.join(" | "));
        let _ = writeln!(text, "| --- |{}", " ---: |".repeat(names.len() + 1));
        text.extend(lines);
    }
    text
}

/// Cores that others kept busy during each sample of a candidate.
fn foreign(results: &Results, candidate: &str, link: &str) -> Vec<f64> {
    let samples = results.samples.iter().filter(|sample| sample.candidate == candidate && sample.link == link);
    samples.filter_map(|sample| sample.figures.get("foreign")?.as_f64()).collect()
}

fn row(title: &str, better: Better, names: &[&str], medians: &[Option<f64>]) -> String {
    let best = |except: &[&str]| {
        let tunnels = names.iter().zip(medians).filter(|(name, _)| !except.contains(name));
        tunnels.filter_map(|(_, value)| *value).reduce(|a, b| if better == Better::More { a.max(b) } else { a.min(b) })
    };
    let (first, rival) = (best(&["bare"]), best(&["bare", "mesh"]));
    let mut line = format!("| {title} |");
    for (name, value) in names.iter().zip(medians) {
        let cell = match value {
            None => "-".to_owned(),
            Some(value) if *name != "bare" && Some(*value) == first => format!("**{}**", digits(*value)),
            Some(value) => digits(*value),
        };
        let _ = write!(line, " {cell} |");
    }
    let mesh = names.iter().zip(medians).find(|(name, _)| **name == "mesh").and_then(|(_, value)| *value);
    let ratio = match (mesh, rival) {
        (Some(mesh), Some(rival)) if rival != 0.0 => format!("{:.2} x", mesh / rival),
        _ => "-".to_owned(),
    };
    let _ = writeln!(line, " {ratio} |");
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_tunnel_is_bold_and_the_bare_link_never() {
        let names = ["bare", "mesh", "other"];
        let line = row("ping, us", Better::Less, &names, &[Some(5.0), Some(50.0), Some(100.0)]);
        assert_eq!(line, "| ping, us | 5.00 | **50.0** | 100 | 0.50 x |\n");
        let line = row("TCP", Better::More, &names, &[Some(900.0), None, Some(100.0)]);
        assert_eq!(line, "| TCP | 900 | - | **100** | - |\n");
    }
}
