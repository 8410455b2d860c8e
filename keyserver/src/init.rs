//! `keyserver init`: keys, the first trust policy, the store, the configuration.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use ipnet::Ipv4Net;
use mesh_protocol::cbor;
use mesh_protocol::envelope::{Envelope, NO_MESH};
use mesh_protocol::id::{MeshId, Name};
use mesh_protocol::key::{SigningKey, VerifyKey};
use mesh_protocol::offline::{InFile as _, MeshFile, PolicyProposal};
use mesh_protocol::record::{Issuer, PostQuantum, TrustPolicy};
use mesh_protocol::trust::{View, check_policy};

use crate::config;
use crate::directory::{layout, unix_now};
use crate::keys::{self, Keys};
use crate::store::{Compare, Embedded, Operation, Store as _, Txn};

const STORE: &str = "store.redb";

/// Longest life of a grant that the first policy lets the issuer give: a year.
const LONGEST_GRANT: Duration = Duration::from_secs(365 * 86_400);

/// What a new mesh is made of.
#[derive(Debug)]
pub(crate) struct NewMesh {
    pub(crate) dir: PathBuf,
    pub(crate) name: Name,
    pub(crate) address: String,
    pub(crate) mesh_cidr: Ipv4Net,
    pub(crate) exposure: Duration,
    pub(crate) pq: PostQuantum,
    /// Keys that are elsewhere; absent in easy mode.
    pub(crate) elsewhere: Option<Elsewhere>,
}

/// Who signs in strict mode.
#[derive(Debug)]
pub(crate) struct Elsewhere {
    pub(crate) roots: Vec<VerifyKey>,
    pub(crate) threshold: u8,
    pub(crate) issuers: Vec<VerifyKey>,
    /// None: a revoker's key is made and kept here.
    pub(crate) revokers: Vec<VerifyKey>,
}

/// The first policy of a mesh in strict mode, on its way to its signatures; in the keyserver's directory.
const PROPOSAL: &str = "first-policy.txt";

/// Nodes would look for the keyserver inside the mesh that they need it to enter.
#[derive(Debug, thiserror::Error)]
#[error("--address {address} lies inside --mesh-cidr {pool}: choose a pool that overlaps no network that nodes are in")]
pub(crate) struct Overlap {
    address: String,
    pool: Ipv4Net,
}

/// What was made.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) name: Name,
    /// Absent: a policy waits for its signatures.
    pub(crate) mesh: Option<MeshId>,
    pub(crate) config: PathBuf,
    pub(crate) keys: PathBuf,
    /// The policy that waits.
    pub(crate) proposal: Option<PathBuf>,
}

/// Makes a mesh in `new.dir`, which holds none.
pub(crate) fn init(new: &NewMesh) -> anyhow::Result<Made> {
    let dir = std::path::absolute(&new.dir).context("find the directory")?;
    for existing in ["keys", STORE, "keyserver.toml"] {
        let path = dir.join(existing);
        if std::fs::symlink_metadata(&path).is_ok() {
            bail!("{} exists: there is a mesh in {} already, nothing was changed", path.display(), dir.display());
        }
    }
    let host = new.address.rsplit_once(':').map_or("", |(host, _)| host);
    if host.parse().is_ok_and(|host: Ipv4Addr| new.mesh_cidr.contains(&host)) {
        return Err(Overlap { address: new.address.clone(), pool: new.mesh_cidr }.into());
    }
    let keys = match &new.elsewhere {
        Some(elsewhere) if elsewhere.revokers.is_empty() => Keys::without_authority()?,
        Some(_) => Keys { revoker: None, ..Keys::without_authority()? },
        None => Keys::generate()?,
    };
    let policy = first_policy(new, &keys)?;
    let envelope = match &keys.root {
        Some(root) => Envelope::seal(NO_MESH, &policy, &[root]),
        None => Envelope::unsigned(&policy),
    };
    let mesh = MeshId(envelope.hash(NO_MESH).0);
    let is_signed = keys.root.is_some();
    if is_signed {
        // The rules that every node applies, before anything is written.
        View::pinned(mesh, std::slice::from_ref(&envelope)).context("make the first trust policy")?;
    } else {
        check_policy(&policy).map_err(anyhow::Error::msg)?;
    }
    make_private_dir(&dir)?;
    let keys_dir = dir.join("keys");
    make_private_dir(&keys_dir)?;
    keys.save(&keys_dir)?;
    let proposal = dir.join(PROPOSAL);
    if is_signed {
        fill_store(&dir.join(STORE), mesh, &envelope)?;
    } else {
        let mesh =
            MeshFile { mesh: NO_MESH, policies: Vec::new(), checkpoint: None, keyservers: Vec::new(), reached: None };
        write_new(&proposal, &PolicyProposal { mesh, proposal: envelope }.to_text())?;
    }
    let config = dir.join("keyserver.toml");
    write_new(&config, &config::template(&dir, &new.address))?;
    sync(&[&keys_dir, &dir])?;
    let (mesh, proposal) = (is_signed.then_some(mesh), (!is_signed).then_some(proposal));
    Ok(Made { name: new.name.clone(), mesh, config, keys: keys_dir, proposal })
}

/// Makes the mesh that `init` with keys elsewhere began, from its first policy with enough signatures.
pub(crate) fn finish(dir: &Path, files: &[PathBuf]) -> anyhow::Result<Made> {
    let dir = std::path::absolute(dir).context("find the directory")?;
    let (keys_dir, store) = (dir.join("keys"), dir.join(STORE));
    if std::fs::symlink_metadata(&store).is_ok() {
        bail!("{} exists: there is a mesh in {} already, nothing was changed", store.display(), dir.display());
    }
    let keys = Keys::load(&keys_dir).context("load the keys that 'keyserver init --strict' made")?;
    let mut envelope: Option<Envelope> = None;
    for file in files {
        let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        let proposal = PolicyProposal::from_text(&text).with_context(|| format!("read {}", file.display()))?.proposal;
        envelope = Some(match envelope {
            None => proposal,
            Some(held) => held
                .merged(&proposal)
                .with_context(|| format!("{} holds another policy than the file before", file.display()))?,
        });
    }
    let envelope = envelope.context("no signed policy was given")?;
    let mesh = MeshId(envelope.hash(NO_MESH).0);
    let view = View::pinned(mesh, std::slice::from_ref(&envelope)).context("adopt the first trust policy")?;
    if !view.policy().keyservers.contains(&keys.transport.verify_key()) {
        bail!("the policy was not made by 'keyserver init --strict' in {}", dir.display());
    }
    fill_store(&store, mesh, &envelope)?;
    // It has served its purpose; the store has the policy.
    let _ = std::fs::remove_file(dir.join(PROPOSAL));
    sync(&[&dir])?;
    let name = view.policy().name.clone();
    Ok(Made { name, mesh: Some(mesh), config: dir.join("keyserver.toml"), keys: keys_dir, proposal: None })
}

/// Whether a mesh was begun in `dir` whose first policy is not signed yet.
pub(crate) fn is_unfinished(dir: &Path) -> bool {
    dir.join(PROPOSAL).exists()
}

fn first_policy(new: &NewMesh, keys: &Keys) -> anyhow::Result<TrustPolicy> {
    let held = |key: &Option<SigningKey>| key.as_ref().map(SigningKey::verify_key);
    let mut revokers: Vec<VerifyKey> = held(&keys.revoker).into_iter().collect();
    revokers.extend(new.elsewhere.iter().flat_map(|elsewhere| &elsewhere.revokers));
    let (roots, threshold, issuers) = match (&new.elsewhere, held(&keys.root), held(&keys.issuer)) {
        (Some(elsewhere), ..) => (elsewhere.roots.clone(), elsewhere.threshold, elsewhere.issuers.clone()),
        (None, Some(root), Some(issuer)) => (vec![root], 1, vec![issuer]),
        _ => bail!("a new mesh has a root and an issuer"),
    };
    let issuer = |key| Issuer {
        key,
        clusters: Vec::new(),
        tags: Vec::new(),
        longest_grant: LONGEST_GRANT.as_secs(),
        former: Vec::new(),
    };
    Ok(TrustPolicy {
        version: 1,
        previous: None,
        name: new.name.clone(),
        roots,
        threshold,
        issuers: issuers.into_iter().map(issuer).collect(),
        revokers,
        keyservers: vec![keys.transport.verify_key()],
        exposure: new.exposure.as_secs(),
        pq: new.pq,
        mesh_pool: new.mesh_cidr.trunc(),
        issued: unix_now(),
    })
}

fn write_new(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    Ok(file.sync_all()?)
}

/// Names survive a power cut, too.
fn sync(folders: &[&Path]) -> anyhow::Result<()> {
    folders.iter().try_for_each(|folder| Ok(File::open(folder)?.sync_all()?))
}

fn make_private_dir(dir: &Path) -> anyhow::Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.with_context(|| format!("make directory {}", dir.display()))?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
    Ok(())
}

fn fill_store(path: &Path, mesh: MeshId, policy: &Envelope) -> anyhow::Result<()> {
    // The store is secret-free, yet nobody else's business: tokens' public halves, names, addresses.
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let mut store = Embedded::create(path)?;
    let epoch: u64 = u64::from_be_bytes(keys::random()?);
    store.txn(&Txn {
        compare: vec![Compare::ModRevision(layout::MESH.to_vec(), 0)],
        then: vec![
            Operation::Put(layout::MESH.to_vec(), mesh.as_bytes().to_vec()),
            Operation::Put(layout::EPOCH.to_vec(), epoch.to_be_bytes().to_vec()),
            Operation::Put(layout::history(1), cbor::to_vec(policy)),
        ],
        otherwise: Vec::new(),
    })?;
    Ok(())
}
