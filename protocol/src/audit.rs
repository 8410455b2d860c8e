//! The keyserver's audit log: who did what when, each line bound to the one before.
//!
//! ```text
//! line = JSON object, one line          { number, time, actor, action, subject, detail, previous }
//! previous = SHA-256("mesh audit\0" ‖ the line before, without its end); of the first line: 32 zero bytes
//! head = the last line, the only one without a number: { head: { mesh, number, hash, time, key, signature } }
//! ```
//!
//! A changed, removed or added line breaks the chain at the line after it; a log that ends early lacks the head, which only
//! the keyserver's key can sign. Lines are hashed as they stand: nothing is encoded again to be checked.

use serde::{Deserialize, Serialize};

use crate::UnixSeconds;
use crate::id::{Hash, KeyId, MeshId, sha256};
use crate::key::{SigningKey, VerifyKey};

const LINE_LABEL: &[u8] = b"mesh audit\0";
const HEAD_LABEL: &[u8] = b"mesh audit head\0";
/// Longest text in one field, in bytes.
pub const MAX_TEXT_BYTES: usize = 512;

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditEntry {
    /// Place in the log; the first is 1.
    pub number: u64,
    /// Seconds since 1970, to the keyserver's clock.
    pub time: UnixSeconds,
    /// Who: `uid 0 (root) pid 17` at the admin socket, `node NAME`, `token ID`, or `keyserver`.
    pub actor: String,
    /// What, in kebab-case: `join`, `renew`, `restore`, `revoke`, `rotate`, `rotate-request`, `rotate-round`,
    /// `rotate-pause`, `rotate-resume`, `rotate-cancel`, `policy`, `token-create`, `token-revoke`, `evidence`,
    /// `join-pending`, `join-reject`, `join-expire`, `rotate-identity-request`, `rotate-identity`.
    pub action: String,
    /// To whom: a node, a token, a policy.
    pub subject: String,
    /// More about it, for people.
    pub detail: String,
    /// [`line_hash`] of the line before.
    pub previous: Hash,
}

/// Where a log ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditHead {
    /// Whose log.
    pub mesh: MeshId,
    /// Number of the last line; 0 for an empty log.
    pub number: u64,
    /// [`line_hash`] of it.
    pub hash: Hash,
    /// When this was signed: seconds since 1970.
    pub time: UnixSeconds,
    /// The key of the keyserver, 32 bytes in hexadecimal digits.
    #[serde(with = "hex::serde")]
    pub key: [u8; 32],
    /// Its signature, 64 bytes in hexadecimal digits.
    #[serde(with = "hex::serde")]
    pub signature: [u8; 64],
}

/// The line that ends an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditEnd {
    /// Where the log ends.
    pub head: AuditHead,
}

/// A log is not what its keyserver wrote. Lines count from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// A line is no entry.
    #[error("line {line} cannot be read: {reason}")]
    Unreadable {
        /// Which.
        line: u64,
        /// Why.
        reason: String,
    },
    /// A line does not carry the next number.
    #[error("line {line} has number {got} instead of {expected}: lines are missing, or were added")]
    Number {
        /// Which.
        line: u64,
        /// What it should have.
        expected: u64,
        /// What it has.
        got: u64,
    },
    /// A line does not name the hash of the line before.
    #[error("line {line} does not follow the line before it: one of the two was changed")]
    Chain {
        /// Which.
        line: u64,
    },
    /// Nothing signed says where the log ends.
    #[error("the log has no end: it was cut off after line {line}")]
    NoEnd {
        /// The last line there is.
        line: u64,
    },
    /// Lines follow the end.
    #[error("line {line} follows the end of the log")]
    AfterEnd {
        /// Which.
        line: u64,
    },
    /// The end is that of another log: lines before it are missing, or the last one was changed.
    #[error("line {line} signs {signed} entries, the log has {got}, or ends in another one")]
    OtherEnd {
        /// Which.
        line: u64,
        /// Entries that were signed.
        signed: u64,
        /// Entries found.
        got: u64,
    },
    /// The end is not signed by the key it names.
    #[error("line {line}: the signature of the end does not match")]
    Signature {
        /// Which.
        line: u64,
    },
}

/// What binds the next line to this one.
#[must_use]
pub fn line_hash(line: &str) -> Hash {
    Hash(sha256(&[LINE_LABEL, line.as_bytes()]))
}

/// `text`, cut to what one field holds.
#[must_use]
pub fn cut(text: &str) -> String {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

impl AuditEntry {
    /// The line, without its end.
    #[must_use]
    pub fn to_line(&self) -> String {
        serde_json::to_string(self).expect("strings and numbers are JSON")
    }
}

impl AuditHead {
    /// Signs where a log ends.
    #[must_use]
    pub fn sign(mesh: MeshId, number: u64, hash: Hash, time: UnixSeconds, key: &SigningKey) -> Self {
        let mut head = Self { mesh, number, hash, time, key: *key.verify_key().as_bytes(), signature: [0; 64] };
        head.signature = key.sign(&head.signed_bytes());
        head
    }

    /// Whether the key it names signed it, and which one that is.
    #[must_use]
    pub fn signer(&self) -> Option<KeyId> {
        let key = VerifyKey::from_bytes(self.key).ok()?;
        key.verify(&self.signed_bytes(), &self.signature).ok()?;
        Some(key.id())
    }

    fn signed_bytes(&self) -> Vec<u8> {
        let numbers = [self.number.to_be_bytes(), self.time.to_be_bytes()].concat();
        [HEAD_LABEL, self.mesh.as_bytes(), self.hash.as_bytes(), &numbers].concat()
    }
}

/// Checks a log line by line, in memory that does not grow with it.
#[derive(Debug, Clone)]
pub struct Verifier {
    line: u64,
    next: u64,
    previous: Hash,
    end: Option<AuditHead>,
    first: bool,
}

impl Verifier {
    /// A log that begins with entry `from`: 1 for a whole one, for which the line before is known to be none.
    #[must_use]
    pub fn new(from: u64) -> Self {
        Self { line: 0, next: from, previous: Hash([0; 32]), end: None, first: from > 1 }
    }

    /// Takes the next line, without its end.
    ///
    /// # Errors
    /// Any [`AuditError`] but [`AuditError::NoEnd`]: it names the first broken line.
    pub fn line(&mut self, text: &str) -> Result<(), AuditError> {
        self.line += 1;
        let line = self.line;
        if self.end.is_some() {
            return Err(AuditError::AfterEnd { line });
        }
        if let Ok(AuditEnd { head }) = serde_json::from_str::<AuditEnd>(text) {
            return self.take_end(head);
        }
        let entry: AuditEntry =
            serde_json::from_str(text).map_err(|error| AuditError::Unreadable { line, reason: error.to_string() })?;
        if entry.number != self.next {
            return Err(AuditError::Number { line, expected: self.next, got: entry.number });
        }
        // Of a log that begins in the middle the first line's word is taken.
        if entry.previous != self.previous && !self.first {
            return Err(AuditError::Chain { line });
        }
        self.first = false;
        self.previous = line_hash(text);
        self.next = self.next.saturating_add(1);
        Ok(())
    }

    fn take_end(&mut self, head: AuditHead) -> Result<(), AuditError> {
        let (line, got) = (self.line, self.next - 1);
        if head.signer().is_none() {
            return Err(AuditError::Signature { line });
        }
        if head.number != got || (head.hash != self.previous && !self.first) {
            return Err(AuditError::OtherEnd { line, signed: head.number, got });
        }
        self.end = Some(head);
        Ok(())
    }

    /// The end of the log, and with it that all is well.
    ///
    /// # Errors
    /// [`AuditError::NoEnd`].
    pub fn finish(self) -> Result<AuditHead, AuditError> {
        self.end.ok_or(AuditError::NoEnd { line: self.line })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn key() -> SigningKey {
        SigningKey::from_seed([7; 32])
    }

    fn log(entries: u64) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        for number in 1..=entries {
            let entry = AuditEntry {
                number,
                time: 1_800_000_000 + number,
                actor: "uid 0 (root)".into(),
                action: "revoke".into(),
                subject: format!("n{number}"),
                detail: "stolen".into(),
                previous: lines.last().map_or(Hash([0; 32]), |line| line_hash(line)),
            };
            lines.push(entry.to_line());
        }
        let hash = lines.last().map_or(Hash([0; 32]), |line| line_hash(line));
        let head = AuditHead::sign(MeshId([1; 32]), entries, hash, 1_800_000_100, &key());
        lines.push(serde_json::to_string(&AuditEnd { head }).unwrap());
        lines
    }

    fn verify(lines: &[String]) -> Result<AuditHead, AuditError> {
        let mut verifier = Verifier::new(1);
        lines.iter().try_for_each(|line| verifier.line(line))?;
        verifier.finish()
    }

    #[test]
    fn a_whole_log_is_good_and_names_its_signer() {
        for entries in [0, 1, 5] {
            let head = verify(&log(entries)).unwrap();
            assert_eq!((head.number, head.signer()), (entries, Some(key().verify_key().id())));
        }
        let later = log(5)[2..].to_vec();
        assert_eq!(verify(&later), Err(AuditError::Number { line: 1, expected: 1, got: 3 }));
        let mut verifier = Verifier::new(3);
        later.iter().for_each(|line| verifier.line(line).unwrap());
        assert_eq!(verifier.finish().unwrap().number, 5);
    }

    #[test]
    fn the_first_broken_line_is_named() {
        let whole = log(5);
        let changed = |at: usize, change: &dyn Fn(&mut Vec<String>)| {
            let mut lines = whole.clone();
            change(&mut lines);
            assert!(lines != whole, "case {at} changes nothing");
            verify(&lines).unwrap_err()
        };
        assert_eq!(changed(0, &|lines| lines[1] = lines[1].replace("stolen", "sold")), AuditError::Chain { line: 3 });
        assert_eq!(changed(1, &|lines| drop(lines.remove(2))), AuditError::Number { line: 3, expected: 3, got: 4 });
        assert_eq!(changed(2, &|lines| lines.truncate(3)), AuditError::NoEnd { line: 3 });
        let removed_last = AuditError::OtherEnd { line: 5, signed: 5, got: 4 };
        assert_eq!(changed(3, &|lines| drop(lines.remove(4))), removed_last);
        let last_changed = AuditError::OtherEnd { line: 6, signed: 5, got: 5 };
        assert_eq!(changed(4, &|lines| lines[4] = lines[4].replace("stolen", "sold")), last_changed);
        let forged =
            |lines: &mut Vec<String>| lines[5] = lines[5].replace("\"time\":1800000100", "\"time\":1800000101");
        assert_eq!(changed(5, &forged), AuditError::Signature { line: 6 });
        assert!(matches!(changed(6, &|lines| lines[0] = "{}".into()), AuditError::Unreadable { line: 1, .. }));
        assert_eq!(changed(7, &|lines| lines.push(lines[0].clone())), AuditError::AfterEnd { line: 7 });
        assert_eq!(
            changed(8, &|lines| lines.insert(2, lines[2].clone())),
            AuditError::Number { line: 4, expected: 4, got: 3 }
        );
    }

    #[test]
    fn texts_are_cut_between_characters() {
        let long = "ä".repeat(600);
        assert!(cut(&long).len() <= MAX_TEXT_BYTES && cut(&long).chars().all(|c| c == 'ä'));
    }
}
