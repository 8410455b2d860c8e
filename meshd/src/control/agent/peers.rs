//! What peers say inside their tunnels, and what follows from it.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Instant;

use mesh_protocol::id::NodeId;
use mesh_protocol::peer::RecordHead;

use super::{Agent, Now};
use crate::exchange::{Exchange, OwnWord};

impl Agent {
    /// Takes a datagram that came from this address in the mesh; `dropped` others of anybody did not get so far.
    pub(in crate::control) fn handle_datagram(&mut self, from: Ipv4Addr, bytes: &[u8], dropped: u64, now: Now) {
        self.exchange.note_dropped(dropped);
        let sender = self.directory.node_at(from, now.instant).filter(|node| *node != self.identity.node());
        let (Some(sender), Some(own)) = (sender, self.own_word(now)) else {
            self.exchange.note_dropped(1);
            return;
        };
        let whole = self.directory.is_whole();
        let news = self.exchange.handle_datagram(sender, bytes, &mut self.directory, &own, now.instant);
        if news.fresh_checkpoint {
            self.confirm(now);
        }
        if let Some(record) = news.own_record {
            self.meet_own_record(&record, now);
            self.publish_record(now);
        }
        if news.changed {
            self.directory.wait_for_fallen(whole, now.instant);
            self.take_own_grant(now);
            self.check_own_membership(now);
        }
        self.facts_due |= news.changed || news.fresh_checkpoint;
    }

    /// Peers with these numbers have a live session.
    pub(in crate::control) fn set_live(&mut self, numbers: &[u32], now: Now) {
        let live: BTreeSet<NodeId> = self.directory.nodes_numbered(numbers).into_iter().collect();
        if let Some(own) = self.own_word(now) {
            self.exchange.set_live(live, &self.directory, &own, now.instant);
        }
    }

    /// Something may be news to peers: told soon.
    pub(in crate::control) fn notice_news(&mut self, now: Now) {
        if let Some(own) = self.own_word(now) {
            self.exchange.notice_news(&self.directory, &own, now.instant);
        }
    }

    /// Runs what is due of the exchange.
    pub(in crate::control) fn handle_exchange_timeout(&mut self, now: Now) {
        if now.instant >= self.exchange.poll_timeout()
            && let Some(own) = self.own_word(now)
        {
            self.exchange.handle_timeout(&self.directory, &own, now.instant);
        }
    }

    /// When to call [`Self::handle_exchange_timeout`].
    pub(in crate::control) fn poll_exchange_timeout(&self) -> Instant {
        self.exchange.poll_timeout()
    }

    /// The next datagram and the address in the mesh it goes to, until `None`.
    pub(in crate::control) fn poll_datagram(&mut self, now: Now) -> Option<(Ipv4Addr, Vec<u8>)> {
        loop {
            let (node, bytes) = self.exchange.poll_transmit()?;
            if let Some(address) = self.directory.address_of(node, now.instant) {
                return Some((address, bytes));
            }
        }
    }

    /// The exchange, to look at.
    pub(in crate::control) fn exchange(&self) -> &Exchange {
        &self.exchange
    }

    /// This node's address in the mesh.
    pub(in crate::control) fn mesh_address(&self) -> Ipv4Addr {
        self.identity.grant().mesh_v4
    }

    /// `None` while the own record cannot be stored: then there is nothing to say.
    fn own_word(&mut self, now: Now) -> Option<OwnWord> {
        let envelope = match self.identity.record() {
            Ok(envelope) => envelope,
            Err(error) => {
                self.storage_failed(&error.to_string(), now);
                return None;
            }
        };
        // Hashed once for each record.
        let seq = self.identity.ring().seq();
        let known = self.own_head.filter(|head| head.seq == seq);
        let record = known.unwrap_or_else(|| RecordHead { seq, hash: envelope.hash(self.identity.mesh()) });
        self.own_head = Some(record);
        let (node, generation) = (self.identity.node(), self.identity.grant().generation);
        Some(OwnWord { node, generation, record, cut_off: !self.open })
    }
}
