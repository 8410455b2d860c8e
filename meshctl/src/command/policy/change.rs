//! What a proposal changes, from the command line and in words.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use mesh_protocol::address::DERIVED_NODE_PREFIX;
use mesh_protocol::id::Name;
use mesh_protocol::key::VerifyKey;
use mesh_protocol::offline::Reached;
use mesh_protocol::record::{ClusterScope, FormerKey, Issuer, MAX_FORMER_KEYS, PostQuantum, TrustPolicy};
use mesh_protocol::trust::{View, free_pool_v6};

use crate::command::{cluster, parse_duration};
use crate::output;

/// Longest grant of a new issuer: a year.
const LONGEST_GRANT: u64 = 365 * 86_400;

/// What may change.
#[derive(Debug, clap::Args)]
pub(crate) struct Changes {
    /// A new root
    #[arg(long, value_name = "KEY")]
    add_root: Vec<VerifyKey>,
    /// A root that signs no more
    #[arg(long, value_name = "KEY")]
    remove_root: Vec<String>,
    /// How many roots have to sign from then on
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    threshold: Option<u8>,
    /// A new issuer
    #[arg(long, value_name = "KEY")]
    add_issuer: Vec<VerifyKey>,
    /// An issuer that grants no more; its nodes are out unless another one granted to them
    #[arg(long, value_name = "KEY")]
    remove_issuer: Vec<String>,
    /// Another key in an issuer's place; what the one before granted stands until it is granted anew, its tokens are void
    #[arg(long, num_args = 2, value_names = ["OLD", "NEW"])]
    replace_issuer: Vec<String>,
    /// With --replace-issuer: OLD is in other hands, so that nothing it signed stands; nodes are out until granted anew
    #[arg(long, requires = "replace_issuer")]
    stolen: bool,
    /// A key that an issuer had before, once its nodes are granted anew; those that are not are out
    #[arg(long, value_name = "KEY")]
    forget_issuer: Vec<String>,
    /// Which issuer gets the clusters, tags and life below [default: the new one, or the only one]
    #[arg(long, value_name = "KEY")]
    issuer: Option<String>,
    /// A new cluster and its pools, at most one of each family; without IPv6 one is derived
    #[arg(long, value_name = "NAME=CIDR[,CIDR]", value_parser = parse_cluster)]
    add_cluster: Vec<NewCluster>,
    /// Prefix length of a node's IPv4 pod CIDR in the new clusters
    #[arg(long, value_name = "LENGTH", default_value_t = 24, value_parser = clap::value_parser!(u8).range(1..=32))]
    node_prefix: u8,
    /// Prefix length of a node's IPv6 pod CIDR in the new clusters
    #[arg(long, value_name = "LENGTH", default_value_t = DERIVED_NODE_PREFIX, value_parser = clap::value_parser!(u8).range(1..=128))]
    node_prefix6: u8,
    /// A cluster that is no more; its nodes are out
    #[arg(long, value_name = "NAME")]
    remove_cluster: Vec<Name>,
    /// A tag that the issuer may give
    #[arg(long, value_name = "TAG")]
    add_tag: Vec<Name>,
    /// A tag that no issuer may give any more; nodes that have it are out
    #[arg(long, value_name = "TAG")]
    remove_tag: Vec<Name>,
    /// Longest life of the issuer's grants
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    longest_grant: Option<Duration>,
    /// A new revoker
    #[arg(long, value_name = "KEY")]
    add_revoker: Vec<VerifyKey>,
    /// A revoker that revokes no more; whom it revoked stays so
    #[arg(long, value_name = "KEY")]
    remove_revoker: Vec<String>,
    /// A new keyserver key
    #[arg(long, value_name = "KEY")]
    add_keyserver: Vec<VerifyKey>,
    /// A keyserver key that is no more
    #[arg(long, value_name = "KEY")]
    remove_keyserver: Vec<String>,
    /// Running time after which a node that hears from no keyserver closes its tunnels
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    exposure: Option<Duration>,
    /// Whether tunnels need a post-quantum preshared key: required or off
    #[arg(long, value_name = "MODE", value_parser = parse_pq)]
    pq: Option<PostQuantum>,
}

/// A cluster as given on the command line.
#[derive(Debug, Clone)]
struct NewCluster {
    name: Name,
    pools: Vec<IpNet>,
}

fn parse_cluster(text: &str) -> Result<NewCluster, String> {
    let (name, pools) = text.split_once('=').ok_or("write it like west=10.2.0.0/16")?;
    let name = name.parse().map_err(|error: mesh_protocol::id::IdError| error.to_string())?;
    Ok(NewCluster { name, pools: pools.split(',').map(cluster::parse_pool).collect::<Result<_, _>>()? })
}

/// Whether tunnels are post-quantum.
pub(super) fn parse_pq(text: &str) -> Result<PostQuantum, String> {
    match text {
        "required" => Ok(PostQuantum::Required),
        "off" => Ok(PostQuantum::Off),
        _ => Err("it is required or off".to_owned()),
    }
}

impl Changes {
    /// The policy after the newest one of `view`.
    pub(super) fn apply(&self, view: &View, reached: Option<Reached>) -> anyhow::Result<TrustPolicy> {
        let mut next = view.policy().clone();
        next.version += 1;
        next.previous = Some(view.policy_hash());
        next.issued = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        change_keys("root", &mut next.roots, &self.add_root, &self.remove_root)?;
        change_keys("revoker", &mut next.revokers, &self.add_revoker, &self.remove_revoker)?;
        change_keys("keyserver", &mut next.keyservers, &self.add_keyserver, &self.remove_keyserver)?;
        next.threshold = self.threshold.unwrap_or(next.threshold);
        next.exposure = self.exposure.map_or(next.exposure, |exposure| exposure.as_secs());
        next.pq = self.pq.unwrap_or(next.pq);
        self.replace_issuers(&mut next, reached)?;
        self.change_issuers(&mut next)?;
        self.change_scopes(view, &mut next)?;
        Ok(next)
    }

    fn replace_issuers(&self, next: &mut TrustPolicy, reached: Option<Reached>) -> anyhow::Result<()> {
        for text in &self.forget_issuer {
            let former = next.issuers.iter().flat_map(|issuer| issuer.former.iter().map(|former| former.key));
            let key = find("former issuer", former, text)?;
            next.issuers.iter_mut().for_each(|issuer| issuer.former.retain(|former| former.key != key));
        }
        for pair in self.replace_issuer.chunks_exact(2) {
            let held = find("issuer", next.issuers.iter().map(|issuer| issuer.key), &pair[0])?;
            let key: VerifyKey = pair[1].parse().with_context(|| format!("{} is no public key", pair[1]))?;
            let reached = reached.context(
                "the file of the mesh does not say how far grants have come: make it anew with 'meshctl policy show --out'",
            )?;
            let Some(issuer) = next.issuers.iter_mut().find(|issuer| issuer.key == held) else { continue };
            // A generation of 0 would say that it was stolen.
            let Reached { generation, serial } = reached;
            let (generation, serial) = if self.stolen { (0, 0) } else { (generation.max(1), serial) };
            if self.stolen {
                issuer.former.iter_mut().for_each(|former| (former.generation, former.serial) = (0, 0));
            }
            issuer.former.push(FormerKey { key: held, generation, serial });
            issuer.key = key;
            if issuer.former.len() > MAX_FORMER_KEYS {
                bail!("issuer {} has {MAX_FORMER_KEYS} former keys already: --forget-issuer first", held.id().short());
            }
        }
        Ok(())
    }

    fn change_issuers(&self, next: &mut TrustPolicy) -> anyhow::Result<()> {
        for text in &self.remove_issuer {
            let key = find("issuer", next.issuers.iter().map(|issuer| issuer.key), text)?;
            next.issuers.retain(|issuer| issuer.key != key);
        }
        for key in &self.add_issuer {
            if next.issuers.iter().any(|issuer| issuer.key == *key) {
                bail!("issuer {} is in the policy already", key.id().short());
            }
            let (clusters, tags) = (Vec::new(), Vec::new());
            next.issuers.push(Issuer { key: *key, clusters, tags, longest_grant: LONGEST_GRANT, former: Vec::new() });
        }
        for name in &self.remove_cluster {
            if next.cluster(name).is_none() {
                bail!("there is no cluster {name}");
            }
            next.issuers.iter_mut().for_each(|issuer| issuer.clusters.retain(|scope| scope.cluster != *name));
        }
        for tag in &self.remove_tag {
            next.issuers.iter_mut().for_each(|issuer| issuer.tags.retain(|held| held != tag));
        }
        Ok(())
    }

    fn change_scopes(&self, view: &View, next: &mut TrustPolicy) -> anyhow::Result<()> {
        if self.add_cluster.is_empty() && self.add_tag.is_empty() && self.longest_grant.is_none() {
            return Ok(());
        }
        let keys = || next.issuers.iter().map(|issuer| issuer.key);
        let key = match (&self.issuer, self.add_issuer.as_slice()) {
            (Some(text), _) => find("issuer", keys(), text)?,
            (None, [new]) => *new,
            (None, _) if next.issuers.len() == 1 => next.issuers[0].key,
            _ => bail!("the policy has {} issuers: say which with --issuer", next.issuers.len()),
        };
        for new in &self.add_cluster {
            let mut pools = new.pools.clone();
            if !pools.iter().any(|pool| matches!(pool, IpNet::V6(_))) {
                pools.push(IpNet::V6(free_pool_v6(next, view.mesh()).context("no IPv6 pool is left")?));
            }
            let (node_prefix_v4, node_prefix_v6) = (self.node_prefix, self.node_prefix6);
            let scope = ClusterScope { cluster: new.name.clone(), pools, node_prefix_v4, node_prefix_v6 };
            if let Some(issuer) = next.issuers.iter_mut().find(|issuer| issuer.key == key) {
                issuer.clusters.push(scope);
            }
        }
        if let Some(issuer) = next.issuers.iter_mut().find(|issuer| issuer.key == key) {
            issuer.tags.extend(self.add_tag.iter().cloned());
            issuer.tags.sort();
            issuer.tags.dedup();
            issuer.longest_grant = self.longest_grant.map_or(issuer.longest_grant, |life| life.as_secs());
        }
        Ok(())
    }
}

fn change_keys(role: &str, held: &mut Vec<VerifyKey>, add: &[VerifyKey], remove: &[String]) -> anyhow::Result<()> {
    for text in remove {
        let key = find(role, held.iter().copied(), text)?;
        held.retain(|other| *other != key);
    }
    for key in add {
        if held.contains(key) {
            bail!("{role} {} is in the policy already", key.id().short());
        }
        held.push(*key);
    }
    Ok(())
}

/// A key by itself, by its id, or by the start of its id.
fn find(role: &str, keys: impl Iterator<Item = VerifyKey>, text: &str) -> anyhow::Result<VerifyKey> {
    let start = text.to_ascii_lowercase();
    let matches =
        |key: &VerifyKey| key.to_string() == text || (start.len() >= 8 && key.id().to_string().starts_with(&start));
    let found: Vec<VerifyKey> = keys.filter(matches).collect();
    match found.as_slice() {
        [key] => Ok(*key),
        [] => bail!("the policy has no {role} {text}: see 'meshctl policy show'"),
        _ => bail!("more than one {role} key's id starts with {text}"),
    }
}

/// In words, for who has to sign: everything that differs.
pub(super) fn differences(held: &TrustPolicy, next: &TrustPolicy) -> Vec<String> {
    let mut words = Vec::new();
    let keys = [
        ("root", &held.roots, &next.roots),
        ("revoker", &held.revokers, &next.revokers),
        ("keyserver", &held.keyservers, &next.keyservers),
    ];
    for (role, old, new) in keys {
        words.extend(new.iter().filter(|key| !old.contains(key)).map(|key| format!("adds {role} {key}")));
        words.extend(old.iter().filter(|key| !new.contains(key)).map(|key| format!("removes {role} {key}")));
    }
    if held.threshold != next.threshold || held.roots.len() != next.roots.len() {
        words.push(format!("{} of {} roots sign from then on", next.threshold, next.roots.len()));
    }
    let of = |policy: &TrustPolicy, key: VerifyKey| policy.issuers.iter().find(|issuer| issuer.key == key).cloned();
    for issuer in &next.issuers {
        let replaced = || issuer.former.iter().find_map(|former| of(held, former.key));
        let old = of(held, issuer.key).or_else(replaced);
        if old.is_none() {
            words.push(format!("adds issuer {}", issuer.key));
        }
        former_words(old.as_ref(), issuer, &mut words);
        issuer_words(old.as_ref(), issuer, &mut words);
    }
    let is_former = |key: VerifyKey| next.issuers.iter().any(|issuer| issuer.former_key(key.id()).is_some());
    let gone = held.issuers.iter().filter(|issuer| of(next, issuer.key).is_none() && !is_former(issuer.key));
    words.extend(gone.map(|issuer| format!("removes issuer {}: nodes it granted to are out", issuer.key)));
    let values = [
        ("name", held.name.to_string(), next.name.to_string()),
        ("exposure", output::seconds(held.exposure), output::seconds(next.exposure)),
        ("post-quantum", format!("{:?}", held.pq).to_lowercase(), format!("{:?}", next.pq).to_lowercase()),
        ("mesh pool", held.mesh_pool.to_string(), next.mesh_pool.to_string()),
    ];
    let changed = values.into_iter().filter(|(_, old, new)| old != new);
    words.extend(changed.map(|(what, old, new)| format!("{what}: {old} becomes {new}")));
    words
}

/// Keys that took the place of others, how far those stand, and which are forgotten.
fn former_words(old: Option<&Issuer>, new: &Issuer, words: &mut Vec<String>) {
    let before = old.map(|old| old.former.clone()).unwrap_or_default();
    for former in new.former.iter().filter(|former| !before.contains(former)) {
        let what =
            format!("issuer {} has key {} in place of {}", new.key.id().short(), new.key, former.key.id().short());
        words.push(match former.stands() {
            true => format!(
                "{what}, whose grants up to generation {} and serial {} stand until granted anew, and whose tokens are void",
                former.generation, former.serial
            ),
            false => format!("{what}, which was stolen: nodes it granted to are out until granted anew"),
        });
    }
    let gone = before.iter().filter(|former| new.former_key(former.key.id()).is_none());
    words.extend(gone.map(|former| {
        format!("forgets former issuer {}: nodes that still hold its grant are out", former.key.id().short())
    }));
}

fn issuer_words(old: Option<&Issuer>, new: &Issuer, words: &mut Vec<String>) {
    let short = new.key.id().short();
    let (old_clusters, old_tags) = old.map(|old| (old.clusters.clone(), old.tags.clone())).unwrap_or_default();
    for scope in new.clusters.iter().filter(|scope| !old_clusters.contains(scope)) {
        let pools = output::list(&scope.pools);
        words.push(format!("issuer {short} grants in cluster {} {pools}", scope.cluster));
    }
    for scope in old_clusters.iter().filter(|scope| !new.clusters.contains(scope)) {
        words.push(format!(
            "issuer {short} grants no more in cluster {} {}",
            scope.cluster,
            output::list(&scope.pools)
        ));
    }
    words.extend(
        new.tags.iter().filter(|tag| !old_tags.contains(tag)).map(|tag| format!("issuer {short} gives tag {tag}")),
    );
    let gone = old_tags.iter().filter(|tag| !new.tags.contains(tag));
    words.extend(gone.map(|tag| format!("issuer {short} gives tag {tag} no more")));
    if old.is_none_or(|old| old.longest_grant != new.longest_grant) {
        words.push(format!("issuer {short} grants for {} at most", output::seconds(new.longest_grant)));
    }
}
