//! The real binary against a server that answers from a script.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tempfile::TempDir;

/// A directory with the two sockets in it, as far as they are served.
pub struct Desk {
    dir: TempDir,
    asked: Arc<Mutex<Vec<Value>>>,
}

impl Desk {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), asked: Arc::default() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// meshd answers every connection with these bytes and closes it.
    pub fn node(self, reply: impl Into<Vec<u8>>) -> Self {
        self.serve("meshd.sock", reply.into())
    }

    /// The keyserver does.
    pub fn keyserver(self, reply: impl Into<Vec<u8>>) -> Self {
        self.serve("admin.sock", reply.into())
    }

    fn serve(self, name: &str, reply: Vec<u8>) -> Self {
        let listener = UnixListener::bind(self.path(name)).unwrap();
        let asked = Arc::clone(&self.asked);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                if let Ok(value) = serde_json::from_str(&line) {
                    asked.lock().unwrap().push(value);
                }
                // A client that hangs up early is part of some scenarios.
                let _ = stream.write_all(&reply);
            }
        });
        self
    }

    /// What was asked so far.
    pub fn asked(&self) -> Vec<Value> {
        self.asked.lock().unwrap().clone()
    }

    pub fn command(&self, words: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_meshctl"));
        command
            .args(words.split_whitespace())
            .env("MESHD_SOCKET", self.path("meshd.sock"))
            .env("MESH_ADMIN_SOCKET", self.path("admin.sock"))
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, words: &str) -> Ran {
        Ran::of(&self.command(words).output().unwrap())
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// What a run left.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn of(output: &Output) -> Self {
        Self {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout.clone()).unwrap(),
            err: String::from_utf8(output.stderr.clone()).unwrap(),
        }
    }

    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}
