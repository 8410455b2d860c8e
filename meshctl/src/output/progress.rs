//! How far something is, on standard error: a bar on a terminal, one line per change elsewhere, nothing with `--json`.

use std::io::{IsTerminal as _, stderr};

use indicatif::{ProgressBar, ProgressStyle};

use super::{note, visible};

/// Progress of one command. Dropping it clears the bar.
#[derive(Debug)]
pub(crate) struct Progress {
    shown: Shown,
}

#[derive(Debug)]
enum Shown {
    Bar(ProgressBar),
    Lines { last: String },
    Nothing,
}

impl Progress {
    /// Starts at nothing done.
    pub(crate) fn new(json: bool) -> Self {
        let shown = if json {
            Shown::Nothing
        } else if stderr().is_terminal() {
            let style = ProgressStyle::with_template("{elapsed:>4} [{bar:30}] {pos}/{len} {msg}");
            Shown::Bar(ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
        } else {
            Shown::Lines { last: String::new() }
        };
        Self { shown }
    }

    /// `done` of `total`; `message` says of what.
    pub(crate) fn update(&mut self, done: usize, total: usize, message: &str) {
        match &mut self.shown {
            Shown::Bar(bar) => {
                bar.set_length(total as u64);
                bar.set_position(done as u64);
                bar.set_message(visible(message));
            }
            Shown::Lines { last } => {
                let line = format!("{done}/{total} {message}");
                if *last != line {
                    note(&line);
                    *last = line;
                }
            }
            Shown::Nothing => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}
