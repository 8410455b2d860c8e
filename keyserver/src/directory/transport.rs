//! The keyserver's own key, which it shows on the control channel and signs checkpoints with: a new one is named by the
//! policy first, beside the one in use, and used once nodes know it.

use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::key::{SigningKey, VerifyKey};
use tracing::{info, warn};

use super::{Directory, RevocationTicket, refusal};

/// Keys of keyservers that a policy may name on this command's account: more are rotations that nobody finished.
const MAX_NAMED: usize = 16;

impl Directory {
    /// Names `next` in the policy, unless it is there, and gives who has to confirm that.
    pub(crate) fn announce_transport(&mut self, next: VerifyKey) -> Result<RevocationTicket, Refusal> {
        let policy = self.view().policy();
        if !policy.keyservers.contains(&next) {
            if policy.keyservers.len() >= MAX_NAMED {
                let message =
                    format!("the policy names {MAX_NAMED} keyserver keys already: remove those that are gone");
                return Err(refusal(RefusalCode::Exhausted, message));
            }
            self.amend_policy(|policy| policy.keyservers.push(next))?;
            self.flush();
            info!(key = %next.id().short(), "next transport key named in the trust policy");
        }
        Ok(self.ticket(self.view().policy().name.clone()))
    }

    /// Whether the newest policy names `key`, so that nodes believe it.
    pub(crate) fn names_transport(&self, key: &VerifyKey) -> bool {
        self.view().policy().keyservers.contains(key)
    }

    /// The key in use.
    pub(crate) fn transport(&self) -> VerifyKey {
        self.keys.transport.verify_key()
    }

    /// Shows and signs with `next` from now on.
    pub(crate) fn use_transport(&mut self, next: SigningKey) {
        info!(key = %next.verify_key().id().short(), "transport key in use");
        self.keys.transport = next;
        self.checkpoint = None;
    }

    /// Takes the key before out of the policy. Tells whether it is out.
    pub(crate) fn drop_transport(&mut self, old: &VerifyKey) -> bool {
        if !self.names_transport(old) {
            return true;
        }
        match self.amend_policy(|policy| policy.keyservers.retain(|named| named != old)) {
            Ok(()) => true,
            Err(refusal) => {
                warn!(error = %refusal, "the transport key before is still named in the trust policy");
                self.alarm(format!(
                    "the trust policy still names the keyserver key {old} that is not used any more: 'meshctl policy \
                     propose --remove-keyserver {old}'"
                ));
                false
            }
        }
    }
}
