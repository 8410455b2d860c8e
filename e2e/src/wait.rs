//! Polling with a deadline: the only way this lab waits.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const STEP: Duration = Duration::from_millis(10);

/// Asks `check` until it gives a value, at most for `limit`.
///
/// # Errors
/// After `limit`, with `what` and the last reason that `check` gave.
pub fn until<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() >= limit => bail!("{what}: not within {limit:?}: {error:#}"),
            Err(_) => std::thread::sleep(STEP),
        }
    }
}

/// As [`until`], for a condition.
///
/// # Errors
/// As [`until`].
pub fn until_true(what: &str, limit: Duration, mut check: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, limit, || if check()? { Ok(()) } else { bail!("it does not hold") })
}
