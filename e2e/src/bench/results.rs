//! Samples of a run, as JSON that grows with every sample.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::candidate::Field;
use super::measure::Figures;

/// All of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Results {
    /// Of this file's form.
    pub format: u32,
    /// Kernel, processor and cores.
    pub machine: String,
    /// Seconds since 1970.
    pub started: u64,
    /// Names and versions of those that took part, in order.
    pub candidates: Vec<(String, String)>,
    /// Names of those that could not be had, and why.
    pub absent: Vec<(String, String)>,
    /// In the order they were taken.
    pub samples: Vec<Sample>,
    /// Where it is written.
    #[serde(skip)]
    path: PathBuf,
}

/// One sample.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sample {
    /// Which round, from 0.
    pub round: u32,
    /// Whose.
    pub candidate: String,
    /// On which link.
    pub link: String,
    /// Of which test.
    pub test: String,
    /// By name; empty if it failed.
    pub figures: Figures,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

impl Results {
    /// Of a run that begins now and is written to `path`.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn new(path: &Path, field: &Field) -> Result<Self> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
        }
        let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        let candidates = field.present.iter().map(|one| (one.name.clone(), one.version.clone())).collect();
        let absent = field.absent.clone();
        Ok(Self {
            format: 1,
            machine: machine(),
            started,
            candidates,
            absent,
            samples: Vec::new(),
            path: path.to_owned(),
        })
    }

    /// Reads those of an earlier run.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no result of a bench", path.display()))
    }

    /// Adds a sample and writes all.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn add(&mut self, sample: Sample) -> Result<()> {
        self.samples.push(sample);
        let text = serde_json::to_string_pretty(self)?;
        let part = self.path.with_extension("part");
        fs::write(&part, text).with_context(|| format!("write {}", part.display()))?;
        fs::rename(&part, &self.path).with_context(|| format!("write {}", self.path.display()))
    }

    /// Figure `name` of all good samples of one test.
    #[must_use]
    pub fn values(&self, candidate: &str, link: &str, test: &str, name: &str) -> Vec<f64> {
        let samples = self.samples.iter().filter(|sample| {
            sample.candidate == candidate && sample.link == link && sample.test == test && sample.error.is_none()
        });
        samples.filter_map(|sample| sample.figures.get(name)?.as_f64()).collect()
    }
}

fn machine() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, model)| model);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{}, {cores} cores, Linux {}", model.unwrap_or("unknown processor").trim(), kernel.trim())
}
