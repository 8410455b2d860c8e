//! Priority of all that the bench starts.
//!
//! A kernel that schedules by session (autogroup) weighs nice values within a session only, and sessions by a value of
//! their own: both are set, and the session's, which the shell around the bench shares, is put back.

use std::fs;
use std::process::Command;

use anyhow::Result;

use super::link;

const SESSION: &str = "/proc/self/autogroup";

/// A priority other than the usual; dropping it puts back the session's.
#[derive(Debug)]
pub struct Priority {
    before: Option<String>,
}

impl Priority {
    /// Gives the calling thread, and all that starts from it, a nice value.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(nice: i32) -> Result<Self> {
        let value = nice.to_string();
        link::output(Command::new("renice").args(["-n", &value, "-p", &std::process::id().to_string()]))?;
        let session = fs::read_to_string(SESSION).ok();
        let before = session.and_then(|text| Some(text.trim().rsplit_once("nice ")?.1.to_owned()));
        // Without such sessions there is no such file.
        let before = before.filter(|_| fs::write(SESSION, &value).is_ok());
        Ok(Self { before })
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = fs::write(SESSION, before);
        }
    }
}
