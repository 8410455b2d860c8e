//! `keyserver keys rotate transport`: the key that this keyserver shows to nodes is replaced, without a node that has to
//! join anew.
//!
//! ```text
//! this command   keys/transport.next made ── named in the policy, beside the one in use ── every connected node confirms
//! next start     public half of the old key to transport.old ── transport replaced ── transport.next removed ──
//!                policy without the old key ── transport.old removed
//! ```
//!
//! Each step may be the last one before an end of the process: the files say where to go on. A node that was away during all
//! of it hears of the policy from its peers, inside the tunnels.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use mesh_protocol::admin::{AdminReply, AdminRequest, TransportRotation};
use mesh_protocol::key::VerifyKey;
use tracing::warn;

use crate::ask;
use crate::config::Config;
use crate::directory::Directory;
use crate::keys;

/// The key that comes next.
const NEXT: &str = "transport.next";
/// The public half of the key that was in use, until no policy names it.
const OLD: &str = "transport.old";
/// The key in use.
const CURRENT: &str = "transport";

/// Makes the next key and has the running keyserver name it in the policy.
pub(crate) fn rotate(config: &Config, wait: Duration, json: bool) -> anyhow::Result<()> {
    let folder = config.keys_dir();
    check_user(&folder)?;
    let next = match keys::read_plain(&folder, NEXT)? {
        Some(next) => next,
        None => {
            let next = keys::generate()?;
            keys::write(&folder.join(NEXT), &next)?;
            sync(&folder).with_context(|| format!("sync {}", folder.display()))?;
            next
        }
    };
    let key = next.verify_key();
    let wait_millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    let request = AdminRequest::TransportRotate { next: key, wait: wait_millis };
    let told = ask::last_answer(&config.admin_socket, &request, wait).and_then(|reply| match reply {
        AdminReply::TransportRotation(told) => Ok(told),
        _ => bail!("it answered another question"),
    });
    let told = told.with_context(|| {
        format!("name the next key in the trust policy (elsewhere: meshctl policy propose --add-keyserver {key})")
    })?;
    let mut out = io::stdout();
    if json {
        writeln!(out, "{}", serde_json::to_string(&told)?)?;
    } else {
        print(&mut out, &told)?;
    }
    if !told.waiting.is_empty() {
        bail!("{} connected nodes have not confirmed within {wait:?}: run this again", told.waiting.len());
    }
    Ok(())
}

/// A key file of another user would keep the keyserver from starting.
fn check_user(folder: &Path) -> anyhow::Result<()> {
    let owner = fs::metadata(folder).with_context(|| format!("look at {}", folder.display()))?.uid();
    if owner != nix::unistd::geteuid().as_raw() {
        let name = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(owner)).ok().flatten();
        let name = name.map_or_else(|| format!("'#{owner}'"), |user| user.name);
        bail!(
            "{} belongs to {name}: run this as that user (sudo -u {name} keyserver keys rotate transport)",
            folder.display()
        );
    }
    Ok(())
}

fn print(out: &mut impl io::Write, told: &TransportRotation) -> io::Result<()> {
    writeln!(
        out,
        "trust policy {} names the next key; {} of {} connected nodes know it",
        told.policy_version, told.confirmed, told.online
    )?;
    if !told.offline.is_empty() {
        let names: Vec<String> = told.offline.iter().map(ToString::to_string).collect();
        writeln!(out, "not connected, will hear of it from their peers: {}", names.join(", "))?;
    }
    writeln!(out, "\nNext: restart the keyserver (systemctl restart keyserver): it takes the key into use")
}

/// Goes on where a rotation stands: called at start, before anybody connects.
pub(crate) fn finish(config: &Config, directory: &mut Directory) -> anyhow::Result<()> {
    let folder = config.keys_dir();
    let (next, old) = (folder.join(NEXT), folder.join(OLD));
    let readable = keys::read_plain(&folder, NEXT).unwrap_or_else(|error| {
        // The key in use is as good as before.
        warn!(%error, "next transport key not taken into use");
        None
    });
    if let Some(key) = readable.filter(|key| directory.names_transport(&key.verify_key())) {
        if !old.try_exists().with_context(|| format!("look at {}", old.display()))? {
            keep_old(&folder, directory.transport())?;
        }
        keys::replace(&folder, CURRENT, &key)?;
        fs::remove_file(&next).with_context(|| format!("remove {}", next.display()))?;
        sync(&folder).with_context(|| format!("sync {}", folder.display()))?;
        directory.use_transport(key);
    }
    let Some(key) = old_key(&old)? else { return Ok(()) };
    if key == directory.transport() || directory.drop_transport(&key) {
        fs::remove_file(&old).with_context(|| format!("remove {}", old.display()))?;
    }
    Ok(())
}

/// Notes the key in use, its public half: it has to leave the policy once it is replaced.
fn keep_old(folder: &Path, key: VerifyKey) -> anyhow::Result<()> {
    let (old, beside) = (folder.join(OLD), folder.join("transport.old.new"));
    let written = || -> io::Result<()> {
        let mut file = fs::File::create(&beside)?;
        writeln!(file, "{key}")?;
        file.sync_all()?;
        fs::rename(&beside, &old)?;
        sync(folder)
    };
    written().with_context(|| format!("write {}", old.display()))
}

fn old_key(path: &Path) -> anyhow::Result<Option<VerifyKey>> {
    match fs::read_to_string(path) {
        Ok(text) => text.trim().parse().map(Some).with_context(|| format!("{} holds no public key", path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

fn sync(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}
