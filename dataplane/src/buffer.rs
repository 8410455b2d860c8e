//! Packets lying one behind another in one allocation, reused for ever.
//!
//! A lane reads, seals and sends in batches. The bytes of a batch are contiguous, so that sealed datagrams of one size
//! to one destination already are the train that one `sendmsg` can carry.

/// Largest packet or datagram: what an IP length field can say.
pub const MAX_PACKET: usize = 65_535;

/// Room asked for each packet: the largest, WireGuard's header, tag and padding, and a virtio header.
pub const ROOM: usize = MAX_PACKET + 1 + 64;

/// Bytes left free behind a packet at least, for padding.
const SPARE: usize = 15;

/// A bounded run of packets, each with something that goes with it: an address, a header, nothing.
#[derive(Debug)]
pub struct Batch<T> {
    bytes: Box<[u8]>,
    used: usize,
    items: Vec<Item<T>>,
    most_items: usize,
}

#[derive(Debug, Clone, Copy)]
struct Item<T> {
    start: usize,
    len: usize,
    with: T,
}

impl<T: Copy> Batch<T> {
    /// A batch of at most `most_items` packets of together about `bytes` bytes; one packet of any size always fits.
    ///
    /// The memory is asked for zeroed: pages that no packet ever reaches cost nothing.
    pub fn new(bytes: usize, most_items: usize) -> Self {
        Self {
            bytes: vec![0; bytes + ROOM].into_boxed_slice(),
            used: 0,
            items: Vec::with_capacity(most_items),
            most_items,
        }
    }

    /// Without any room, to stand in for a moment.
    pub(crate) fn none() -> Self {
        Self { bytes: Box::default(), used: 0, items: Vec::new(), most_items: 0 }
    }

    /// Room for one more packet, at least [`ROOM`] bytes, or `None` if the batch is full. The bytes in it are arbitrary.
    pub fn room(&mut self) -> Option<&mut [u8]> {
        if self.is_full() {
            return None;
        }
        Some(&mut self.bytes[self.used..])
    }

    /// Bytes that are free.
    pub fn left(&self) -> usize {
        self.bytes.len() - self.used
    }

    /// True if nothing more fits: pass the batch on and [`clear`](Self::clear) it.
    pub fn is_full(&self) -> bool {
        self.items.len() >= self.most_items || self.left() < ROOM
    }

    /// Takes the first `len` bytes of [`room`](Self::room) as a packet. 15 bytes behind it at least stay free for padding.
    ///
    /// # Panics
    ///
    /// If `len` is more than that room.
    pub fn push(&mut self, len: usize, with: T) {
        self.push_at(0, len, with);
    }

    /// Like [`push`](Self::push) for a packet that begins `offset` bytes into the room.
    ///
    /// # Panics
    ///
    /// If the packet reaches beyond the room.
    pub fn push_at(&mut self, offset: usize, len: usize, with: T) {
        let start = self.used + offset;
        assert!(start + len <= self.bytes.len(), "packet reaches beyond its batch");
        self.items.push(Item { start, len, with });
        self.used = (start + len + SPARE).next_multiple_of(16).min(self.bytes.len());
    }

    /// Like [`push`](Self::push), but the next packet begins right behind this one, as trains need it.
    ///
    /// # Panics
    ///
    /// If `len` is more than the room.
    pub fn push_tight(&mut self, len: usize, with: T) {
        let start = self.used;
        assert!(start + len <= self.bytes.len(), "packet reaches beyond its batch");
        self.items.push(Item { start, len, with });
        self.used = start + len;
    }

    /// Number of packets.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// True without any packet.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Packet number `n` and what goes with it.
    pub fn get(&self, n: usize) -> Option<(T, &[u8])> {
        let item = self.items.get(n)?;
        Some((item.with, &self.bytes[item.start..item.start + item.len]))
    }

    /// Packet number `n` with 15 free bytes behind it (fewer at the end of the batch), and its length.
    pub fn get_padded_mut(&mut self, n: usize) -> Option<(T, &mut [u8], usize)> {
        let item = self.items.get(n)?;
        let end = (item.start + item.len + SPARE).min(self.bytes.len());
        Some((item.with, &mut self.bytes[item.start..end], item.len))
    }

    /// Packet number `n`, to be changed in place.
    pub fn get_mut(&mut self, n: usize) -> Option<&mut [u8]> {
        let item = self.items.get(n)?;
        Some(&mut self.bytes[item.start..item.start + item.len])
    }

    /// How many packets from number `first` on, at most `most` and of together at most `bytes` bytes, make a train: they
    /// lie one right behind another, what goes with them is the same, all are as long as the first but for the last,
    /// which may be shorter. One without bytes is in no train: nothing would tell that it is there. At least one if there
    /// is such a packet.
    pub fn train(&self, first: usize, most: usize, bytes: usize) -> usize
    where
        T: PartialEq,
    {
        let Some(head) = self.items.get(first) else { return 0 };
        let (mut count, mut end) = (1, head.start + head.len);
        for item in self.items[first + 1..].iter().take(most.saturating_sub(1)) {
            let fits = item.start == end && item.len <= head.len && item.start + item.len - head.start <= bytes;
            if !fits || item.len == 0 || item.with != head.with {
                break;
            }
            (count, end) = (count + 1, item.start + item.len);
            if item.len < head.len {
                break;
            }
        }
        count
    }

    /// The bytes of `count` packets from number `first` on, which lie one right behind another.
    ///
    /// # Panics
    ///
    /// If there are not that many.
    pub fn span(&self, first: usize, count: usize) -> &[u8] {
        let last = &self.items[first + count - 1];
        &self.bytes[self.items[first].start..last.start + last.len]
    }

    /// Makes a packet of `parts`, each the rest of a packet from some byte on, and puts it in the place of number `place`.
    /// False, and nothing is done, without room for it.
    ///
    /// # Panics
    ///
    /// If there are no such packets or bytes.
    pub(crate) fn gather(&mut self, parts: &[(usize, usize)], place: usize) -> bool {
        let start = self.used;
        let len: usize = parts.iter().map(|&(n, from)| self.items[n].len - from).sum();
        if len > self.left() {
            return false;
        }
        for &(n, from) in parts {
            let Item { start, len, .. } = self.items[n];
            self.bytes.copy_within(start + from..start + len, self.used);
            self.used += len - from;
        }
        (self.items[place].start, self.items[place].len) = (start, len);
        self.used = (self.used + SPARE).next_multiple_of(16).min(self.bytes.len());
        true
    }

    /// Forgets the packets whose numbers `keep` does not want; the others keep their order.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(usize) -> bool) {
        let mut n = 0;
        self.items.retain(|_| {
            n += 1;
            keep(n - 1)
        });
    }

    /// All packets in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (T, &[u8])> {
        self.items.iter().map(|item| (item.with, &self.bytes[item.start..item.start + item.len]))
    }

    /// Forgets all packets; the memory stays.
    pub fn clear(&mut self) {
        self.items.clear();
        self.used = 0;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn any_packet_fits_until_full() {
        let mut batch = Batch::new(100_000, 8);
        let mut count = 0;
        while let Some(room) = batch.room() {
            assert!(room.len() >= ROOM);
            room[..MAX_PACKET].fill(count);
            batch.push(MAX_PACKET, count);
            count += 1;
        }
        assert_eq!(batch.len(), 2);
        for (with, bytes) in batch.iter() {
            assert!(bytes.iter().all(|byte| *byte == with));
        }
    }

    #[test]
    fn trains_end_where_anything_differs() {
        let mut batch = Batch::new(10_000, 32);
        for (len, with) in [(100, 1), (100, 1), (100, 1), (60, 1), (100, 1), (100, 2), (100, 2), (101, 2)] {
            batch.room().unwrap()[..len].fill(with);
            batch.push_tight(len, with);
        }
        batch.push(100, 2);
        batch.push(101, 2);
        let trains = |most, bytes| {
            let (mut at, mut all) = (0, Vec::new());
            while at < batch.len() {
                let count = batch.train(at, most, bytes);
                assert!(count > 0 && batch.span(at, count).len() <= bytes.max(101));
                all.push(count);
                at += count;
            }
            all
        };
        assert_eq!(
            trains(64, 10_000),
            [4, 1, 2, 2, 1],
            "a shorter one ends a train, a longer one begins one, a gap parts"
        );
        assert_eq!(trains(2, 10_000), [2, 2, 1, 2, 2, 1]);
        assert_eq!(trains(64, 300), [3, 1, 1, 2, 2, 1]);
        assert_eq!(batch.train(10, 64, 300), 0);
    }

    #[test]
    fn padding_does_not_reach_the_next_packet() {
        let mut batch = Batch::new(1_000, 8);
        for len in [1, 16, 17] {
            batch.room().unwrap()[..len].fill(7);
            batch.push(len, ());
        }
        for n in 0..3 {
            let (_, bytes, len) = batch.get_padded_mut(n).unwrap();
            bytes[len..].fill(0);
        }
        assert!(batch.iter().all(|(_, bytes)| bytes.iter().all(|byte| *byte == 7)));
    }
}
