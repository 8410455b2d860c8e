//! `meshd join`: from a token to a node that can start.
//!
//! ```text
//! token ─> keys on disk ─> policies verified ─┬─> grant ─> map and membership on disk ─> one session: fetch, publish
//!                                             └─> waiting, on disk ─> asks again, also from `meshd run` ─> grant
//! ```
//!
//! The session at the end only makes the node known sooner: `meshd run` starts without it, and without any keyserver.

mod waiting;

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal as _, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use mesh_protocol::control::RefusalCode;
use mesh_protocol::id::Name;
use mesh_protocol::record::NodeGrant;
use mesh_protocol::token::{JoinToken, TokenError};
use zeroize::Zeroizing;

use crate::control::enrol::{Answer, EnrolError, Enrolled, enrol};
use crate::control::{self, ControlConfig, ControlSetup};
use crate::directory::Directory;
use crate::facts::HostFacts;
use crate::identity::{self, Identity, IdentityError, Membership, Newcomer};
use crate::state_dir::{StateDir, StateError};

/// Longest input looked at for a token, in bytes: twice what a token may be.
const MAX_TOKEN_BYTES: u64 = 16 * 1024;
/// How long joining waits for the map, and for its own record to be on its way to everybody.
const FIRST_SESSION: Duration = Duration::from_secs(15);

/// Enrol this node into a mesh with a join token.
///
/// The token is one line, made by `meshctl token create`. Give it on standard input or in a file: on the command line
/// others on this machine may see it for a moment.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  meshd join < token\n  meshd join --token-file /run/token --node-name n1 --pod-cidr 10.1.7.0/24"
)]
pub(crate) struct JoinArgs {
    /// The token; it is taken off the command line at once. Standard input unless given here or in a file
    #[arg(value_name = "TOKEN", conflicts_with = "token_file")]
    token: Option<TokenText>,
    /// File that holds the token
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Name of this node, one DNS label [default: the host's name up to the first dot]
    #[arg(long, value_name = "NAME")]
    node_name: Option<Name>,
    /// Pod CIDR this node needs, inside the token's pool; may be repeated [default: the next free block]
    #[arg(long, value_name = "CIDR")]
    pod_cidr: Vec<IpNet>,
    /// Where the mesh's issuer signs elsewhere: do not wait for it here; meshd run does
    #[arg(long)]
    no_wait: bool,
}

/// Joining failed. Each message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum JoinError {
    /// The token cannot be read.
    #[error("cannot read the token from {from}: {cause}")]
    Input {
        /// Where from.
        from: String,
        /// Why not. In the message already, so not its source too.
        cause: io::Error,
    },
    /// It is not one.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// There is none.
    #[error("no token: give it on standard input (meshd join < token), or with --token-file")]
    NoToken,
    /// The host's name does not serve.
    #[error("this host's name '{0}' is no node name: give one with --node-name (1 to 63 of a-z, 0-9 and '-')")]
    HostName(String),
    /// This node is in another mesh.
    #[error(
        "this node is already in mesh {held} as {name}, the token is of mesh {asked}: to change, stop meshd, move {} \
         away and join again", state.display()
    )]
    OtherMesh {
        /// The mesh it is in.
        held: String,
        /// Its name there.
        name: Name,
        /// The token's mesh.
        asked: String,
        /// The state directory.
        state: PathBuf,
    },
    /// Keys or files of this node.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The directory file.
    #[error(transparent)]
    State(#[from] StateError),
    /// No keyserver answered well.
    #[error("{}", .0.join("\n"))]
    Enrol(Vec<String>),
    /// One refused for a reason that will not go away.
    #[error("{}", .0.join("\n"))]
    Refused(Vec<String>),
    /// The token is not read again, because the program could not be started without it on the command line.
    #[error("cannot take the token off the command line: {0}; give it on standard input instead")]
    CommandLine(io::Error),
}

/// What became of joining, to be printed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub(crate) enum Outcome {
    /// This node is in.
    Joined(Joined),
    /// It waits for its grant.
    Waiting {
        /// Its name.
        waiting: Name,
        /// Seconds since 1970 after which that is over.
        until: u64,
    },
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Joined(joined) => joined.fmt(f),
            Self::Waiting { waiting, until } => {
                writeln!(f, "{}", waiting::words(waiting, *until))?;
                write!(f, "next       systemctl enable --now meshd: it starts once the grant is there")
            }
        }
    }
}

/// What joining did, to be printed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Joined {
    /// The mesh.
    pub(crate) mesh: String,
    /// This node's name.
    pub(crate) name: Name,
    /// Its cluster.
    pub(crate) cluster: Name,
    /// Its addresses in the mesh.
    pub(crate) addresses: Vec<std::net::IpAddr>,
    /// Its pod CIDRs.
    pub(crate) pod_cidrs: Vec<IpNet>,
    /// It was in before, nothing was done.
    pub(crate) already: bool,
    /// Others know this node; else they will when it runs.
    pub(crate) announced: bool,
}

impl std::fmt::Display for Joined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |items: Vec<String>| items.join(", ");
        let verb = if self.already { "is already in" } else { "joined" };
        writeln!(f, "{} {verb} mesh {}, cluster {}", self.name, self.mesh, self.cluster)?;
        writeln!(f, "addresses  {}", list(self.addresses.iter().map(ToString::to_string).collect()))?;
        writeln!(f, "pod CIDRs  {}", list(self.pod_cidrs.iter().map(ToString::to_string).collect()))?;
        if !self.announced && !self.already {
            writeln!(f, "others are not told yet, because no session came up in time: meshd run does it")?;
        }
        write!(f, "next       systemctl enable --now meshd")
    }
}

/// A token as it was typed: a secret.
#[derive(Clone)]
struct TokenText(Zeroizing<String>);

impl std::str::FromStr for TokenText {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(Zeroizing::new(text.to_owned())))
    }
}

impl std::fmt::Debug for TokenText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenText([redacted])")
    }
}

/// Runs `meshd join`. If the token stands on the command line this starts the program anew without it, with the token on
/// standard input, and does not return.
///
/// # Errors
/// [`JoinError`].
pub(crate) async fn run(args: JoinArgs, state: &Path, setup: ControlSetup) -> Result<Outcome, JoinError> {
    if let Some(token) = &args.token {
        return Err(JoinError::CommandLine(start_anew_without(&token.0)));
    }
    let token = read_token(args.token_file.as_deref())?;
    let state_dir = StateDir::open(state)?;
    if let Some(membership) = identity::membership(&state_dir)? {
        return already_joined(&state_dir, &membership, &token, &setup).map(Outcome::Joined);
    }
    let name = match args.node_name {
        Some(name) => name,
        None => host_name()?,
    };
    let wish = Wish { token, name, pod_cidrs: args.pod_cidr };
    let newcomer = Newcomer::open(&state_dir, control::now().wall)?;
    let (keyserver, enrolled) = match ask_all(&wish, &newcomer, &setup).await? {
        Asked::Granted(keyserver, enrolled) => (keyserver, enrolled),
        Asked::Pending { until } => {
            waiting::store(&state_dir, &wish, until)?;
            if args.no_wait {
                return Ok(Outcome::Waiting { waiting: wish.name, until });
            }
            eprintln!("{}", waiting::words(&wish.name, until));
            waiting::until_granted(&state_dir, &wish, &newcomer, &setup).await?
        }
    };
    let (identity, directory) = settle(&state_dir, newcomer, *enrolled, &wish.token, &setup)?;
    waiting::forget(&state_dir);
    let (grant, mesh) = (identity.grant().clone(), directory.view().policy().name.clone());
    // The one that granted is there.
    let config = ControlConfig { keyservers: vec![keyserver], ..setup.config.clone() };
    let announced = announce(ControlSetup { config, ..setup }, identity, directory).await;
    Ok(Outcome::Joined(joined(&grant, mesh.to_string(), false, announced)))
}

/// For `meshd run`: where this node waits for its grant, waits on. Returns at once where it has one, or never asked.
///
/// # Errors
/// [`JoinError`]: the waiting is over without a grant.
pub(crate) async fn finish_waiting(state: &Path, setup: ControlSetup) -> Result<(), JoinError> {
    let state_dir = StateDir::open(state)?;
    if identity::membership(&state_dir)?.is_some() {
        waiting::forget(&state_dir);
        return Ok(());
    }
    let Some((wish, until)) = waiting::load(&state_dir)? else { return Ok(()) };
    let newcomer = Newcomer::open(&state_dir, control::now().wall)?;
    tracing::info!(node = %wish.name, until, "waiting for the grant: its issuer has to sign it");
    let (_, enrolled) = waiting::until_granted(&state_dir, &wish, &newcomer, &setup).await?;
    settle(&state_dir, newcomer, *enrolled, &wish.token, &setup)?;
    waiting::forget(&state_dir);
    Ok(())
}

/// What a node asks for: the same each time it asks.
struct Wish {
    token: JoinToken,
    name: Name,
    pod_cidrs: Vec<IpNet>,
}

/// What came of asking.
enum Asked {
    /// This keyserver granted.
    Granted(String, Box<Enrolled>),
    /// The issuer has to sign first.
    Pending { until: u64 },
}

fn already_joined(
    state: &StateDir,
    membership: &Membership,
    token: &JoinToken,
    setup: &ControlSetup,
) -> Result<Joined, JoinError> {
    // Reads all of it: a node that could not start must not be told that it is in.
    let identity = Identity::open(state, setup.lanes)?;
    let directory = Directory::open(state, &identity)?;
    let grant = identity.grant();
    if membership.mesh != token.mesh {
        return Err(JoinError::OtherMesh {
            held: membership.mesh.short(),
            name: grant.name.clone(),
            asked: token.mesh.short(),
            state: state.path_of(""),
        });
    }
    Ok(joined(grant, directory.view().policy().name.to_string(), true, true))
}

fn joined(grant: &NodeGrant, mesh: String, already: bool, announced: bool) -> Joined {
    Joined {
        mesh,
        name: grant.name.clone(),
        cluster: grant.cluster.clone(),
        addresses: vec![grant.mesh_v4.into(), grant.mesh_v6.into()],
        pod_cidrs: grant.pod_cidrs.clone(),
        already,
        announced,
    }
}

/// Asks one keyserver after the other, until one grants, and names it; or until one refuses for a reason that the next would have too.
async fn ask_all(wish: &Wish, newcomer: &Newcomer, setup: &ControlSetup) -> Result<Asked, JoinError> {
    let (mut reasons, mut refused) = (Vec::new(), false);
    for address in setup.config.keyservers.iter().chain(&wish.token.keyservers) {
        match enrol(address, &wish.token, newcomer.key(), &wish.name, &wish.pod_cidrs, setup.mark).await {
            Ok(Answer::Granted(enrolled)) => return Ok(Asked::Granted(address.clone(), enrolled)),
            Ok(Answer::Pending { until }) => return Ok(Asked::Pending { until }),
            Err(error) => {
                refused = matches!(&error, EnrolError::Refused(refusal) if is_final(refusal.code));
                reasons.push(format!("{address}: {error}{}", advice(&error)));
                if refused {
                    break;
                }
            }
        }
    }
    if reasons.is_empty() {
        reasons.push("the token names no keyserver: give one under [control] keyservers in meshd.toml".to_owned());
    }
    Err(if refused { JoinError::Refused(reasons) } else { JoinError::Enrol(reasons) })
}

fn is_final(code: RefusalCode) -> bool {
    !matches!(code, RefusalCode::Busy | RefusalCode::Unavailable)
}

/// What to do about it, to be appended.
fn advice(error: &EnrolError) -> &'static str {
    let EnrolError::Refused(refusal) = error else {
        return match error {
            EnrolError::Connect(_) | EnrolError::Stream(_) | EnrolError::Silent => {
                "\n  is the keyserver running, and its port open for UDP and TCP?"
            }
            EnrolError::OtherMesh(_) | EnrolError::OtherPolicy { .. } | EnrolError::UnknownKey(_) => {
                "\n  nothing was sent to it: make sure that its address is right, then make a new token"
            }
            EnrolError::Stale => {
                "\n  on the keyserver's machine, find out from when its store is, then make a new token"
            }
            _ => "\n  are both sides of the same version?",
        };
    };
    match refusal.code {
        RefusalCode::Token => "\n  make a new token: meshctl token create",
        RefusalCode::Taken => "\n  if it is gone for good, revoke it: meshctl node revoke",
        RefusalCode::OutOfScope => "\n  ask for a CIDR inside the token's pool, or make a token that allows it",
        RefusalCode::Exhausted => "\n  give the cluster a larger pool, or revoke nodes that are gone",
        RefusalCode::Revoked => "\n  move the state directory away to join as a new node",
        RefusalCode::Busy | RefusalCode::Unavailable => "\n  try again in a minute",
        RefusalCode::BadMessage | RefusalCode::Record => "\n  are both sides of the same version?",
    }
}

/// Stores everything, the membership last: with it the node is in.
fn settle(
    state: &StateDir,
    newcomer: Newcomer,
    enrolled: Enrolled,
    token: &JoinToken,
    setup: &ControlSetup,
) -> Result<(Identity, Directory), JoinError> {
    let Enrolled { view, grant, checkpoint } = enrolled;
    let mut directory = Directory::new(view, newcomer.key().verify_key().node_id(), Some(checkpoint));
    directory.save(state)?;
    let membership = Membership { mesh: token.mesh, grant, keyservers: token.keyservers.clone() };
    let identity = newcomer.admit(membership, setup.lanes)?;
    Ok((identity, directory))
}

/// Opens one session: fetches the map, publishes the own record. Tells whether it came that far in time.
async fn announce(setup: ControlSetup, identity: Identity, directory: Directory) -> bool {
    let mut handle = control::start(setup, identity, directory, HostFacts::default(), None);
    let done = handle.report.wait_for(|report| report.published && report.position.is_some());
    let announced = tokio::time::timeout(FIRST_SESSION, done).await.is_ok_and(|done| done.is_ok());
    // The state is on disk in any case; what failed here is done anew when meshd runs.
    let stopped = handle.stop().await;
    announced && stopped.is_ok()
}

/// Starts this program anew with the token on standard input. Gives back why that failed.
fn start_anew_without(token: &str) -> io::Error {
    let start = || -> io::Result<io::Error> {
        let (reader, mut writer) = io::pipe()?;
        // A token is far below the 64 KiB that a pipe holds.
        io::Write::write_all(&mut writer, token.as_bytes())?;
        drop(writer);
        let arguments = std::env::args_os().skip(1).filter(|argument| argument.to_str() != Some(token));
        let mut command = std::process::Command::new("/proc/self/exe");
        if let Some(program) = std::env::args_os().next() {
            command.arg0(program);
        }
        command.args(arguments).stdin(reader);
        Ok(command.exec())
    };
    start().unwrap_or_else(|error| error)
}

fn read_token(file: Option<&Path>) -> Result<JoinToken, JoinError> {
    let mut line = Zeroizing::new(String::with_capacity(MAX_TOKEN_BYTES as usize));
    let read = match file {
        Some(path) => {
            // Not a FIFO nobody writes to: that would hang.
            let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
            let open = OpenOptions::new().read(true).custom_flags(flags).open(path);
            open.and_then(|file: File| file.take(MAX_TOKEN_BYTES).read_to_string(&mut line))
        }
        None if io::stdin().is_terminal() => return Err(JoinError::NoToken),
        None => io::stdin().take(MAX_TOKEN_BYTES).read_to_string(&mut line),
    };
    read.map_err(|cause| {
        let from = file.map_or_else(|| "standard input".to_owned(), |path| path.display().to_string());
        JoinError::Input { from, cause }
    })?;
    if line.trim().is_empty() {
        return Err(JoinError::NoToken);
    }
    Ok(line.parse()?)
}

fn host_name() -> Result<Name, JoinError> {
    let full = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_lowercase();
    let label = full.split('.').next().unwrap_or_default();
    label.parse().map_err(|_| JoinError::HostName(full.clone()))
}
