//! DEL: the pod's link goes at once, its addresses go back to meshd, now or when it is there again.
//!
//! Nothing has to exist for this to succeed: not the namespace, not the link, not the lease, not meshd.

use mesh_hostnet::Handle;
use mesh_protocol::local::{Attachment, LocalReply, LocalRequest};

use crate::client::{self, ClientError};
use crate::input::Config;
use crate::note;
use crate::released;
use crate::reply::Failure;

/// Removes a pod's link and releases its addresses.
///
/// # Errors
/// Only if the kernel keeps the link: then the addresses are in use still, and the runtime tries again.
pub(crate) fn detach(attachment: &Attachment, config: &Config) -> Result<(), Failure> {
    let name = attachment.host_link();
    let mut host = Handle::open()?;
    // Routes and neighbours through the link, and its end in the pod, go with it.
    host.delete_link_by_name(&name)?;
    release(attachment, config);
    // An ADD of the same pod that ran beside this one may have made its link after the first look: with a lease that is gone
    // now, or with one that is newer than the release. One that makes it later still finds the lease missing and undoes it
    // itself.
    if host.link_by_name(&name)?.is_some() {
        host.delete_link_by_name(&name)?;
        release(attachment, config);
    }
    Ok(())
}

/// Gives the addresses of an attachment back: to meshd, or to the queue on disk.
pub(crate) fn release(attachment: &Attachment, config: &Config) {
    let why = match client::ask(&config.socket, &LocalRequest::Detach { attachment: attachment.clone() }) {
        Ok(LocalReply::Done) => return,
        Ok(_) => ClientError::Malformed("another reply than was asked for".to_owned()),
        Err(error) => error,
    };
    match released::queue(&config.state_dir, attachment) {
        Ok(()) => note(&format!("{}; its addresses go back when it is there again", why.message())),
        // Not worth a pod that cannot be deleted: meshd gives back leases whose link is gone.
        Err(error) => {
            let place = config.state_dir.display();
            note(&format!("{}; and queueing the release below {place} failed: {error}", why.message()));
        }
    }
}
