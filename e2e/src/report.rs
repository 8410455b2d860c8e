//! The demo's lines: what was done, how long it took, whether it held.

use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::Result;

/// Prints steps and remembers whether all of them held.
#[derive(Debug)]
pub struct Report {
    start: Instant,
    failed: u32,
}

impl Default for Report {
    fn default() -> Self {
        Self { start: Instant::now(), failed: 0 }
    }
}

impl Report {
    /// Prints a heading.
    pub fn section(&self, title: &str) {
        println!("\n== {title}");
    }

    /// Runs one step and prints its line: the text `work` gives if it held, the error if not.
    pub fn step(&mut self, title: &str, work: impl FnOnce() -> Result<String>) {
        print!("   {title:<44}");
        let _ = std::io::stdout().flush();
        let start = Instant::now();
        match work() {
            Ok(text) => println!(" ok  {:>8}  {text}", millis(start.elapsed())),
            Err(error) => {
                self.failed += 1;
                println!(" FAILED {:>5}\n      {error:#}", millis(start.elapsed()));
            }
        }
    }

    /// Whether every step so far held.
    #[must_use]
    pub fn all_held(&self) -> bool {
        self.failed == 0
    }

    /// Prints the last line.
    pub fn close(&self) {
        let time = self.start.elapsed().as_secs();
        match self.failed {
            0 => println!("\nEverything held, in {time} s."),
            failed => println!("\n{failed} steps FAILED, in {time} s."),
        }
    }
}

fn millis(time: Duration) -> String {
    if time < Duration::from_secs(10) { format!("{} ms", time.as_millis()) } else { format!("{} s", time.as_secs()) }
}
