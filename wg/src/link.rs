//! Follows the link of the device: up, down, MTU.

use std::{sync::Arc, thread, time::Duration};

use mesh_hostnet::{
    Handle,
    link::{Link, LinkChange},
    watch::{Event, Watch},
};
use tracing::{debug, warn};

use crate::device::Device;

/// MTU of a new device, as the kernel's and wireguard-go's: fits IPv6 over an Ethernet of 1500.
const MTU: u32 = 1420;
/// Packets that may wait in the device, as in the kernel's.
const QUEUE_LENGTH: u32 = 1_000;
/// How long to wait for news at a time; any time would do.
const PATIENCE: Duration = Duration::from_secs(3_600);

/// A subscription to what becomes of one link.
#[derive(Debug)]
pub struct LinkWatch {
    watch: Watch,
    handle: Handle,
    index: u32,
}

impl LinkWatch {
    /// Gives the link `name` the MTU of a WireGuard device and subscribes to it.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn new(name: &str) -> mesh_hostnet::Result<Self> {
        let watch = Watch::open()?;
        let mut handle = Handle::open()?;
        let Some(link) = handle.link_by_name(name)? else {
            return Err(mesh_hostnet::Error::NotFound { object: format!("link {name}") });
        };
        handle.change_link(link.index, &LinkChange::new().mtu(MTU).queue_length(QUEUE_LENGTH))?;
        Ok(Self { watch, handle, index: link.index })
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
                Ok(_) => {}
                Err(error) => return warn!(%error, "the link is not followed any more"),
            }
        }
    }

    fn look(&mut self, device: &Device) {
        match self.handle.link_by_index(self.index) {
            Ok(Some(link)) => tell(device, &link),
            // Gone, or moved to another namespace, where it serves on.
            Ok(None) => debug!("link not in this namespace"),
            Err(error) => warn!(%error, "link not read"),
        }
    }
}

fn tell(device: &Device, link: &Link) {
    device.set_link(link.up, link.mtu);
}
