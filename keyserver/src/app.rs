//! Builds, connects, starts and stops the parts.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use mesh_protocol::key::VerifyKey;
use mesh_protocol::record::TrustPolicy;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::config::{Config, LogFormat};
use crate::directory::{Directory, Settings};
use crate::keys::Keys;
use crate::listen::{Gate, Listener};
use crate::metrics::Metrics;
use crate::store::Embedded;
use crate::watermark::WatermarkFile;
use crate::writer::Writer;
use crate::{admin, metrics, transport};

/// How long the last work may take after SIGTERM.
const DRAIN: Duration = Duration::from_secs(10);

/// Starts logging to standard error.
pub(crate) fn start_logging(config: &Config) {
    let level = match config.log_level {
        crate::config::LogLevel::Error => tracing::Level::ERROR,
        crate::config::LogLevel::Warn => tracing::Level::WARN,
        crate::config::LogLevel::Info => tracing::Level::INFO,
        crate::config::LogLevel::Debug => tracing::Level::DEBUG,
        crate::config::LogLevel::Trace => tracing::Level::TRACE,
    };
    // Of libraries only what somebody must know: their debug output names every packet.
    let filter = tracing_subscriber::EnvFilter::new(format!("warn,keyserver={level}"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    match config.log_format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}

/// The directory is not that of one mesh.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoMesh {
    /// There is nothing in it.
    #[error("there is no mesh in {0}: make one with 'keyserver init', or set 'dir' in the configuration")]
    Nothing(PathBuf),
    /// A first policy that nobody has signed yet.
    #[error(
        "the mesh in {0} is begun and not made: have its first trust policy signed, then 'keyserver init --signed'"
    )]
    Unfinished(PathBuf),
    /// Keys without a store.
    #[error("store {0} is missing: restore a copy, then run 'keyserver resume'")]
    NoStore(PathBuf),
    /// Parts of two.
    #[error("key {key} is not in the policy of the mesh in store {store}: restore keys and store of the same mesh")]
    Foreign {
        /// Its file.
        key: PathBuf,
        /// The store's.
        store: PathBuf,
    },
}

/// Says what is missing before anything is opened.
pub(crate) fn find_mesh(config: &Config) -> Result<(), NoMesh> {
    let (keys, store) = (config.keys_dir(), config.store_path());
    let missing = |path: &Path| matches!(path.try_exists(), Ok(false));
    match (missing(&keys), missing(&store)) {
        (true, true) => Err(NoMesh::Nothing(config.dir.clone())),
        (_, true) if crate::init::is_unfinished(&config.dir) => Err(NoMesh::Unfinished(config.dir.clone())),
        (_, true) => Err(NoMesh::NoStore(store)),
        _ => Ok(()),
    }
}

/// Every key here has to be one that the newest policy names: nodes believe no other. A root or an issuer may also be one
/// that an earlier policy named: it is not used any more.
fn belong_together(config: &Config, keys: &Keys, policies: &[&TrustPolicy]) -> Result<(), NoMesh> {
    let Some(newest) = policies.last() else { return Ok(()) };
    let roots: Vec<VerifyKey> = policies.iter().flat_map(|policy| policy.roots.clone()).collect();
    let issuers = policies.iter().flat_map(|policy| policy.issuers.iter().map(|issuer| issuer.key));
    let issuers: Vec<VerifyKey> = issuers.collect();
    let held = [
        ("root", keys.root.as_ref(), &roots),
        ("issuer", keys.issuer.as_ref(), &issuers),
        ("revoker", keys.revoker.as_ref(), &newest.revokers),
        ("transport", Some(&keys.transport), &newest.keyservers),
    ];
    let foreign = held.iter().find(|(_, key, named)| key.is_some_and(|key| !named.contains(&key.verify_key())));
    foreign.map_or(Ok(()), |(name, ..)| {
        Err(NoMesh::Foreign { key: config.keys_dir().join(name), store: config.store_path() })
    })
}

/// Opens keys and store as `config` says.
pub(crate) fn load(config: &Config, metrics: Arc<Metrics>) -> anyhow::Result<Directory> {
    find_mesh(config)?;
    let keys = Keys::load(&config.keys_dir()).context("load keys")?;
    let path = config.store_path();
    let store = Embedded::open(&path).with_context(|| format!("open store {}", path.display()))?;
    let settings = Settings { addresses: config.addresses.clone(), grant_life: config.grant_life };
    let watermark = WatermarkFile::in_dir(&config.dir);
    let held = keys.clone();
    let directory = Directory::load(Box::new(store), keys, settings, watermark, metrics);
    let mut directory = directory.with_context(|| format!("read the directory from store {}", path.display()))?;
    directory.keep_audit_in(config.dir.join("audit"));
    directory.keep_keys_in(config.keys_dir());
    let policies: Vec<&TrustPolicy> = directory.view().policies().iter().map(|policy| &policy.object).collect();
    belong_together(config, &held, &policies)?;
    directory.retire_keys();
    Ok(directory)
}

/// Runs a keyserver until SIGTERM or SIGINT.
pub(crate) async fn run(config: Config) -> anyhow::Result<()> {
    let (metrics, registry) = Metrics::new();
    let mut directory = load(&config, metrics.clone())?;
    transport::finish(&config, &mut directory).context("rotate the transport key")?;
    directory.take_issuer_key();
    let transport = Keys::load(&config.keys_dir())?.transport;
    let writer = Writer::start(directory).context("start the writer")?;
    let mut parts = JoinSet::new();
    let gate = Gate::new(writer.clone(), metrics);
    for address in &config.listen {
        let listener = Listener::bind(*address, &transport).await;
        let listener = listener.with_context(|| format!("listen on {address}"))?;
        let gate = gate.clone();
        parts.spawn(async move {
            listener.run(gate).await;
            Err(anyhow!("a listener ended"))
        });
    }
    let socket = bind_admin(&config.admin_socket)?;
    let about = Arc::new(admin::About { listen: config.listen.clone(), started: Instant::now() });
    let operators = writer.clone();
    parts.spawn(async move {
        admin::run(socket, operators, about).await;
        Err(anyhow!("the admin socket ended"))
    });
    if let Some(address) = config.metrics_listen {
        parts.spawn(async move { metrics::serve(address, registry).await.context("serve metrics") });
    }
    tell_systemd(NotifyState::Ready);
    info!("ready");
    let result = wait_for_end(&mut parts, &writer).await;
    tell_systemd(NotifyState::Stopping);
    parts.shutdown().await;
    // It may be gone already.
    let _ = std::fs::remove_file(&config.admin_socket);
    result
}

fn bind_admin(path: &Path) -> anyhow::Result<tokio::net::UnixListener> {
    admin::bind(path).with_context(|| format!("open the admin socket {}", path.display()))
}

async fn wait_for_end(parts: &mut JoinSet<anyhow::Result<()>>, writer: &Writer) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        Some(ended) = parts.join_next() => return ended.context("a part panicked")?,
        () = writer.ended() => return Err(anyhow!("the writer ended: see the message above")),
    }
    info!("stopping");
    // What was asked before is answered: one more round through the writer's queue. What comes later is not acknowledged,
    // and the store survives an end at any moment.
    tokio::select! {
        _ = tokio::time::timeout(DRAIN, writer.call(|_| ())) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

fn tell_systemd(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        warn!(%error, "systemd not told");
    }
}
