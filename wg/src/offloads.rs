//! Which offloads the device uses: all that this kernel does right, tried at each start.

use std::io;

use mesh_dataplane::{
    packet::offload::Offloads,
    selfcheck::{Findings, ScratchLink, SelfCheck},
    udp::Trains,
};
use mesh_hostnet::{
    netns::Netns,
    scratch::{self, ScratchLink as Plan},
};
use tracing::{debug, info, subscriber::NoSubscriber, warn};

/// Tries them with real trains in a network namespace of its own, for some 100 ms. Where it may not make one, all are taken
/// for right, and the log says so.
pub fn choose() -> (Offloads, Trains) {
    let (mut offloads, mut trains) = (Offloads::ALL, Trains::ALL);
    match try_all() {
        Ok(findings) => {
            debug!(faults = findings.faults().count(), "offloads were tried");
            for (class, fault) in findings.faults() {
                info!(offload = class.as_str(), reason = %fault, "offload is off");
                class.turn_off(&mut offloads, &mut trains);
            }
        }
        Err(error) => warn!(%error, "offloads were not tried on this kernel"),
    }
    (offloads, trains)
}

fn try_all() -> io::Result<Findings> {
    let namespace = Netns::create().map_err(io::Error::other)?;
    let run = || {
        let check = SelfCheck::open()?;
        let links = SelfCheck::links();
        let plans = links.iter().map(|ScratchLink { name, addresses, routes }| Plan { name, addresses, routes });
        let has_v6 = scratch::set_up(plans).map_err(io::Error::other)?;
        Ok(check.run(has_v6))
    };
    // What scratch devices and sockets say of themselves is nobody's concern.
    namespace.run(|| tracing::subscriber::with_default(NoSubscriber::default(), run)).map_err(io::Error::other)?
}
