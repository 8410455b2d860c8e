//! The files of a directory: formats, reading, writing.
//!
//! `directory` holds everything that was accepted, and the point of resumption that belongs to it. `runtime` holds what
//! changes all the time and may be lost: hints where peers are, who was active, the running time without a checkpoint.

use std::time::Duration;

use mesh_protocol::UnixSeconds;
use mesh_protocol::cbor;
use mesh_protocol::envelope::{Envelope, Kind};
use mesh_protocol::id::{Hash, MeshId, NodeId, Position};
use mesh_protocol::record::{Checkpoint, NodeGrant};
use mesh_protocol::trust::{Change, Seen, View};
use minicbor::{Decode, Encode};

use super::{Directory, Mark};
use crate::identity::Identity;
use crate::state_dir::{StateDir, StateError};

const DIRECTORY: &str = "directory";
const DIRECTORY_LABEL: &str = "mesh directory 1";
const RUNTIME: &str = "runtime";
const RUNTIME_LABEL: &str = "mesh runtime 1";
/// Label of a file of evidence.
pub(super) const EVIDENCE_LABEL: &str = "mesh evidence 1";
/// What the names of such files begin with.
pub(super) const EVIDENCE_PREFIX: &str = "evidence-";
/// Ten thousand nodes take about 25 MiB.
const LIMIT: u64 = 512 * 1024 * 1024;
const DIRECTORY_FIX: &str =
    "put back a backup of it, or move the whole state directory away and run meshd join with a new token";
const RUNTIME_FIX: &str = "remove it, only hints are lost";
/// Most files of evidence kept.
const MOST_EVIDENCE_FILES: usize = 64;

#[derive(Encode, Decode)]
#[cbor(map)]
struct DirectoryOnDisk {
    #[n(0)]
    mesh: MeshId,
    #[n(1)]
    position: Option<Position>,
    #[n(2)]
    state: Option<Hash>,
    #[n(3)]
    checkpoint: Option<Envelope>,
    #[n(4)]
    envelopes: Vec<Envelope>,
    #[n(5)]
    earlier_grants: Vec<Envelope>,
    #[n(6)]
    key_holders: Vec<KeyHolder>,
    #[n(7)]
    seen: Vec<Seen>,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct KeyHolder {
    #[n(0)]
    key: Hash,
    #[n(1)]
    node: NodeId,
}

#[derive(Encode, Decode, Default)]
#[cbor(map)]
struct RuntimeOnDisk {
    #[n(0)]
    unconfirmed: u64,
    #[n(1)]
    clock: u64,
    #[n(2)]
    active: Vec<NodeId>,
    #[n(3)]
    endpoints: Vec<Envelope>,
}

/// What changes all the time and is stored now and then.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Runtime {
    /// Running time without a fresh checkpoint.
    pub(crate) unconfirmed: Duration,
    /// Highest reading of the wall clock.
    pub(crate) clock: UnixSeconds,
    /// Peers with a live session.
    pub(crate) active: Vec<NodeId>,
}

/// An object that proves a contradiction, and the name of its file.
#[derive(Debug, Clone)]
pub(crate) struct Evidence {
    name: String,
    bytes: Vec<u8>,
}

impl Evidence {
    pub(super) fn of(envelope: &Envelope, mesh: MeshId) -> Self {
        Self { name: format!("{EVIDENCE_PREFIX}{}", envelope.hash(mesh)), bytes: cbor::to_vec(envelope) }
    }

    /// Stores it, unless it is there or there is enough.
    ///
    /// # Errors
    /// [`StateError`].
    fn store(&self, state: &StateDir) -> Result<(), StateError> {
        if state.has(&self.name) || state.names(EVIDENCE_PREFIX)?.len() >= MOST_EVIDENCE_FILES {
            return Ok(());
        }
        state.write(&self.name, EVIDENCE_LABEL, &self.bytes)
    }
}

impl Directory {
    /// Contents of the files as of now: of `directory` only if `whole`. Evidence goes along.
    pub(crate) fn files(&mut self, whole: bool) -> Files {
        Files {
            directory: whole.then(|| self.encode()),
            runtime: self.encode_runtime(),
            evidence: std::mem::take(&mut self.evidence),
        }
    }

    /// Takes the grant in the membership file, which is stored at once: the directory may be older.
    fn take_own_grant(&mut self, grant: &Envelope) {
        let before = self.held_grant(grant);
        // Refused where this node is out.
        if matches!(self.view.apply(grant), Ok(Change::Grant { .. })) {
            self.keep_earlier(before);
            self.ahead.insert(self.own);
        }
    }

    /// Contents of the directory file.
    pub(super) fn encode(&self) -> Vec<u8> {
        cbor::to_vec(&DirectoryOnDisk {
            mesh: self.view.mesh(),
            position: self.position(),
            state: self.mark.and_then(|mark| mark.state),
            checkpoint: self.checkpoint.as_ref().map(|(_, envelope)| envelope.clone()),
            envelopes: self.view.envelopes().cloned().collect(),
            earlier_grants: self.earlier_grants.values().cloned().collect(),
            key_holders: self.view.key_holders().map(|(key, node)| KeyHolder { key, node }).collect(),
            seen: self.view.seen().cloned().collect(),
        })
    }

    /// Contents of the runtime file.
    pub(super) fn encode_runtime(&self) -> Vec<u8> {
        let endpoints = self.view.members().filter_map(|(_, member)| Some(member.endpoints.as_ref()?.envelope.clone()));
        cbor::to_vec(&RuntimeOnDisk {
            unconfirmed: self.runtime.unconfirmed.as_secs(),
            clock: self.runtime.clock,
            active: self.runtime.active.clone(),
            endpoints: endpoints.collect(),
        })
    }

    /// What [`Self::encode_runtime`] stores.
    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Sets it. The clock never goes back.
    pub(crate) fn set_runtime(&mut self, unconfirmed: Duration, wall: UnixSeconds, active: Option<Vec<NodeId>>) {
        self.runtime.unconfirmed = unconfirmed;
        self.runtime.clock = wall;
        if let Some(active) = active {
            self.runtime.active = active;
        }
    }
}

/// Contents of files, to be stored away from the task that made them.
#[derive(Debug)]
pub(crate) struct Files {
    directory: Option<Vec<u8>>,
    runtime: Vec<u8>,
    evidence: Vec<Evidence>,
}

impl Files {
    /// Stores them.
    ///
    /// # Errors
    /// The first [`StateError`]; each file is then as it was, or new.
    pub(crate) fn store(&self, state: &StateDir) -> Result<(), StateError> {
        if let Some(directory) = &self.directory {
            state.write(DIRECTORY, DIRECTORY_LABEL, directory)?;
        }
        state.write(RUNTIME, RUNTIME_LABEL, &self.runtime)?;
        self.evidence.iter().try_for_each(|evidence| evidence.store(state))
    }
}

pub(super) fn read(state: &StateDir, identity: &Identity) -> Result<Directory, StateError> {
    let damaged = |reason: String| state.damaged(DIRECTORY, reason, DIRECTORY_FIX);
    let bytes = state.read(DIRECTORY, DIRECTORY_LABEL, LIMIT, DIRECTORY_FIX)?;
    let bytes = bytes.ok_or_else(|| damaged("it is missing".to_owned()))?;
    let mut directory = decode(&bytes, identity.mesh(), identity.node()).map_err(damaged)?;
    directory.take_own_grant(&identity.membership().grant);
    let runtime = state.read(RUNTIME, RUNTIME_LABEL, LIMIT, RUNTIME_FIX)?;
    if let Some(bytes) = runtime {
        restore_runtime(&mut directory, &bytes).map_err(|reason| state.damaged(RUNTIME, reason, RUNTIME_FIX))?;
    }
    directory.unsaved = false;
    Ok(directory)
}

/// Decodes contents of the directory file; each object is judged anew.
pub(super) fn decode(bytes: &[u8], mesh: MeshId, own: NodeId) -> Result<Directory, String> {
    let file: DirectoryOnDisk = cbor::from_slice(bytes).map_err(|error| error.to_string())?;
    if file.mesh != mesh {
        return Err(format!("it is of mesh {}, this node is in mesh {}", file.mesh, mesh));
    }
    let is_policy = |envelope: &&Envelope| envelope.kind() == Kind::TrustPolicy;
    let policies: Vec<Envelope> = file.envelopes.iter().filter(is_policy).cloned().collect();
    let mut view = View::pinned(mesh, &policies).map_err(|error| error.to_string())?;
    view.restore_key_holders(file.key_holders.iter().map(|holder| (holder.key, holder.node)));
    let of_kind = |kind: Kind| file.envelopes.iter().filter(move |envelope| envelope.kind() == kind);
    let revocations: Vec<&Envelope> = of_kind(Kind::Revocation).collect();
    let grants: Vec<&Envelope> = file.earlier_grants.iter().chain(of_kind(Kind::NodeGrant)).collect();
    // What a refused grant collides with may be replaced by a later one of the same list: try again while that helps.
    let mut left = apply_all(&mut view, revocations);
    left += apply_until_settled(&mut view, grants, &file.earlier_grants);
    left += apply_all(&mut view, of_kind(Kind::NodeRecord).collect());
    view.restore_seen(file.seen);
    let checkpoint = match &file.checkpoint {
        Some(envelope) => envelope.unverified::<Checkpoint>().ok().map(|checkpoint| (checkpoint, envelope.clone())),
        None => None,
    };
    let mut directory = Directory::new(view, own, checkpoint);
    let earlier = file.earlier_grants.into_iter().filter_map(|envelope| {
        let grant: NodeGrant = envelope.unverified().ok()?;
        Some((grant.node, envelope))
    });
    directory.earlier_grants = earlier.collect();
    directory.mark = file.position.map(|position| Mark { position, state: file.state });
    if left > 0 {
        tracing::warn!(objects = left, "stored directory objects are no longer accepted, asking for all anew");
        directory.mark = None;
    }
    Ok(directory)
}

fn apply_all(view: &mut View, envelopes: Vec<&Envelope>) -> usize {
    envelopes.into_iter().filter(|envelope| view.apply(envelope).is_err()).count()
}

/// Applies grants in rounds, and counts those that are needed and never went in.
fn apply_until_settled(view: &mut View, mut grants: Vec<&Envelope>, earlier: &[Envelope]) -> usize {
    loop {
        let before = grants.len();
        grants.retain(|envelope| view.apply(envelope).is_err());
        if grants.is_empty() || grants.len() == before {
            return grants.iter().filter(|grant| !earlier.contains(grant)).count();
        }
    }
}

fn restore_runtime(directory: &mut Directory, bytes: &[u8]) -> Result<(), String> {
    let file: RuntimeOnDisk = cbor::from_slice(bytes).map_err(|error| error.to_string())?;
    for envelope in file.endpoints.iter().filter(|envelope| envelope.kind() == Kind::Endpoints) {
        // Endpoints of nodes that have left since are of no use.
        let _ = directory.view.apply(envelope);
    }
    directory.runtime =
        Runtime { unconfirmed: Duration::from_secs(file.unconfirmed), clock: file.clock, active: file.active };
    Ok(())
}

#[cfg(test)]
pub(super) fn decode_runtime(directory: &mut Directory, bytes: &[u8]) -> Result<(), String> {
    restore_runtime(directory, bytes)
}
