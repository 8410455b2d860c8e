//! Netlink framing and attributes: what rtnetlink and nf_tables share.
//!
//! ```text
//! datagram   message, message, ...                  each padded to 4 bytes
//! message    u32 length, u16 type, u16 flags, u32 sequence, u32 port, payload     host byte order
//! attribute  u16 length (with these 4 bytes), u16 type and flag bits, value       padded to 4 bytes
//! ```
//!
//! Reading never fails as a whole: a message or attribute whose length does not fit ends the walk.

use nix::errno::Errno;

/// Bytes of a message header.
pub(crate) const HEADER_LEN: usize = 16;
const ATTRIBUTE_LEN: usize = 4;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
const FLAG_CAPPED: u16 = 0x100;
const FLAG_ACK_TLVS: u16 = 0x200;
const ERROR_MESSAGE_TEXT: u16 = 1;

/// One message of a datagram.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) payload: &'a [u8],
}

/// The messages of a datagram.
pub(crate) fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = u32_at(rest, 0)? as usize;
        let payload = rest.get(HEADER_LEN..length)?;
        let message = Message { kind: u16_at(rest, 4)?, flags: u16_at(rest, 6)?, sequence: u32_at(rest, 8)?, payload };
        rest = rest.get(aligned(length)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes of a payload: type without flag bits, value.
pub(crate) fn attributes(payload: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = payload;
    std::iter::from_fn(move || {
        let length = u16_at(rest, 0)? as usize;
        let kind = u16_at(rest, 2)? & TYPE_MASK;
        let value = rest.get(ATTRIBUTE_LEN..length)?;
        rest = rest.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of type `kind`.
pub(crate) fn attribute(payload: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(payload).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// A text attribute: up to the first zero byte, other than UTF-8 replaced.
pub(crate) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// A number in network byte order.
pub(crate) fn be32(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

/// What an `NLMSG_ERROR` or a failed `NLMSG_DONE` says: `None` is an acknowledgement.
pub(crate) fn error_of(message: &Message<'_>) -> Option<(Errno, Option<String>)> {
    let code = u32_at(message.payload, 0).map_or(0, |code| code as i32);
    if code >= 0 {
        return None;
    }
    let text = (message.flags & FLAG_ACK_TLVS != 0).then(|| extended_text(message)).flatten();
    Some((Errno::from_raw(code.wrapping_neg()), text))
}

fn extended_text(message: &Message<'_>) -> Option<String> {
    // NLMSG_ERROR: the code, then the request's header, then the rest of the request unless it was capped.
    let mut skip = 4;
    if message.kind == libc::NLMSG_ERROR as u16 {
        let echoed = u32_at(message.payload, 4)? as usize;
        let capped = message.flags & FLAG_CAPPED != 0;
        skip += if capped { HEADER_LEN } else { aligned(echoed) };
    }
    let value = attribute(message.payload.get(skip..)?, ERROR_MESSAGE_TEXT)?;
    Some(text(value))
}

/// Builds one message.
#[derive(Debug)]
pub(crate) struct Builder {
    bytes: Vec<u8>,
}

impl Builder {
    /// Starts a message; the length is filled in by [`finish`](Self::finish).
    pub(crate) fn new(kind: u16, flags: u16, sequence: u32) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        Self { bytes }
    }

    /// Appends fixed bytes behind the header.
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Appends a text attribute with its closing zero.
    pub(crate) fn text(mut self, kind: u16, value: &str) -> Self {
        put_text(&mut self.bytes, kind, value);
        self
    }

    /// The message with its length, padded.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        pad(&mut self.bytes);
        self.bytes
    }
}

/// Appends an attribute to `out`. Values longer than 64 KiB do not occur: callers split lists.
pub(crate) fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_LEN + value.len()).expect("attribute values are below 64 KiB");
    out.extend_from_slice(&length.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    pad(out);
}

/// Appends a text attribute to `out`.
pub(crate) fn put_text(out: &mut Vec<u8>, kind: u16, value: &str) {
    let mut bytes = value.as_bytes().to_vec();
    bytes.push(0);
    put(out, kind, &bytes);
}

/// Appends a number in network byte order to `out`.
pub(crate) fn put_be32(out: &mut Vec<u8>, kind: u16, value: u32) {
    put(out, kind, &value.to_be_bytes());
}

/// Appends an attribute made of attributes to `out`.
pub(crate) fn put_nested(out: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; ATTRIBUTE_LEN]);
    fill(out);
    let length = u16::try_from(out.len() - start).expect("nested attributes are below 64 KiB");
    out[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    out[start + 2..start + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
}

fn pad(out: &mut Vec<u8>) {
    out.resize(aligned(out.len()), 0);
}

fn aligned(length: usize) -> usize {
    length.saturating_add(3) & !3
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_built_is_read_back() {
        let mut nested = Vec::new();
        put_nested(&mut nested, 2, |out| put_be32(out, 3, 77));
        let bytes = Builder::new(7, 5, 9).raw(&[1, 2, 3, 4]).text(1, "mesh").raw(&nested).finish();
        let twice = [bytes.clone(), bytes].concat();
        let read: Vec<_> = messages(&twice).collect();
        assert_eq!(read.len(), 2);
        assert_eq!((read[1].kind, read[1].flags, read[1].sequence), (7, 5, 9));
        let body = &read[1].payload[4..];
        assert_eq!(text(attribute(body, 1).unwrap()), "mesh");
        assert_eq!(be32(attribute(attribute(body, 2).unwrap(), 3).unwrap()), Some(77));
    }

    #[test]
    fn extended_text_is_found_behind_a_capped_and_a_whole_request() {
        for (flags, echoed) in [(FLAG_ACK_TLVS | FLAG_CAPPED, 40_u32), (FLAG_ACK_TLVS, 24)] {
            let mut payload = (-22_i32).to_ne_bytes().to_vec();
            payload.extend_from_slice(&echoed.to_ne_bytes());
            payload.extend_from_slice(&[0; 12]);
            if flags & FLAG_CAPPED == 0 {
                payload.extend_from_slice(&[0; 8]);
            }
            put_text(&mut payload, ERROR_MESSAGE_TEXT, "bad");
            let message = Message { kind: 2, flags, sequence: 0, payload: &payload };
            assert_eq!(error_of(&message), Some((Errno::EINVAL, Some("bad".into()))));
        }
    }

    proptest! {
        #[test]
        fn reading_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), flags: u16) {
            for message in messages(&bytes) {
                let _ = attributes(message.payload).count();
            }
            let _ = attributes(&bytes).count();
            let _ = text(&bytes);
            let _ = error_of(&Message { kind: 2, flags, sequence: 0, payload: &bytes });
        }
    }
}
