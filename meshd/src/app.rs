//! Builds all parts, connects them, starts and stops them. No other file knows every part.
//!
//! ```text
//! state on disk ─> guard stands ─> control (facts from disk) ─> device ─> engine ─> host in line ─> local API ─> ready
//!
//! control.facts, control.keys ──┐
//! host.facts ───────────────────┼─ follow ─┬─> engine: a new table    (first: a revocation is in force with it)
//!                               │          ├─> psk: whose offers count
//! pods.leases ──────────────────┘          └─> host: the difference
//! ```

mod alarms;
mod follow;
mod watchers;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_dataplane::tun::{DeviceOptions, Mode as DeviceMode, TunQueue};
use mesh_dataplane::udp::Trains;
use mesh_dataplane::udp::system::{SystemConfig, SystemSocket};
use mesh_dataplane::{Engine, EngineConfig, Events, LaneParts, PeerId, Snapshot, Table};
use mesh_protocol::id::MeshId;
use mesh_protocol::local::Lease;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

pub(crate) use alarms::Alarms;

use crate::api::Listener;
use crate::config::Config;
use crate::control::{self, ControlHandle, ControlSetup};
use crate::desired;
use crate::directory::Directory;
use crate::exchange::socket::Datagrams;
use crate::facts::{Facts, HostFacts};
use crate::host::{self, DevicePlan, Host, HostHandle};
use crate::identity::Identity;
use crate::metrics;
use crate::offloads;
use crate::pods::Pods;
use crate::psk::{self, Psk};
use crate::ready::{self, Guard, Ready};
use crate::shutdown::{self, Shutdown};
use crate::state_dir::StateDir;

/// Queues of devices made again that wait for the lanes: the device is made at most every 50 ms.
const NEW_QUEUES: usize = 4;

/// Requests answered at one time: no connection waits, there are fewer of them.
const MAX_REQUESTS: usize = 1024;
/// How long a part that ended may have done so because of `meshd down`.
const ENDING: Duration = Duration::from_millis(500);

/// The running node, as the local API sees it.
pub(crate) struct Node {
    /// As started.
    pub(crate) config: Config,
    /// The control session.
    pub(crate) control: ControlHandle,
    /// The lanes.
    pub(crate) engine: Arc<Engine>,
    /// Preshared keys of their tunnels.
    pub(crate) psk: Psk,
    /// The host's network.
    pub(crate) host: HostHandle,
    /// Leases.
    pub(crate) pods: Pods,
    /// Leases that the host's filter knows.
    pub(crate) applied_pods: watch::Receiver<Arc<Vec<Lease>>>,
    /// What is still waited for.
    pub(crate) ready: Ready,
    /// Asks for an end.
    pub(crate) shutdown: Shutdown,
    /// What somebody has to look at, besides what control says.
    pub(crate) alarms: Alarms,
    /// One permit for each request that is being answered.
    pub(crate) requests: Semaphore,
    /// The state directory: evidence lies there.
    pub(crate) state: StateDir,
    /// When it started.
    pub(crate) started: Instant,
    /// A session came up: whoever has one is told to control at once.
    pub(crate) session_up: Notify,
    /// Which offloads it uses, and why not more.
    pub(crate) offloads: offloads::Choice,
    /// Why it has fewer lanes than configured, if it has.
    pub(crate) fewer_lanes: Option<String>,
    mode: DeviceMode,
}

impl Node {
    /// What `desired` looks at, as of now.
    pub(crate) fn facts(&self) -> Facts {
        Facts {
            directory: self.control.facts.borrow().clone(),
            keys: self.control.keys.borrow().clone(),
            pods: self.pods.leases.borrow().clone(),
            host: self.host.facts.borrow().clone(),
        }
    }

    /// The lanes' counters. Takes up to a second if a lane is stuck, so it runs on a thread of its own.
    pub(crate) async fn snapshot(&self) -> Snapshot {
        let engine = Arc::clone(&self.engine);
        tokio::task::spawn_blocking(move || engine.snapshot()).await.unwrap_or_default()
    }

    /// `fast` or `plain`.
    pub(crate) fn mode_name(&self) -> &'static str {
        match self.mode {
            DeviceMode::Fast => "fast",
            DeviceMode::Plain => "plain",
        }
    }
}

/// What has to have happened before packets flow.
struct Pending {
    device: Guard,
    routes: Guard,
}

/// Runs until a signal or `meshd down`.
///
/// # Errors
/// It could not start, or a part ended by itself.
pub(crate) async fn run(config: Config) -> anyhow::Result<()> {
    let shutdown = Shutdown::new();
    shutdown::listen(shutdown.clone()).context("listen for signals")?;
    let started = start(config, shutdown.clone()).await?;
    let Started { node, mut tasks, api } = started;
    tasks.spawn({
        let ready = node.ready.clone();
        async move {
            ready.announce().await;
            Ok(())
        }
    });
    let failed = tokio::select! {
        reason = shutdown.begun() => {
            debug!(?reason, "stopping");
            None
        }
        failed = first_failure(&mut tasks) => {
            // `meshd down` ends the host thread first, and whoever follows it notices.
            tokio::time::timeout(ENDING, shutdown.begun()).await.is_err().then_some(failed)
        }
    };
    stop(node, tasks, api).await;
    failed.map_or(Ok(()), Err)
}

struct Started {
    node: Arc<Node>,
    tasks: JoinSet<anyhow::Result<()>>,
    api: JoinSet<()>,
}

async fn start(mut config: Config, shutdown: Shutdown) -> anyhow::Result<Started> {
    let started = Instant::now();
    let ready = Ready::new();
    let loading = ready.guard("records loaded");
    let pending = Pending { device: ready.guard("TUN up"), routes: ready.guard("routes applied") };

    let state = StateDir::open(&config.state_dir)?;
    let mut host = open_host(&state, &config)?;
    let seen = host.facts()?;
    let alarms = Alarms::default();
    let mut identity = Identity::open(&state, config.lanes())?;
    let offloads = offloads::choose(&config);
    let opened = host.open_device(&config.device.name, device_plan(&config, &identity, &offloads))?;
    let (mode, fewer_lanes) = (opened.mode, opened.fewer);
    // As many as there are: what peers are told, and whose ports are open.
    let lanes = u8::try_from(opened.queues.len()).context("count the device's queues")?;
    identity.set_lanes(lanes);
    config.device.lanes = Some(lanes);
    let control = start_control(&state, &config, identity, seen.clone(), &alarms)?;
    drop(loading);

    let mut facts = Facts {
        directory: control.facts.borrow().clone(),
        keys: control.keys.borrow().clone(),
        pods: Arc::new(Vec::new()),
        host: Arc::new(seen.clone()),
    };
    let (cidrs, mtu) = (facts.directory.own.pod_cidrs.clone(), desired::device_mtu(&facts, &config));
    let pods = Pods::start(state.clone(), &config, cidrs, seen.pod_links.clone(), mtu)?;
    facts.pods = pods.leases.borrow().clone();

    let (engine, events) = start_engine(&config, &facts, opened.queues, offloads.trains)?;
    let engine = Arc::new(engine);
    let ends = psk::Ends {
        facts: control.facts.clone(),
        keys: control.keys.clone(),
        engine: Arc::clone(&engine),
        published_lanes: lanes,
    };
    let psk = psk::start(ends).context("start the psk thread")?;
    for number in control.recently_active() {
        // A peer that is gone since is no error.
        let _ = engine.initiate(PeerId(*number));
    }
    alarms.set("host-network", host.apply(desired::host_state(&facts, &config)).err().map(|error| error.to_string()));
    let (new_queues, queues) = mpsc::channel(NEW_QUEUES);
    let host = host.start(seen, new_queues)?;
    let (applied, applied_pods) = watch::channel(Arc::new(Vec::new()));

    let listener = Listener::bind(&config.socket, &config.socket_group)?;
    let node = Arc::new(Node {
        config,
        control,
        engine,
        psk,
        host,
        pods,
        applied_pods,
        ready,
        shutdown,
        alarms,
        requests: Semaphore::new(MAX_REQUESTS),
        state,
        started,
        session_up: Notify::new(),
        offloads,
        fewer_lanes,
        mode,
    });
    let mut tasks = JoinSet::new();
    tasks.spawn(follow::table(Arc::clone(&node)));
    tasks.spawn(follow::host(Arc::clone(&node), applied, pending.routes, pending.device));
    tasks.spawn(watchers::queues(Arc::clone(&node), queues));
    tasks.spawn(watchers::activity(Arc::clone(&node)));
    watchers::events(Arc::clone(&node), events).context("start the events thread")?;
    if let Some(listen) = node.config.metrics.listen {
        tasks.spawn(metrics::serve(Arc::clone(&node), metrics::bind(listen).await?));
    }
    let mut api = JoinSet::new();
    api.spawn(listener.run(Arc::clone(&node)));
    Ok(Started { node, tasks, api })
}

/// Opens the host and closes it at once with what was saved: from here on nothing leaves in clear text.
fn open_host(state: &StateDir, config: &Config) -> anyhow::Result<Host> {
    let saved = host::load(state)?;
    let was_saved = saved.is_some();
    let mut host = Host::open(state.clone(), saved.unwrap_or_else(|| desired::bare(config)))?;
    if was_saved {
        host.close().context("close the host to clear text")?;
    }
    Ok(host)
}

fn start_control(
    state: &StateDir,
    config: &Config,
    identity: Identity,
    seen: HostFacts,
    alarms: &Alarms,
) -> anyhow::Result<ControlHandle> {
    let directory = Directory::open(state, &identity)?;
    let datagrams = Datagrams::bind(identity.grant().mesh_v4);
    let failed =
        datagrams.as_ref().err().map(|error| format!("UDP port {} in the mesh: {error}", mesh_protocol::peer::PORT));
    alarms.set("peer-exchange", failed);
    Ok(control::start(control_setup(config), identity, directory, seen, datagrams.ok()))
}

/// What control has to know of the configuration.
pub(crate) fn control_setup(config: &Config) -> ControlSetup {
    ControlSetup {
        config: config.control.clone(),
        mark: config.host.mark,
        port: config.device.port,
        lanes: config.lanes(),
        keys: config.keys.clone(),
    }
}

fn device_plan(config: &Config, identity: &Identity, offloads: &offloads::Choice) -> DevicePlan {
    let options = DeviceOptions {
        queues: usize::from(config.lanes()),
        wanted: config.device.mode.into(),
        offloads: offloads.offloads,
    };
    DevicePlan { options, flow_key: flow_key(identity.mesh()) }
}

/// The same on all nodes of the mesh, so that both ends of a flow choose one lane.
fn flow_key(mesh: MeshId) -> [u8; 16] {
    let mut key = [0; 16];
    key.copy_from_slice(&mesh.as_bytes()[..16]);
    key
}

fn start_engine(
    config: &Config,
    facts: &Facts,
    queues: Vec<TunQueue>,
    trains: Trains,
) -> anyhow::Result<(Engine, Events)> {
    let spec = desired::table_spec(facts, desired::device_mtu(facts, config));
    let (table, refused): (Arc<Table>, _) = desired::checked_table(spec).context("build the peer table")?;
    for (peer, error) in refused {
        warn!(%peer, %error, "peer refused");
    }
    let mut lanes = Vec::new();
    for (port, queue) in config.ports().zip(queues) {
        let mark = Some(config.host.mark);
        let class = config.device.dscp.own_class();
        let socket = SystemSocket::bind(&SystemConfig { port, mark, class, trains, ..SystemConfig::default() });
        let socket = socket.with_context(|| format!("bind UDP port {port}"))?;
        lanes.push(LaneParts { queue: Box::new(queue), socket: Box::new(socket) });
    }
    let engine_config = EngineConfig {
        flow_key: flow_key(facts.directory.mesh),
        dscp: config.device.dscp,
        pin: config.device.pin_lanes,
        busy_poll: config.device.busy_poll,
        ..EngineConfig::default()
    };
    let mut engine = Engine::start(engine_config, table, lanes)?;
    let events = engine.take_events().context("events of the engine were taken")?;
    info!(lanes = engine.lanes(), port = config.device.port, "data plane started");
    Ok((engine, events))
}

/// Waits for a task to fail; those that end well are forgotten.
async fn first_failure(tasks: &mut JoinSet<anyhow::Result<()>>) -> anyhow::Error {
    loop {
        match tasks.join_next().await {
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => return error,
            Some(Err(panic)) => return anyhow::Error::new(panic).context("a task of meshd"),
            None => std::future::pending().await,
        }
    }
}

/// Stops accepting, lets requests end, stores what is known. Device, routes and filter stay.
async fn stop(node: Arc<Node>, mut tasks: JoinSet<anyhow::Result<()>>, mut api: JoinSet<()>) {
    ready::announce_stopping();
    drain(&node).await;
    api.shutdown().await;
    tasks.shutdown().await;
    // The events thread holds the node for moments only, and the last handler is gone: at most a few looks.
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut node = node;
    let node = loop {
        match Arc::try_unwrap(node) {
            Ok(node) => break node,
            Err(shared) if Instant::now() > deadline => {
                warn!("a task of meshd does not end");
                drop(shared);
                return;
            }
            Err(shared) => {
                node = shared;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    let Node { control, engine, psk, host, mut pods, .. } = node;
    if let Err(panic) = control.stop().await {
        warn!(error = %panic, "the control task had panicked");
    }
    pods.stop();
    host.stop();
    psk.stop();
    if let Some(engine) = Arc::into_inner(engine) {
        let panicked = engine.stop();
        if !panicked.is_empty() {
            warn!(lanes = ?panicked, "lanes had panicked");
        }
    }
    info!("stopped");
}

/// Waits until no request is being answered, as long as the configuration allows. New ones wait, and end with the socket.
async fn drain(node: &Node) {
    let all = node.requests.acquire_many(MAX_REQUESTS as u32);
    if tokio::time::timeout(node.config.shutdown_grace, all).await.is_err() {
        warn!("requests are still being answered, stopping all the same");
    }
    node.requests.close();
}
