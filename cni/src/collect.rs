//! GC: everything of ours goes that the runtime does not know any more.

use std::collections::BTreeSet;

use mesh_hostnet::Handle;
use mesh_protocol::local::{Attachment, LocalReply, LocalRequest};

use crate::client;
use crate::command::{failure, unexpected};
use crate::input::Config;
use crate::reply::Failure;

/// Removes the links of attachments that are not valid, then has meshd release their addresses.
///
/// # Errors
/// The first failure, after everything was tried.
pub(crate) fn collect(valid: Vec<Attachment>, config: &Config) -> Result<(), Failure> {
    let keep: BTreeSet<String> = valid.iter().map(Attachment::host_link).collect();
    let mut host = Handle::open()?;
    let mut outcome = Ok(());
    for link in host.links()? {
        if is_pod_link(&link.name, link.kind.as_deref()) && !keep.contains(&link.name) {
            outcome = outcome.and(host.delete_link(link.index).map_err(Failure::from));
        }
    }
    let collected = match client::ask(&config.socket, &LocalRequest::Collect { valid }) {
        Ok(LocalReply::Released { .. }) => Ok(()),
        Ok(_) => Err(unexpected()),
        Err(error) => Err(failure(&error)),
    };
    outcome.and(collected)
}

/// Whether a link is the host end of a pod of ours: see [`Attachment::host_link`].
fn is_pod_link(name: &str, kind: Option<&str>) -> bool {
    let digits = name.strip_prefix("mesh").unwrap_or_default();
    kind == Some("veth") && digits.len() == 11 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_links_with_names_of_ours_are_pod_links() {
        let ours = Attachment { container: "a".into(), interface: "eth0".into() }.host_link();
        assert!(is_pod_link(&ours, Some("veth")));
        assert!(!is_pod_link(&ours, Some("bridge")));
        for name in ["mesh0", "mesh", "mesh0123456789", "mesh0123456789A", "veth0123456789a", "eth0"] {
            assert!(!is_pod_link(name, Some("veth")), "{name}");
        }
    }
}
