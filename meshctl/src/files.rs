//! Files that travel to a signing machine and back, and what that machine remembers.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, IsTerminal as _, Read, Write as _};
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
    if says_yes(io::stdin())? { Ok(()) } else { bail!("nothing was signed") }
}

/// One line, of which the end may be missing: a terminal gives a line, and no end of input.
fn says_yes(input: impl Read) -> io::Result<bool> {
    let mut answer = String::new();
    BufReader::new(input.take(16)).read_line(&mut answer)?;
    Ok(["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()))
}

/// With what to sign, and where what is signed goes.
#[derive(Debug, clap::Args)]
pub(crate) struct Signing {
    /// The key: a key file, exec:COMMAND or pkcs11:.. (meshctl signer show --help)
    #[arg(long)]
    pub(crate) signer: String,
    /// Where what is signed goes; - for standard output
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// The mesh, at the first use of a key
    #[arg(long, value_name = "ID")]
    mesh_id: Option<MeshId>,
    /// What was seen and signed before [default: KEYFILE.memory for a key file]
    #[arg(long, value_name = "FILE")]
    memory: Option<PathBuf>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

impl Signing {
    /// Asks the operator whether to sign, unless told not to.
    pub(crate) fn confirm(&self, question: &str) -> anyhow::Result<()> {
        confirm(question, self.yes)
    }

    /// Writes what was signed. Says whether there is room to say more: standard output has one content.
    pub(crate) fn write(&self, text: &str) -> anyhow::Result<bool> {
        write(&self.out, text)?;
        Ok(self.out != Path::new("-"))
    }
}

/// What a signing machine remembers of a mesh, on its disk.
pub(crate) struct Remembered {
    pub(crate) memory: Memory,
    path: Option<PathBuf>,
}

impl Remembered {
    /// Opens what was remembered, and holds `view` against it. At first use the operator says which mesh it is.
    pub(crate) fn open(signing: &Signing, signer: &Signer, view: &View) -> anyhow::Result<Self> {
        let Signing { mesh_id, memory: path, yes, .. } = signing;
        if mesh_id.is_some_and(|mesh| mesh != view.mesh()) {
            bail!("the file is of mesh {}, not of the one named with --mesh-id", view.mesh());
        }
        let beside_key = signer.path().map(|key| {
            let mut path = key.as_os_str().to_owned();
            path.push(".memory");
            PathBuf::from(path)
        });
        let path = path.clone().or(beside_key);
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
                if *yes {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    /// Gives what was typed once; asked again it would wait for more.
    struct Terminal(Option<&'static str>);

    impl Read for Terminal {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let typed = self.0.take().expect("one line was typed, and more is waited for");
            buffer[..typed.len()].copy_from_slice(typed.as_bytes());
            Ok(typed.len())
        }
    }

    #[test]
    fn one_line_on_a_terminal_is_an_answer() {
        for (typed, yes) in [
            ("y\n", true),
            ("Yes\n", true),
            (" y \r\n", true),
            ("n\n", false),
            ("\n", false),
            ("yy\n", false),
            ("", false),
        ] {
            assert_eq!(says_yes(Terminal(Some(typed))).unwrap(), yes, "{typed:?}");
        }
        assert!(!says_yes(io::repeat(b'y')).unwrap(), "a line without end");
    }
}
