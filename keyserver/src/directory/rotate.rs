//! Rotation on an operator's word: nodes are asked, their new records show that they did, confirmations that all know.

use std::collections::BTreeMap;

use mesh_protocol::admin::RotationFailure;
use mesh_protocol::control::{Refusal, RefusalCode, ServerMessage};
use mesh_protocol::id::{Name, NodeId, Position};

use super::revoke::reaches;
use super::{Directory, SessionKey, refusal};

/// Rotations that may run at once.
const MAX_ROTATIONS: usize = 16;

/// A rotation that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RotationTicket(u64);

/// What became of one node.
#[derive(Debug, Clone)]
struct Turn {
    name: Name,
    /// Epoch of its current key when it was asked.
    before: Option<u64>,
    /// Where its new record stands.
    promoted: Option<Position>,
    failed: Option<String>,
    offline: bool,
}

/// One request of an operator.
#[derive(Debug)]
pub(super) struct Rotation {
    turns: BTreeMap<NodeId, Turn>,
    force: bool,
}

/// How far a rotation is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RotationProgress {
    pub(crate) total: u32,
    pub(crate) promoted: Vec<Name>,
    pub(crate) confirmed: Vec<Name>,
    pub(crate) failed: Vec<RotationFailure>,
    pub(crate) offline: Vec<Name>,
    /// Nothing more will happen.
    pub(crate) done: bool,
}

impl Directory {
    /// Asks nodes to promote their spare keys; none named: all.
    pub(crate) fn rotate(&mut self, nodes: &[String], force: bool) -> Result<RotationTicket, Refusal> {
        if self.rotations.len() >= MAX_ROTATIONS {
            return Err(refusal(RefusalCode::Busy, format!("{MAX_ROTATIONS} rotations are under way")));
        }
        let chosen: Vec<NodeId> = if nodes.is_empty() {
            self.view().members().filter(|(_, member)| !member.has_departed()).map(|(node, _)| *node).collect()
        } else {
            nodes.iter().map(|node| self.find_node(node)).collect::<Result<_, _>>()?
        };
        let request = u64::from_be_bytes(
            crate::keys::random().map_err(|error| refusal(RefusalCode::Unavailable, error.to_string()))?,
        );
        self.flush();
        let mut turns = BTreeMap::new();
        for node in chosen {
            let Some(member) = self.view().member(node) else { continue };
            let name = member.grant.object.name.clone();
            let before = member.record.as_ref().map(|record| record.object.current.epoch);
            let offline = !self.hub.send(node, &ServerMessage::Rotate { request, force, after: before });
            turns.insert(node, Turn { name, before, promoted: None, failed: None, offline });
        }
        let whom = if nodes.is_empty() { "all nodes".to_owned() } else { nodes.join(" ") };
        let detail = format!("{} nodes asked{}", turns.len(), if force { ", forced" } else { "" });
        self.rotations.insert(request, Rotation { turns, force });
        self.note_request("rotate-request", whom, detail);
        Ok(RotationTicket(request))
    }

    /// A node has a new session: what it was asked in the one before may not have reached it.
    pub(super) fn ask_again(&mut self, node: NodeId) {
        let Self { rotations, hub, .. } = self;
        for (request, rotation) in rotations {
            let Some(turn) = rotation.turns.get_mut(&node) else { continue };
            if turn.promoted.is_none() && turn.failed.is_none() {
                let (request, force, after) = (*request, rotation.force, turn.before);
                turn.offline = !hub.send(node, &ServerMessage::Rotate { request, force, after });
            }
        }
    }

    /// A node answered.
    pub(crate) fn rotated(&mut self, key: SessionKey, request: u64, epoch: Option<u64>, error: Option<String>) {
        let turn = self.rotations.get_mut(&request).and_then(|rotation| rotation.turns.get_mut(&key.node));
        if let (Some(turn), None) = (turn, epoch) {
            let words = error.unwrap_or_else(|| "it did not say why".to_owned());
            turn.failed = Some(words.chars().take(256).collect());
        }
        self.hub.progressed();
    }

    /// How far it is.
    pub(crate) fn rotation_progress(&mut self, ticket: RotationTicket) -> RotationProgress {
        let Some(mut rotation) = self.rotations.remove(&ticket.0) else {
            return RotationProgress { done: true, ..RotationProgress::default() };
        };
        let position = self.position();
        for (node, turn) in &mut rotation.turns {
            let record = self.view().member(*node).and_then(|member| member.record.as_ref());
            let epoch = record.map(|record| record.object.current.epoch);
            if turn.promoted.is_none() && epoch > turn.before {
                turn.promoted = Some(position);
                turn.offline = false;
            }
        }
        let progress = self.summary(&rotation);
        self.rotations.insert(ticket.0, rotation);
        progress
    }

    fn summary(&self, rotation: &Rotation) -> RotationProgress {
        let mut progress = RotationProgress {
            total: u32::try_from(rotation.turns.len()).unwrap_or(u32::MAX),
            done: true,
            ..RotationProgress::default()
        };
        for (node, turn) in &rotation.turns {
            let connected = self.hub.sessions().contains_key(node);
            if let Some(position) = turn.promoted {
                progress.promoted.push(turn.name.clone());
                if self.everybody_reached(position) {
                    progress.confirmed.push(turn.name.clone());
                } else {
                    progress.done = false;
                }
            } else if let Some(error) = &turn.failed {
                progress.failed.push(RotationFailure { node: turn.name.clone(), error: error.clone() });
            } else if turn.offline || !connected {
                progress.offline.push(turn.name.clone());
            } else {
                progress.done = false;
            }
        }
        progress
    }

    fn everybody_reached(&self, position: Position) -> bool {
        let reached = |applied: Option<Position>| applied.is_some_and(|applied| reaches(applied, position));
        self.hub.sessions().values().all(|session| reached(session.applied))
    }

    /// The operator is gone.
    pub(crate) fn end_rotation(&mut self, ticket: RotationTicket) {
        self.rotations.remove(&ticket.0);
    }
}
