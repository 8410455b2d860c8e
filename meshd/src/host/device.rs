//! The TUN device as this node wants it.

use std::io;

use mesh_dataplane::packet::flow::FlowHash;
use mesh_dataplane::tun::{Device, DeviceOptions, Mode, TunQueue};

/// How to open the device, at start and whenever it is gone.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct DevicePlan {
    /// Kind, queues, offloads.
    pub(crate) options: DeviceOptions,
    /// Key of the flow hash, which says which queue a packet comes out of.
    pub(crate) flow_key: [u8; 16],
}

/// What became of it.
#[derive(Debug)]
pub(crate) struct Opened {
    /// One for each lane.
    pub(crate) queues: Vec<TunQueue>,
    /// Which kind it is.
    pub(crate) mode: Mode,
    /// Why there are fewer queues than planned.
    pub(crate) fewer: Option<String>,
}

impl DevicePlan {
    /// Opens or makes the device.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn open(&self, name: &str) -> io::Result<Opened> {
        let (device, refusal) = Device::open_steered(name, &self.options, &FlowHash::new(self.flow_key))?;
        let mode = device.mode();
        let fewer = match (mode, refusal) {
            (_, Some(error)) => Some(chain(&error)),
            (Mode::Plain, None) if self.options.queues > 1 => Some("a plain device has one queue".into()),
            _ => None,
        };
        Ok(Opened { queues: device.into_queues(), mode, fewer })
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
