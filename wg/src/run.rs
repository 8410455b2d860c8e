//! Builds the parts, connects them, waits for the end.

use std::{env, os::fd::AsFd, path::Path, sync::Arc, thread, time::Duration};

use anyhow::Context as _;
use mesh_dataplane::{
    Event, Events,
    tun::{self, DeviceOptions},
};
use mesh_wg::{
    device::Device,
    link::LinkWatch,
    listen::{ControlSocket, DIRECTORY},
    offloads,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::EventFd,
        inotify::{AddWatchFlags, InitFlags, Inotify},
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};
use tracing::{debug, info};

use crate::background;

/// How long to wait for events at a time; any time would do.
const PATIENCE: Duration = Duration::from_secs(3_600);

/// Serves the device `iface` until it or its socket is gone or a signal says so.
pub(crate) fn run(iface: &str, in_background: bool) -> anyhow::Result<()> {
    // Before there are threads, which inherit it.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("block signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;

    let (offloads, trains) = offloads::choose();
    let options = DeviceOptions { offloads, ..DeviceOptions::default() };
    let opened = tun::Device::open_with(iface, &options).with_context(|| format!("open TUN device {iface}"))?;
    opened.set_persistent(false).with_context(|| format!("make TUN device {iface} go with this process"))?;
    let queue = opened.into_queues().pop().context("the device has no queue")?;
    let link = LinkWatch::new(queue.as_fd().try_clone_to_owned()?).with_context(|| format!("prepare link {iface}"))?;
    let (device, events) = Device::start(Box::new(queue), trains)?;
    let device = Arc::new(device);
    let socket = ControlSocket::bind(Path::new(DIRECTORY), iface)
        .with_context(|| format!("listen on {DIRECTORY}/{iface}.sock"))?;
    link.follow(Arc::clone(&device)).context("follow the link")?;
    let lost = watch_events(events.context("events of the engine were taken")?)?;
    if in_background {
        background::leave(env::var_os("LOG_LEVEL").is_some()).context("leave the terminal")?;
    }
    info!(link = iface, socket = %socket.path().display(), "device ready");
    let cause = wait(&signals, &socket, &device, &lost)?;
    info!(link = iface, cause, "device ends");
    Ok(())
}

/// Serves clients until there is a reason to end; says which.
fn wait(
    signals: &SignalFd,
    socket: &ControlSocket,
    device: &Arc<Device>,
    lost: &EventFd,
) -> anyhow::Result<&'static str> {
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context("watch the control socket")?;
    let gone = AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF;
    watch.add_watch(socket.path(), gone).context("watch the control socket")?;
    loop {
        let (ready, none) = (PollFlags::POLLIN, PollTimeout::NONE);
        let mut fds = [
            PollFd::new(signals.as_fd(), ready),
            PollFd::new(lost.as_fd(), ready),
            PollFd::new(watch.as_fd(), ready),
            PollFd::new(socket.listener().as_fd(), ready),
        ];
        match poll(&mut fds, none) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait"),
        }
        let [signal, lost, file, client] = fds.map(|fd| fd.any().unwrap_or(true));
        if signal {
            return Ok("signal");
        }
        if lost {
            return Ok("device removed");
        }
        // Changes of mode wake this up too.
        if file && (watch.read_events().is_err() || !socket.is_there()) {
            return Ok("control socket removed");
        }
        if client {
            socket.accept(device);
        }
    }
}

/// Follows what happens on the lane; the descriptor becomes readable when the device is lost.
fn watch_events(events: Events) -> anyhow::Result<EventFd> {
    let lost = EventFd::new()?;
    let bell = lost.as_fd().try_clone_to_owned()?;
    thread::Builder::new().name("events".into()).spawn(move || {
        loop {
            match events.next_within(PATIENCE) {
                Ok(Some(Event::QueueLost { .. })) | Err(_) => break,
                Ok(Some(event)) => debug!(?event, "data plane"),
                Ok(None) => {}
            }
        }
        // The counter cannot overflow by one.
        let _ = nix::unistd::write(&bell, &1u64.to_ne_bytes());
    })?;
    Ok(lost)
}
