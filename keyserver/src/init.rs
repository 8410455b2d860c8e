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
use mesh_protocol::record::{Issuer, PostQuantum, TrustPolicy};
use mesh_protocol::trust::View;

use crate::config;
use crate::directory::{layout, unix_now};
use crate::keys::{self, Keys};
use crate::store::{Compare, Embedded, Operation, Store as _, Txn};

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
}

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
    pub(crate) mesh: MeshId,
    pub(crate) config: PathBuf,
}

/// Makes a mesh in `new.dir`, which holds none.
pub(crate) fn init(new: &NewMesh) -> anyhow::Result<Made> {
    let dir = std::path::absolute(&new.dir).context("find the directory")?;
    for existing in ["keys", "store.redb", "keyserver.toml"] {
        let path = dir.join(existing);
        if std::fs::symlink_metadata(&path).is_ok() {
            bail!("{} exists: there is a mesh in {} already, nothing was changed", path.display(), dir.display());
        }
    }
    let host = new.address.rsplit_once(':').map_or("", |(host, _)| host);
    if host.parse().is_ok_and(|host: Ipv4Addr| new.mesh_cidr.contains(&host)) {
        return Err(Overlap { address: new.address.clone(), pool: new.mesh_cidr }.into());
    }
    let keys = Keys::generate()?;
    let envelope = first_policy(new, &keys)?;
    let mesh = MeshId(envelope.hash(NO_MESH).0);
    // The rules that every node applies, before anything is written.
    View::pinned(mesh, std::slice::from_ref(&envelope)).context("make the first trust policy")?;
    make_private_dir(&dir)?;
    let keys_dir = dir.join("keys");
    make_private_dir(&keys_dir)?;
    keys.save(&keys_dir)?;
    fill_store(&dir.join("store.redb"), mesh, &envelope)?;
    let config = dir.join("keyserver.toml");
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&config)?;
    file.write_all(config::template(&dir, &new.address).as_bytes())?;
    file.sync_all()?;
    // Names survive a power cut, too.
    for folder in [&keys_dir, &dir] {
        File::open(folder)?.sync_all()?;
    }
    Ok(Made { mesh, config })
}

fn first_policy(new: &NewMesh, keys: &Keys) -> anyhow::Result<Envelope> {
    let (Some(root), Some(issuer)) = (&keys.root, &keys.issuer) else { bail!("a new mesh has a root and an issuer") };
    let policy = TrustPolicy {
        version: 1,
        previous: None,
        name: new.name.clone(),
        roots: vec![root.verify_key()],
        threshold: 1,
        issuers: vec![Issuer {
            key: issuer.verify_key(),
            clusters: Vec::new(),
            tags: Vec::new(),
            longest_grant: LONGEST_GRANT.as_secs(),
        }],
        revokers: vec![keys.revoker.verify_key()],
        keyservers: vec![keys.transport.verify_key()],
        exposure: new.exposure.as_secs(),
        pq: new.pq,
        mesh_pool: new.mesh_cidr.trunc(),
        issued: unix_now(),
    };
    Ok(Envelope::seal(NO_MESH, &policy, &[root]))
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
