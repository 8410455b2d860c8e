//! How results look: aligned text for people, one JSON document for programs.

mod progress;
mod table;

use std::io::{self, Write as _};
use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;

pub(crate) use self::progress::Progress;
pub(crate) use self::table::Table;

use crate::client::ClientError;

/// Prints a result on standard output.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    if !text.ends_with('\n') {
        out.write_all(b"\n")?;
    }
    out.flush()
}

/// Prints a result on standard output as one JSON document.
pub(crate) fn print_json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    print(&serde_json::to_string_pretty(value)?)?;
    Ok(())
}

/// Says something about how it went, on standard error. Nobody reading there is no failure.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", visible(text));
}

/// As [`note`], for text of several lines that is clean already.
pub(crate) fn note_lines(text: &str) {
    let _ = write!(io::stderr().lock(), "{text}");
}

/// Reports a failure on standard error.
pub(crate) fn error(error: &anyhow::Error, json: bool) {
    let message = chain(error);
    if json {
        let code = error.downcast_ref::<ClientError>().map_or("failed", ClientError::code);
        note(&serde_json::json!({ "error": { "code": code, "message": message } }).to_string());
    } else {
        note(&format!("meshctl: {message}"));
    }
}

/// An error with its causes, in one line. A cause that the text above it quotes already is not said twice.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Replaces control characters: text from elsewhere must not steer the terminal.
pub(crate) fn visible(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// A duration of whole seconds in its two largest units, like `2h 5m`.
pub(crate) fn seconds(seconds: u64) -> String {
    let full = humantime::format_duration(Duration::from_secs(seconds)).to_string();
    full.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// Seconds since 1970 as a date in UTC, like `2026-01-31T12:00:00Z`.
pub(crate) fn date(unix: u64) -> String {
    /// The last second of the year 9999, beyond which dates have no such form.
    const LAST: u64 = 253_402_300_799;
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(unix.min(LAST))).to_string()
}

/// Bytes with a binary unit, like `1.5 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count;
    let mut rest = 0;
    let mut unit = UNITS[0];
    for next in UNITS {
        (rest, unit) = (value % 1024, next);
        value /= 1024;
        if value < 1024 {
            break;
        }
    }
    format!("{value}.{} {unit}", rest * 10 / 1024)
}

/// Values separated by commas; `-` for none.
pub(crate) fn list<T: ToString>(values: &[T]) -> String {
    if values.is_empty() {
        return "-".to_owned();
    }
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A value, or `-`.
pub(crate) fn maybe<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// `one` for one, else `many`.
pub(crate) fn plural(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_short() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")];
        for (count, expected) in cases {
            assert_eq!(bytes(count), expected);
        }
        assert_eq!(bytes(u64::MAX), "16383.9 PiB");
        assert_eq!(seconds(7503), "2h 5m");
        assert_eq!(seconds(0), "0s");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(visible("a\u{1b}[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }
}
