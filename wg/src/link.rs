//! Follows the link of the device: up, down, MTU.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
    thread,
    time::Duration,
};

use mesh_dataplane::tun;
use mesh_hostnet::{
    Handle,
    link::{Link, LinkChange},
    netns::Netns,
    watch::{Event, Watch},
};
use tracing::{debug, info, warn};

use crate::device::Device;

/// MTU of a new device, as the kernel's and wireguard-go's: fits IPv6 over an Ethernet of 1500.
const MTU: u32 = 1420;
/// Packets that may wait in the device, as meshd has it: what a fast sender produces while the lane does not run for some
/// milliseconds. The 500 of a new device are soon full.
const QUEUE_LENGTH: u32 = 2_048;
/// How long to wait for news at a time; any time would do.
const PATIENCE: Duration = Duration::from_secs(3_600);

/// A subscription to what becomes of one link.
#[derive(Debug)]
pub struct LinkWatch {
    watch: Watch,
    handle: Handle,
    index: u32,
    /// A queue of the device, to ask where it is.
    queue: OwnedFd,
}

impl LinkWatch {
    /// Gives the link of the device whose queue this is the MTU of a WireGuard device and subscribes to it.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn new(queue: OwnedFd) -> io::Result<Self> {
        let found = find(queue.as_fd(), Watch::links, Handle::open)?;
        let Some((watch, mut handle, link)) = found else { return Err(io::ErrorKind::NotFound.into()) };
        let change = LinkChange::new().mtu(MTU).queue_length(QUEUE_LENGTH);
        handle.change_link(link.index, &change).map_err(io::Error::other)?;
        Ok(Self { watch, handle, index: link.index, queue })
    }

    /// Tells `device` of the link as it is, and of all that becomes of it from a thread of its own.
    ///
    /// # Errors
    ///
    /// If the system refuses a thread.
    pub fn follow(mut self, device: Arc<Device>) -> std::io::Result<()> {
        self.look(&device);
        thread::Builder::new().name("link".into()).spawn(move || self.run(&device)).map(drop)
    }

    fn run(mut self, device: &Device) {
        loop {
            match self.watch.next(PATIENCE) {
                Ok(Some(Event::LinkChanged(link))) if link.index == self.index => tell(device, &link),
                // Announcements were lost.
                Ok(Some(Event::Overflow)) => self.look(device),
                Ok(Some(Event::LinkGone(link))) if link.index == self.index => {
                    if let Err(error) = self.go_after(device) {
                        return debug!(%error, "the link is gone");
                    }
                }
                Ok(_) => {}
                Err(error) => return warn!(%error, "the link is not followed any more"),
            }
        }
    }

    /// The link has left this namespace: into another, unless it is gone. Sockets stay where they are, as the kernel's do.
    fn go_after(&mut self, device: &Device) -> io::Result<()> {
        loop {
            let namespace = tun::namespace_of(self.queue.as_fd())?;
            let path = format!("/proc/self/fd/{}", namespace.as_raw_fd());
            let netns = Netns::open(path).map_err(io::Error::other)?;
            let found = find(self.queue.as_fd(), || netns.run(Watch::links)?, || Handle::open_in(&netns))?;
            // Not there: it moved on in between.
            if let Some((watch, handle, link)) = found {
                (self.watch, self.handle, self.index) = (watch, handle, link.index);
                info!(link = link.name, "the link is in another namespace");
                tell(device, &link);
                return Ok(());
            }
        }
    }

    fn look(&mut self, device: &Device) {
        match self.handle.link_by_index(self.index) {
            Ok(Some(link)) => tell(device, &link),
            // Then an announcement says so, too.
            Ok(None) => debug!("link not in this namespace"),
            Err(error) => warn!(%error, "link not read"),
        }
    }
}

/// Subscribes first and looks for the link then, so that nothing is missed.
fn find(
    queue: BorrowedFd<'_>,
    watch: impl FnOnce() -> mesh_hostnet::Result<Watch>,
    handle: impl FnOnce() -> mesh_hostnet::Result<Handle>,
) -> io::Result<Option<(Watch, Handle, Link)>> {
    let watch = watch().map_err(io::Error::other)?;
    let mut handle = handle().map_err(io::Error::other)?;
    let link = handle.link_by_name(&tun::name_of(queue)?).map_err(io::Error::other)?;
    Ok(link.map(|link| (watch, handle, link)))
}

fn tell(device: &Device, link: &Link) {
    device.set_link(link.up, link.mtu);
}
