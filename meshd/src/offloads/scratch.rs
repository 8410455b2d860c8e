//! A network namespace for the self-check, gone when it is over.

use anyhow::Context as _;
use mesh_dataplane::selfcheck::{Findings, ScratchLink, SelfCheck};
use mesh_hostnet::netns::Netns;
use mesh_hostnet::scratch::{self, ScratchLink as Plan};
use tracing::subscriber::NoSubscriber;

use super::{Tried, boot, kernel};

/// Tries all offloads of this kernel.
///
/// # Errors
/// It refused a namespace, a device or what belongs to them.
pub(super) fn try_all() -> anyhow::Result<Tried> {
    let namespace = Netns::create().context("make a network namespace to try offloads in")?;
    let run = || -> anyhow::Result<Findings> {
        let check = SelfCheck::open().context("open scratch devices to try offloads on")?;
        let links = SelfCheck::links();
        let plans = links.iter().map(|ScratchLink { name, addresses, routes }| Plan { name, addresses, routes });
        let has_v6 = scratch::set_up(plans).context("set up the scratch devices")?;
        Ok(check.run(has_v6))
    };
    // What scratch devices and sockets say of themselves is nobody's concern.
    let findings = namespace.run(|| tracing::subscriber::with_default(NoSubscriber::default(), run))??;
    let faults = findings.faults().map(|(class, fault)| (class.as_str().to_owned(), fault.to_string())).collect();
    Ok(Tried { boot: boot().unwrap_or_default(), kernel: kernel(), faults })
}
