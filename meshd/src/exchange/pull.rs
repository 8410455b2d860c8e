//! One object on its way from a peer, piece by piece: ask, wait, ask again.

use std::time::{Duration, Instant};

use mesh_protocol::peer::{MAX_OBJECT_BYTES, PeerMessage, Piece, Want, tag};

/// How long a piece may take before it is asked for again: a handshake may come first.
const PIECE_WITHIN: Duration = Duration::from_millis(700);
/// How often one piece is asked for.
const TRIES: u32 = 4;

/// What a piece led to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nobody asked for it.
    Foreign,
    /// Ask for the next one.
    More,
    /// The peer does not have it, or it is not what it says.
    Failed,
    /// All of it.
    Whole(Vec<u8>),
}

/// One object in the making.
#[derive(Debug)]
pub(super) struct Pull {
    want: Want,
    /// Tag and length, from the first piece.
    object: Option<(u64, usize)>,
    /// At most [`MAX_OBJECT_BYTES`].
    bytes: Vec<u8>,
    due: Instant,
    tries: u32,
}

impl Pull {
    pub(super) fn new(want: Want, now: Instant) -> Self {
        Self { want, object: None, bytes: Vec::new(), due: now + PIECE_WITHIN, tries: 1 }
    }

    pub(super) fn want(&self) -> Want {
        self.want
    }

    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// The question for the next piece.
    pub(super) fn request(&self) -> PeerMessage {
        PeerMessage::Get { want: self.want, offset: u32::try_from(self.bytes.len()).unwrap_or(u32::MAX) }
    }

    /// The piece did not come: whether to ask once more.
    pub(super) fn retry(&mut self, now: Instant) -> bool {
        self.tries += 1;
        self.due = now + PIECE_WITHIN;
        self.tries <= TRIES
    }

    pub(super) fn handle_part(&mut self, want: Want, offset: u32, piece: Option<Piece>, now: Instant) -> Progress {
        if want != self.want || usize::try_from(offset) != Ok(self.bytes.len()) {
            return Progress::Foreign;
        }
        let Some(piece) = piece else { return Progress::Failed };
        let (tag_told, total) = *self.object.get_or_insert((piece.tag, piece.total as usize));
        // Another object took its place, or nonsense: from the start again, a little later.
        let fits = piece.tag == tag_told && piece.total as usize == total && total <= MAX_OBJECT_BYTES;
        if !fits || piece.bytes.is_empty() || self.bytes.len() + piece.bytes.len() > total {
            return Progress::Failed;
        }
        self.bytes.extend_from_slice(&piece.bytes);
        (self.due, self.tries) = (now + PIECE_WITHIN, 1);
        if self.bytes.len() < total {
            return Progress::More;
        }
        let object = std::mem::take(&mut self.bytes);
        if tag(&object) == tag_told { Progress::Whole(object) } else { Progress::Failed }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn an_object_is_put_together_and_nothing_else_is() {
        let (now, want) = (Instant::now(), Want::Policy { version: 2 });
        let object: Vec<u8> = (0..2500_u32).map(|n| n as u8).collect();
        let mut pull = Pull::new(want, now);
        for offset in [0, 1024, 2048] {
            assert_eq!(pull.request(), PeerMessage::Get { want, offset });
            let other = Want::Policy { version: 3 };
            assert_eq!(pull.handle_part(other, offset, Piece::of(&object, offset), now), Progress::Foreign);
            assert_eq!(pull.handle_part(want, offset + 1, Piece::of(&object, offset), now), Progress::Foreign);
            let progress = pull.handle_part(want, offset, Piece::of(&object, offset), now);
            assert_eq!(progress, if offset < 2048 { Progress::More } else { Progress::Whole(object.clone()) });
        }
    }

    #[test]
    fn a_peer_that_lies_about_it_is_given_up() {
        let (now, want) = (Instant::now(), Want::Policy { version: 2 });
        let object = vec![7; 2000];
        let piece = |change: fn(&mut Piece)| {
            let mut piece = Piece::of(&object, 1024).unwrap();
            change(&mut piece);
            Some(piece)
        };
        let wrong: [fn(&mut Piece); 5] = [
            |piece| piece.tag += 1,
            |piece| piece.total += 1,
            |piece| piece.bytes.clear(),
            |piece| piece.bytes.push(7),
            |piece| piece.bytes[0] = 8,
        ];
        for change in wrong {
            let mut pull = Pull::new(want, now);
            assert_eq!(pull.handle_part(want, 0, Piece::of(&object, 0), now), Progress::More);
            assert_eq!(pull.handle_part(want, 1024, piece(change), now), Progress::Failed);
        }
        let mut pull = Pull::new(want, now);
        assert_eq!(pull.handle_part(want, 0, None, now), Progress::Failed);
        assert_eq!((0..9).filter(|_| pull.retry(now)).count(), 3);
    }
}
