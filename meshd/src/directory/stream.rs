//! Where the changes of one session stand, and whether the next ones attach.

use mesh_protocol::envelope::{Envelope, NO_MESH};
use mesh_protocol::id::{Hash, MeshId, Position};
use mesh_protocol::record::{Checkpoint, TrustPolicy};
use mesh_protocol::trust::next_state;

use super::worlds::States;
use super::{Gap, Mark};

/// Changes as they arrive: see [`Items`](mesh_protocol::control::ServerMessage::Items).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch<'a> {
    /// Where they attach; revision 0 for a full map.
    pub(crate) from: Position,
    /// Where they lead; `from` while more of the same full map follows.
    pub(crate) to: Position,
    /// What changed.
    pub(crate) items: &'a [Envelope],
    /// Newest checkpoint.
    pub(crate) checkpoint: Option<&'a Envelope>,
}

impl Batch<'_> {
    fn is_map(&self) -> bool {
        self.from.revision == 0
    }
}

#[derive(Debug, Default)]
pub(super) struct Stream {
    mark: Option<Mark>,
    /// In the middle of a full map of this history.
    in_map: Option<u64>,
}

impl Stream {
    pub(super) fn at(mark: Option<Mark>) -> Self {
        Self { mark, in_map: None }
    }

    /// Where it stands; `None` in the middle of a full map and before the first.
    pub(super) fn mark(&self) -> Option<Mark> {
        self.mark
    }

    pub(super) fn admit(&self, batch: &Batch<'_>) -> Result<(), Gap> {
        let at = self.mark.map(|mark| mark.position);
        let forward = batch.to.epoch == batch.from.epoch && batch.to.revision >= batch.from.revision;
        let attaches = match self.in_map {
            Some(epoch) => batch.is_map() && batch.from.epoch == epoch,
            None => batch.is_map() || at == Some(batch.from),
        };
        if forward && attaches { Ok(()) } else { Err(Gap { from: batch.from, at }) }
    }

    pub(super) fn advance(&mut self, batch: &Batch<'_>, mesh: MeshId, states: &mut States) {
        if batch.is_map() {
            let more = batch.to == batch.from;
            self.in_map = more.then_some(batch.from.epoch);
            // What led here is not shown, so its hash is the next checkpoint's word.
            self.mark = (!more).then_some(Mark { position: batch.to, state: None });
            return;
        }
        let changes = batch.to.revision - batch.from.revision;
        let whole = usize::try_from(changes) == Ok(batch.items.len());
        let state = self.mark.and_then(|mark| mark.state).filter(|_| whole);
        let state = state.map(|mut state| {
            for (revision, item) in (batch.from.revision + 1..).zip(batch.items) {
                state = next_state(state, hash(item, mesh));
                states.note(Position { epoch: batch.from.epoch, revision }, state);
            }
            state
        });
        self.mark = Some(Mark { position: batch.to, state });
    }

    /// Whether what was received leads to what the keyserver signed, as far as that can be told.
    pub(super) fn agrees_with(&self, checkpoint: &Checkpoint) -> bool {
        let known = self.mark.filter(|mark| mark.position == checkpoint.position).and_then(|mark| mark.state);
        known.is_none_or(|state| state == checkpoint.state)
    }

    /// Takes the signed hash where none is known.
    pub(super) fn anchor(&mut self, checkpoint: &Checkpoint) {
        if let Some(mark) = self.mark.as_mut().filter(|mark| mark.position == checkpoint.position) {
            mark.state = Some(checkpoint.state);
        }
    }
}

/// The first policy makes the mesh id, so it alone is hashed without it.
fn hash(envelope: &Envelope, mesh: MeshId) -> Hash {
    let first = envelope.unverified::<TrustPolicy>().is_ok_and(|policy| policy.version == 1);
    envelope.hash(if first { NO_MESH } else { mesh })
}
