//! Keys stay where they belong: in their files and in the memory of whoever uses them.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use mesh_e2e::capture::new_marker;
use mesh_e2e::mesh::scenario;
use mesh_e2e::traffic::ping;
use mesh_e2e::{Mesh, daemon, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Secret bytes, by what they are.
type Secrets = BTreeMap<String, Vec<u8>>;

/// What follows `before` in `bytes`, everywhere.
fn behind<'a>(bytes: &'a [u8], before: &[u8], length: usize) -> Vec<&'a [u8]> {
    let at = bytes.windows(before.len()).enumerate().filter(|(_, window)| *window == before);
    at.filter_map(|(at, _)| bytes.get(at + before.len()..at + before.len() + length)).collect()
}

/// Identity seed, tunnel secrets and KEM secret of a node, as its files hold them (CBOR: byte strings of 32 and 2,400).
fn of_node(mesh: &Mesh, name: &str, secrets: &mut Secrets) -> Result<()> {
    let state = mesh.node(name).node.directory().join("state");
    secrets.insert(format!("identity of {name}"), fs::read(state.join("identity"))?);
    let keys = fs::read(state.join("keys"))?;
    let kem = [0x59, 0x09, 0x60];
    // Key 1 of the map of an epoch's key. Behind the KEM secret comes the record, whose keys are public.
    let end = keys.windows(3).position(|window| window == kem).context("no KEM key")?;
    for (n, secret) in behind(&keys[..end], &[0x01, 0x58, 0x20], 32).into_iter().enumerate() {
        secrets.insert(format!("tunnel key {n} of {name}"), secret.to_vec());
    }
    for secret in behind(&keys, &kem, 32) {
        secrets.insert(format!("KEM key of {name}"), secret.to_vec());
    }
    Ok(())
}

/// The key in a file of the keyserver, if it is that.
fn keyserver_key(bytes: &[u8]) -> Option<Vec<u8>> {
    (bytes.len() == 65).then(|| hex::decode(&bytes[..64]).ok()).flatten()
}

/// Files below a directory.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            all.extend(files(&path)?)
        } else if path.is_file() {
            all.push(path)
        }
    }
    Ok(all)
}

/// Fails if any secret is in `bytes`, raw or as text.
fn refuse(place: &str, bytes: &[u8], secrets: &Secrets) -> Result<()> {
    let mut forms = Vec::new();
    for (name, secret) in secrets {
        let text = STANDARD_NO_PAD.encode(&secret[..30]);
        let texts = [hex::encode(secret), hex::encode_upper(secret), text].map(String::into_bytes);
        forms.extend(texts.into_iter().chain([secret.clone()]).map(|form| (name, form)));
    }
    // One pass over what may be many megabytes: few places begin as any of them does.
    let mut begins = vec![false; 1 << 16];
    for (_, form) in &forms {
        begins[usize::from(form[0]) << 8 | usize::from(form[1])] = true;
    }
    for (at, pair) in bytes.windows(2).enumerate() {
        if begins[usize::from(pair[0]) << 8 | usize::from(pair[1])] {
            let found = forms.iter().find(|(_, form)| bytes[at..].starts_with(form));
            ensure!(found.is_none(), "{} is in {place}", found.map_or("", |(name, _)| name.as_str()));
        }
    }
    Ok(())
}

/// Memory that a process has written to.
fn memory(pid: u32) -> Result<Vec<u8>> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut memory = fs::File::open(format!("/proc/{pid}/mem"))?;
    let mut all = Vec::new();
    for line in maps.lines().filter(|line| line.contains(" rw")) {
        let (from, to) = line.split(' ').next().and_then(|range| range.split_once('-')).context("a map")?;
        let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        memory.seek(SeekFrom::Start(from))?;
        // Some special mappings cannot be read.
        let _ = memory.by_ref().take((to - from).min(64 << 20)).read_to_end(&mut all);
    }
    Ok(all)
}

#[test]
fn secrets_are_in_key_files_and_nowhere_else() {
    scenario("secrets", &[("east-1", "east"), ("west-1", "west")], |mesh| {
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        ensure!(!ping(&a.netns()?, b.v4(), 3, new_marker())?.times.is_empty(), "no traffic");
        let mut secrets = Secrets::new();
        for name in ["east-1", "west-1"] {
            of_node(mesh, name, &mut secrets)?;
        }
        mesh.admin(&["keys", "rotate", "--force", "--wait", "60s"])?;
        for name in ["east-1", "west-1"] {
            of_node(mesh, name, &mut secrets)?;
        }
        ensure!(secrets.len() >= 8 && secrets.values().all(|secret| secret.len() >= 32), "{}", secrets.len());
        let keyserver = mesh.keyserver_directory();
        let before = secrets.len();
        for path in files(&keyserver)? {
            // A key file of the keyserver: 64 hexadecimal digits and a new line.
            if let Some(key) = keyserver_key(&fs::read(&path)?) {
                secrets.insert(path.display().to_string(), key);
            }
        }
        ensure!(secrets.len() > before, "the keyserver has no key files");
        // Logs, stores, sockets' files and configurations of all, but for the files that are there to hold them.
        let root = keyserver.parent().and_then(Path::parent).context("the lab's directory")?;
        for path in files(root)? {
            let own = fs::read(&path)?;
            let is_key_file =
                path.ends_with("state/identity") || path.ends_with("state/keys") || keyserver_key(&own).is_some();
            if is_key_file {
                let mode = path.metadata()?.permissions().mode() & 0o7777;
                ensure!(mode == 0o600, "{} has mode {mode:o}", path.display());
            } else {
                refuse(&path.display().to_string(), &own, &secrets)?;
            }
        }
        for name in ["east-1", "west-1"] {
            for verb in ["status", "peers", "routes", "keys"] {
                // Not every verb exists in every version; what they print is what counts.
                let text = mesh.node(name).ctl(&[verb, "--json"]).unwrap_or_else(|error| format!("{error:#}"));
                refuse(&format!("{verb} of {name}"), text.as_bytes(), &secrets)?;
            }
            let pid = mesh.node(name).daemon.as_ref().context("not running")?.pid();
            for file in ["cmdline", "environ"] {
                refuse(&format!("{file} of {name}"), &fs::read(format!("/proc/{pid}/{file}"))?, &secrets)?;
            }
        }
        // A node's secrets never were in the memory of another.
        for (name, other) in [("east-1", "west-1"), ("west-1", "east-1")] {
            let memory = memory(mesh.node(name).daemon.as_ref().context("not running")?.pid())?;
            let foreign = secrets.iter().filter(|(of, _)| of.ends_with(other));
            refuse(
                &format!("memory of {name}"),
                &memory,
                &foreign.map(|(of, secret)| (of.clone(), secret.clone())).collect(),
            )?;
        }
        Ok(())
    });
}

#[test]
fn a_crash_leaves_no_core_dump() {
    scenario("core", &[("east-1", "east")], |mesh| {
        mesh.node_mut("east-1").stop()?;
        let node = mesh.node("east-1");
        let mut command = node.node.command("sh")?;
        // As much as an administrator might allow who wonders about a crash.
        command.args(["-c", "ulimit -c unlimited; exec \"$0\" run --config \"$1\""]).arg(daemon::binary("meshd")?);
        let mut child = command.arg(node.config()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        wait::until("it answers", Duration::from_secs(20), || node.status())?;
        kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGABRT)?;
        let status = child.wait()?;
        ensure!(status.signal() == Some(Signal::SIGABRT as i32) && !status.core_dumped(), "{status}");
        Ok(())
    });
}
