//! One control session as a plain struct: what may be said when, liveness, and answers that need no thought.
//!
//! ```text
//! opening ── Welcome ──> open ── Items, Live, Checkpoint, Published, Rotate ──> events      Ping ──> Pong
//! ```

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_protocol::control::{NodeMessage, Refusal, RefusalCode, ServerMessage};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{KeyId, Position};

/// How long a keyserver has to answer the first message.
const WELCOME_WITHIN: Duration = Duration::from_secs(10);
/// How long a keyserver may be silent: it pings every 3 s. Over TLS this alone tells that its machine died.
const SILENCE: Duration = Duration::from_secs(10);

/// The session is over, by the keyserver's doing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(super) enum SessionEnd {
    /// It said nothing for too long.
    #[error("the keyserver is silent")]
    Silent,
    /// It refused the session.
    #[error("the keyserver refused the session: {0}")]
    Refused(Refusal),
    /// It said something that does not belong there.
    #[error("the keyserver sent {0}")]
    Unexpected(&'static str),
    /// Another session with this identity took over.
    #[error("another session with this node's identity took over: is a copy of its state directory at work elsewhere?")]
    Replaced,
}

/// What the keyserver said, to be judged by the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SessionEvent {
    /// The session is open.
    Welcome {
        checkpoint: Envelope,
        policies: Vec<Envelope>,
        own_record: Option<Envelope>,
        own_grant: Envelope,
        observed: SocketAddr,
    },
    /// Changes of the directory.
    Items { from: Position, to: Position, items: Vec<Envelope>, checkpoint: Option<Envelope> },
    /// Endpoints.
    Live(Vec<Envelope>),
    /// An own object is stored there.
    Published { seq: u64, endpoints: bool },
    /// News that there is no news.
    Checkpoint(Envelope),
    /// Promote the spare key.
    Rotate { request: u64, force: bool, after: Option<u64> },
    /// What becomes of the identity key that was asked for.
    Succession { identity: KeyId, granted: bool, refusal: Option<Refusal> },
    /// Something that was sent is refused; the session goes on.
    Refused(Refusal),
}

/// One control session.
#[derive(Debug)]
pub(super) struct Session {
    open: bool,
    deadline: Instant,
    /// Bounded by what one message of the keyserver causes: the caller drains it after each.
    out: VecDeque<NodeMessage>,
}

impl Session {
    /// Starts one, with `hello` as its first message.
    pub(super) fn new(hello: NodeMessage, now: Instant) -> Self {
        Self { open: false, deadline: now + WELCOME_WITHIN, out: VecDeque::from([hello]) }
    }

    /// Takes a message.
    ///
    /// # Errors
    /// [`SessionEnd`]: close the connection.
    pub(super) fn handle_message(
        &mut self,
        message: ServerMessage,
        now: Instant,
    ) -> Result<Option<SessionEvent>, SessionEnd> {
        if !self.open {
            return self.handle_first(message, now).map(Some);
        }
        self.deadline = now + SILENCE;
        Ok(Some(match message {
            ServerMessage::Welcome { .. } => return Err(SessionEnd::Unexpected("a second welcome")),
            ServerMessage::Replaced { .. } => return Err(SessionEnd::Replaced),
            ServerMessage::Ping { nonce } => {
                self.out.push_back(NodeMessage::Pong { nonce });
                return Ok(None);
            }
            ServerMessage::Items { from, to, items, checkpoint } => SessionEvent::Items { from, to, items, checkpoint },
            ServerMessage::Live { items } => SessionEvent::Live(items),
            ServerMessage::Published { seq, endpoints } => SessionEvent::Published { seq, endpoints },
            ServerMessage::Checkpoint { checkpoint } => SessionEvent::Checkpoint(checkpoint),
            ServerMessage::Rotate { request, force, after } => SessionEvent::Rotate { request, force, after },
            ServerMessage::Succession { identity, granted, refusal } => {
                SessionEvent::Succession { identity, granted, refusal }
            }
            ServerMessage::Error { refusal } => SessionEvent::Refused(refusal),
        }))
    }

    fn handle_first(&mut self, message: ServerMessage, now: Instant) -> Result<SessionEvent, SessionEnd> {
        match message {
            ServerMessage::Welcome { checkpoint, policies, own_record, own_grant, observed } => {
                self.open = true;
                self.deadline = now + SILENCE;
                Ok(SessionEvent::Welcome { checkpoint, policies, own_record, own_grant, observed })
            }
            ServerMessage::Error { refusal } => Err(SessionEnd::Refused(refusal)),
            ServerMessage::Replaced { .. } => Err(SessionEnd::Replaced),
            _ => Err(SessionEnd::Unexpected("something else than a welcome first")),
        }
    }

    /// Takes a well-formed message of a kind this version does not know.
    pub(super) fn handle_unknown(&mut self, number: i64) {
        let message = format!("message {number} is not known to this version");
        self.out.push_back(NodeMessage::Error { refusal: Refusal { code: RefusalCode::BadMessage, message } });
    }

    /// Queues a message of the agent.
    pub(super) fn send(&mut self, message: NodeMessage) {
        self.out.push_back(message);
    }

    /// Whether the keyserver has answered.
    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    /// The next message to send, until `None`.
    pub(super) fn poll_transmit(&mut self) -> Option<NodeMessage> {
        self.out.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    pub(super) fn poll_timeout(&self) -> Instant {
        self.deadline
    }

    /// Ends the session if its deadline has passed.
    ///
    /// # Errors
    /// [`SessionEnd::Silent`].
    pub(super) fn handle_timeout(&self, now: Instant) -> Result<(), SessionEnd> {
        if now >= self.deadline { Err(SessionEnd::Silent) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use mesh_protocol::id::MeshId;

    use super::*;

    fn opened(now: Instant) -> Session {
        let hello = NodeMessage::Hello {
            mesh: MeshId([0; 32]),
            position: None,
            policy_version: 1,
            version: String::new(),
            grant: None,
        };
        let mut session = Session::new(hello, now);
        session.open = true;
        session.poll_transmit();
        session
    }

    #[test]
    fn pings_are_answered_and_keep_it_alive() {
        let now = Instant::now();
        let mut session = opened(now);
        let later = now + SILENCE / 2;
        assert_eq!(session.handle_message(ServerMessage::Ping { nonce: 7 }, later), Ok(None));
        assert_eq!(session.poll_transmit(), Some(NodeMessage::Pong { nonce: 7 }));
        assert_eq!(session.handle_timeout(now + SILENCE), Ok(()));
        assert_eq!(session.handle_timeout(later + SILENCE), Err(SessionEnd::Silent));
    }

    #[test]
    fn nothing_comes_before_the_welcome() {
        let now = Instant::now();
        let mut session = opened(now);
        session.open = false;
        let early = session.handle_message(ServerMessage::Ping { nonce: 7 }, now);
        assert!(matches!(early, Err(SessionEnd::Unexpected(_))));
    }

    #[test]
    fn unknown_messages_are_answered_and_the_session_lives() {
        let mut session = opened(Instant::now());
        session.handle_unknown(99);
        assert!(matches!(session.poll_transmit(), Some(NodeMessage::Error { .. })));
        assert!(session.is_open());
    }
}
