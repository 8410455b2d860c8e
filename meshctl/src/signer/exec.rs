//! A program that signs. It is started for each request, without a shell; it reads one line of JSON, writes one line of
//! JSON, and ends with status 0. What it writes to standard error is the operator's to see.
//!
//! ```text
//! {"mesh-signer":1,"request":"public-key"}                                        -> {"public_key":"BASE64"}
//! {"mesh-signer":1,"request":"sign","public_key":"BASE64","message":"BASE64"}     -> {"signature":"BASE64"}
//! ```
//!
//! The key is Ed25519 (RFC 8032): 32 bytes public, 64 bytes signature over exactly the bytes of `message`.

use std::io::{Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use mesh_protocol::key::VerifyKey;
use serde::{Deserialize, Serialize};

use super::SignerError;

/// Somebody may have to touch a key or to type a PIN.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longest answer, in bytes: many times what is needed.
const MAX_ANSWER_BYTES: u64 = 4 * 1024;

/// The program and its arguments.
#[derive(Debug)]
pub(super) struct Exec {
    words: Vec<String>,
    pub(super) patience: Duration,
}

#[derive(Serialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
enum Request {
    PublicKey {
        #[serde(rename = "mesh-signer")]
        version: u8,
    },
    Sign {
        #[serde(rename = "mesh-signer")]
        version: u8,
        public_key: VerifyKey,
        message: String,
    },
}

#[derive(Deserialize)]
struct PublicKey {
    public_key: VerifyKey,
}

#[derive(Deserialize)]
struct Signature {
    signature: String,
}

impl Exec {
    /// Splits at white space: there is no shell, and nothing is quoted.
    pub(super) fn new(command: &str) -> Result<Self, SignerError> {
        let words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        if words.is_empty() {
            let reason = "there is no command behind 'exec:'".to_owned();
            return Err(SignerError::Spec { spec: format!("exec:{command}"), reason });
        }
        Ok(Self { words, patience: PATIENCE })
    }

    pub(super) fn public_key(&self) -> Result<VerifyKey, SignerError> {
        let answer = self.ask(&Request::PublicKey { version: 1 })?;
        let answer: PublicKey = serde_json::from_slice(&answer)
            .map_err(|error| self.failed(format!("did not answer with a public key: {error}")))?;
        Ok(answer.public_key)
    }

    pub(super) fn sign(&self, key: &VerifyKey, message: &[u8]) -> Result<[u8; 64], SignerError> {
        let request = Request::Sign { version: 1, public_key: *key, message: BASE64.encode(message) };
        let answer: Signature = serde_json::from_slice(&self.ask(&request)?)
            .map_err(|error| self.failed(format!("did not answer with a signature: {error}")))?;
        let bytes = BASE64.decode(answer.signature).ok();
        let signature = bytes.and_then(|bytes| <[u8; 64]>::try_from(bytes).ok());
        signature.ok_or_else(|| self.failed("did not answer with 64 bytes in base64".to_owned()))
    }

    fn failed(&self, reason: String) -> SignerError {
        SignerError::Exec { command: self.words.join(" "), reason }
    }

    fn ask(&self, request: &Request) -> Result<Vec<u8>, SignerError> {
        let mut line = serde_json::to_vec(request).map_err(|error| self.failed(error.to_string()))?;
        line.push(b'\n');
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|error| self.failed(format!("cannot be started: {error}")))?;
        let result = self.talk(&mut child, line);
        // It has ended, or has no business going on.
        let _ = child.kill();
        let _ = child.wait();
        result
    }

    fn talk(&self, child: &mut Child, line: Vec<u8>) -> Result<Vec<u8>, SignerError> {
        let deadline = Instant::now() + self.patience;
        let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(self.failed("has no standard input and output".to_owned()));
        };
        let (sender, answer) = mpsc::channel();
        // Ends with the child's output, or with this process: a grandchild may hold the pipe open.
        std::thread::spawn(move || {
            // It may not read at all; what it answers, or not, is what counts.
            let _ = stdin.write_all(&line);
            drop(stdin);
            let mut bytes = Vec::new();
            let read = stdout.take(MAX_ANSWER_BYTES + 1).read_to_end(&mut bytes);
            let _ = sender.send(read.map(|_| bytes));
        });
        let late = || self.failed(format!("did not answer within {}", humantime::format_duration(self.patience)));
        let bytes = answer.recv_timeout(self.patience).map_err(|_| late())?;
        let bytes = bytes.map_err(|error| self.failed(format!("gave no answer: {error}")))?;
        if bytes.len() as u64 > MAX_ANSWER_BYTES {
            return Err(self.failed(format!("answered with more than {MAX_ANSWER_BYTES} bytes")));
        }
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(bytes),
                Ok(Some(status)) => return Err(self.failed(format!("failed ({status})"))),
                Ok(None) if Instant::now() >= deadline => return Err(late()),
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => return Err(self.failed(error.to_string())),
            }
        }
    }
}
