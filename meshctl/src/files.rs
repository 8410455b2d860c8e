//! Files that travel to a signing machine and back, and what that machine remembers.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal as _, Read, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use mesh_protocol::id::MeshId;
use mesh_protocol::offline::{InFile, MAX_FILE_BYTES, Memory};
use mesh_protocol::trust::View;

use crate::output;
use crate::signer::Signer;

/// More than a [`Memory`] is long.
const MAX_MEMORY_BYTES: u64 = 4 * 1024;

/// Reads a file, or standard input for `-`.
pub(crate) fn read<T: InFile>(path: &Path) -> anyhow::Result<T> {
    let text = if path == Path::new("-") { text(io::stdin().lock()) } else { File::open(path).and_then(text) };
    let text = text.with_context(|| format!("read {}", path.display()))?;
    T::from_text(&text).with_context(|| format!("read {}", path.display()))
}

fn text(input: impl Read) -> io::Result<String> {
    let mut text = String::new();
    input.take(MAX_FILE_BYTES as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}

/// Writes a file, or standard output for `-`. There are no secrets in it, yet names and addresses.
pub(crate) fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    if path == Path::new("-") {
        return Ok(output::print(text)?);
    }
    replace(path, text).with_context(|| format!("write {}", path.display()))
}

/// The whole file or nothing: a stick may be pulled at any moment.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)
}

/// Asks the operator, unless `yes`.
pub(crate) fn confirm(question: &str, yes: bool) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        bail!("{question} Nobody is there to be asked: say it with --yes");
    }
    output::note(&format!("{question} [y/N]"));
    let mut answer = String::new();
    io::stdin().take(16).read_to_string(&mut answer).or_else(|_| io::stdin().read_line(&mut answer))?;
    if answer.trim().eq_ignore_ascii_case("y") { Ok(()) } else { bail!("nothing was signed") }
}

/// What a signing machine remembers of a mesh, on its disk.
pub(crate) struct Remembered {
    pub(crate) memory: Memory,
    path: Option<PathBuf>,
}

impl Remembered {
    /// Opens what was remembered, and holds `view` against it. At first use the operator says which mesh it is.
    pub(crate) fn open(
        path: Option<&Path>,
        signer: &Signer,
        view: &View,
        mesh_id: Option<MeshId>,
        yes: bool,
    ) -> anyhow::Result<Self> {
        if mesh_id.is_some_and(|mesh| mesh != view.mesh()) {
            bail!("the file is of mesh {}, not of the one named with --mesh-id", view.mesh());
        }
        let beside_key = signer.path().map(|key| {
            let mut path = key.as_os_str().to_owned();
            path.push(".memory");
            PathBuf::from(path)
        });
        let path = path.map(Path::to_owned).or(beside_key);
        if path.is_none() {
            output::note(
                "no --memory FILE: what this key signed before is not known, so a stolen keyserver can repeat it",
            );
        }
        let held = path.as_deref().map(load).transpose()?.flatten();
        let mut memory = match held {
            Some(memory) => memory,
            None if mesh_id.is_some() => Memory::first(view),
            None => {
                let question = format!(
                    "This key has not signed for mesh {} ({}) before; compare the id with 'meshctl status' on the \
                     keyserver. Is it the right one?",
                    view.policy().name,
                    view.mesh()
                );
                if yes {
                    bail!("{question} Name it with --mesh-id {}", view.mesh());
                }
                confirm(&question, false)?;
                Memory::first(view)
            }
        };
        memory.see(view)?;
        Ok(Self { memory, path })
    }

    /// Keeps it, before what was signed leaves.
    pub(crate) fn save(&self) -> anyhow::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let text = serde_json::to_string_pretty(&self.memory)? + "\n";
        replace(path, &text).with_context(|| format!("write {}", path.display()))
    }
}

fn load(path: &Path) -> anyhow::Result<Option<Memory>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.with_context(|| format!("open {}", path.display()))?,
    };
    let memory = serde_json::from_reader(file.take(MAX_MEMORY_BYTES));
    Ok(Some(memory.with_context(|| format!("read {}", path.display()))?))
}
