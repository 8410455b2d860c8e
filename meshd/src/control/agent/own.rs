//! What this node says of itself: its grant, its record, where it is reached.

use std::time::Duration;

use mesh_protocol::control::NodeMessage;
use mesh_protocol::envelope::Envelope;
use mesh_protocol::record::Endpoints;

use super::{Agent, Now};
use crate::directory::alarm;
use crate::identity::Met;
use crate::paths::own_candidates;

/// How long told endpoints hold.
const ENDPOINTS_LIFE: Duration = Duration::from_secs(60 * 60);
/// How often they are told anew.
const ENDPOINTS_REFRESH: Duration = Duration::from_secs(20 * 60);

impl Agent {
    pub(super) fn meet_own_record(&mut self, record: &Envelope, now: Now) {
        match self.identity.meet_own_record(record, now.wall) {
            Ok(Met::Known) => {}
            Ok(Met::Ahead) => {
                let message = "the keyserver holds a record of this node that this disk does not know: it was \
                               restored from a backup, or a copy of it is at work elsewhere";
                self.alarms().raise(alarm::OWN_RECORD, "", message.to_owned(), now.instant);
            }
            Ok(Met::NotOurs) => tracing::warn!("the keyserver shows a record as ours that is not"),
            Err(error) => self.storage_failed(&error.to_string(), now),
        }
    }

    /// A live session was taken over: this node has only one, so somebody else has its key.
    pub(in crate::control) fn identity_elsewhere(&mut self, now: Now) {
        let message = "another machine opened a control session with this node's identity key: is a copy of its state \
                       directory at work elsewhere? Revoke this node and let one of them join anew";
        self.alarms().raise(alarm::IDENTITY, "", message.to_owned(), now.instant);
    }

    pub(super) fn publish_record(&mut self, now: Now) {
        match self.identity.record() {
            Ok(envelope) if self.published != Some(self.identity.ring().seq()) => {
                self.out.push_back(NodeMessage::Publish { envelope });
            }
            Ok(_) => {}
            Err(error) => self.storage_failed(&error.to_string(), now),
        }
    }

    pub(super) fn publish_endpoints(&mut self, now: Now) {
        let pools = self.directory.pools();
        let mesh: Vec<_> = pools.iter().map(|pool| pool.prefix).collect();
        let (advertise, underlay) = (&self.setup.config.advertise, &self.host.underlay_addresses);
        let observed = self.observed.map(|observed| observed.ip());
        let candidates = own_candidates(advertise, underlay, observed, self.setup.port, &mesh);
        let known = self.endpoints.as_ref().is_some_and(|(told, at)| {
            *told == candidates && now.instant.saturating_duration_since(*at) < ENDPOINTS_REFRESH
        });
        if known || !self.open {
            return;
        }
        // Milliseconds, so that a restart goes on above; and above what was told, when the clock stepped back.
        let told = self.directory.view().member(self.identity.node()).and_then(|own| own.endpoints.as_ref());
        let after_told = told.map_or(0, |told| told.object.seq.saturating_add(1));
        let endpoints = Endpoints {
            node: self.identity.node(),
            seq: after_told.max(now.wall.saturating_mul(1000)),
            candidates: candidates.clone(),
            expires: now.wall.saturating_add(ENDPOINTS_LIFE.as_secs()),
        };
        self.endpoints = Some((candidates, now.instant));
        let envelope = Envelope::seal(self.identity.mesh(), &endpoints, &[self.identity.key()]);
        self.directory.apply_live(std::slice::from_ref(&envelope), now.instant);
        self.out.push_back(NodeMessage::Publish { envelope });
    }
}
