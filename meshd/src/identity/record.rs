//! The own record: what it has to say, and its seal.

use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Hash, MeshId, NodeId};
use mesh_protocol::key::SigningKey;
use mesh_protocol::record::NodeRecord;

use super::ring::KeyRing;

/// What goes into a record beside the keys, and what signs it.
pub(super) struct Sealing<'a> {
    pub(super) mesh: MeshId,
    pub(super) node: NodeId,
    pub(super) grant: Hash,
    pub(super) key: &'a SigningKey,
    pub(super) lanes: u8,
}

impl Sealing<'_> {
    /// Whether `record` says what holds now.
    pub(super) fn is_said_by(&self, record: &Envelope, ring: &KeyRing) -> bool {
        let Ok(said) = record.unverified::<NodeRecord>() else { return false };
        said == NodeRecord { before: said.before, ..self.record(ring, ring.seq, None) }
    }

    /// Moves `ring` to its next `seq` and seals the record of it.
    pub(super) fn seal_next(&self, ring: &mut KeyRing) -> Envelope {
        let before = ring.record.as_ref().map(|record| record.hash(self.mesh));
        ring.seq = ring.seq.saturating_add(1);
        let envelope = Envelope::seal(self.mesh, &self.record(ring, ring.seq, before), &[self.key]);
        ring.record = Some(envelope.clone());
        envelope
    }

    fn record(&self, ring: &KeyRing, seq: u64, before: Option<Hash>) -> NodeRecord {
        let (current, previous, spare, kem) = ring.public();
        let (node, grant, lanes) = (self.node, self.grant, self.lanes);
        NodeRecord { node, seq, grant, current, previous, spare, kem, lanes, departed: false, before }
    }
}
