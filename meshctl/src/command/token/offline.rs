//! A join token made where the issuer's key is, without the keyserver: it learns of it when a node shows it.

use std::path::Path;

use anyhow::{Context as _, bail};
use mesh_protocol::admin::TokenStatus;
use mesh_protocol::envelope::Envelope;
use mesh_protocol::key::SigningKey;
use mesh_protocol::offline::MeshFile;
use mesh_protocol::token::{JoinToken, TokenLimits};
use zeroize::Zeroizing;

use super::Create;
use crate::files;
use crate::signer::Signer;

/// Longest life of a token that a keyserver takes, in seconds.
const LONGEST_LIFE: u64 = 30 * 86_400;

/// Makes the token: its line, and what it allows.
pub(super) fn create(args: &Create, mesh: &Path, signer: &str) -> anyhow::Result<(Zeroizing<String>, TokenStatus)> {
    let file: MeshFile = files::read(mesh)?;
    let view = file.view().context("verify the trust policies in the file")?;
    let signer = Signer::open(signer)?;
    let policy = view.policy();
    let (issuer, scope) =
        policy.cluster(&args.cluster).with_context(|| format!("there is no cluster {} in the mesh", args.cluster))?;
    if issuer.key != signer.public() {
        let (of, held) = (issuer.key.id().short(), signer.public().id().short());
        bail!("cluster {} is of issuer {of}, this key is {held}", args.cluster);
    }
    if let Some(cidr) = args.cidrs.iter().find(|cidr| !scope.pools.iter().any(|pool| pool.contains(*cidr))) {
        bail!("{cidr} is not inside the pools of cluster {}", scope.cluster);
    }
    if let Some(tag) = args.tags.iter().find(|tag| !issuer.tags.contains(tag)) {
        bail!("tag {tag} is not the issuer's to give: add it with 'meshctl policy propose --add-tag'");
    }
    if args.ttl.as_secs() > LONGEST_LIFE {
        bail!("a token lives for 30 days at most");
    }
    let checkpoint = file.checkpoint.clone().context("the file has no checkpoint: make it with 'policy show --out'")?;
    if file.keyservers.is_empty() {
        bail!("the file names no keyserver address: set 'addresses' in keyserver.toml, then make it again");
    }
    let mut seed = Zeroizing::new([0; 32]);
    getrandom::fill(seed.as_mut_slice()).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
    let secret = SigningKey::from_seed(*seed);
    let now = super::now();
    let limits = TokenLimits {
        key: secret.verify_key(),
        uses: args.uses,
        expires: now + args.ttl.as_secs(),
        cluster: args.cluster.clone(),
        cidrs: args.cidrs.clone(),
        tags: args.tags.clone(),
        issued: Some(now),
    };
    let token = JoinToken {
        mesh: view.mesh(),
        policy_version: policy.version,
        policy: view.policy_hash(),
        keyservers: file.keyservers,
        checkpoint,
        limits: signer.sign(view.mesh(), Envelope::unsigned(&limits))?,
        secret,
    };
    let TokenLimits { uses, expires, cluster, cidrs, tags, .. } = limits;
    let status = TokenStatus { id: token.id(), cluster, uses, used: 0, expires, revoked: false, cidrs, tags };
    Ok((token.to_line(), status))
}
