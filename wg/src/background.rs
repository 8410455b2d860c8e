//! Into the background: the program starts itself once more and leaves when that one is ready.

use std::{
    env,
    fs::File,
    io::{self, Read as _, Write as _},
    process::{Command, ExitCode, Stdio},
};

use nix::unistd::{dup2_stderr, dup2_stdout, setsid};

/// Set for the process in the background.
const READY_ON_STDOUT: &str = "MESH_WG_READY_ON_STDOUT";
/// What it says.
const READY: &[u8] = b"ready\n";

/// True in the process that [`start`] started.
pub(crate) fn is_background() -> bool {
    env::var_os(READY_ON_STDOUT).is_some()
}

/// Starts the program again with the same arguments; waits until it is ready or has failed.
pub(crate) fn start() -> io::Result<ExitCode> {
    let mut child = Command::new(env::current_exe()?)
        .args(env::args_os().skip(1))
        .env(READY_ON_STDOUT, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(READY.len() as u64).read_to_end(&mut said)?;
    }
    if said == READY {
        return Ok(ExitCode::SUCCESS);
    }
    let code = child.wait()?.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Leaves the terminal and says that the device is ready. Standard error stays only if somebody asked for logs.
pub(crate) fn leave(keep_stderr: bool) -> io::Result<()> {
    // Fails only for the leader of a process group, which a child is not unless somebody made it one.
    let _ = setsid();
    env::set_current_dir("/")?;
    let nothing = File::options().read(true).write(true).open("/dev/null")?;
    io::stdout().write_all(READY)?;
    io::stdout().flush()?;
    dup2_stdout(&nothing)?;
    if !keep_stderr {
        dup2_stderr(&nothing)?;
    }
    Ok(())
}
