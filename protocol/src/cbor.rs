//! The one dialect of CBOR (RFC 8949) that Mesh writes and reads.
//!
//! Definite lengths, shortest integers, maps with unsigned integer keys in rising order, no tags, no floats, depth at
//! most [`MAX_DEPTH`]. [`check`] walks the bytes once, without allocating, before anything is decoded: what passes has
//! one meaning, and its collections are no longer than the bytes that arrived.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use minicbor::decode::Error as DecodeError;
use minicbor::encode::{Error as EncodeError, Write};
use minicbor::{Decode, Decoder, Encode, Encoder};

/// Arrays and maps inside each other, at most.
pub const MAX_DEPTH: usize = 16;

/// From this key on, a field that the reader does not know makes it refuse a signed object.
pub const CRITICAL_KEYS_FROM: u64 = 128;

/// Bytes are not a message of the expected kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CborError {
    /// The bytes end inside an item.
    #[error("message is cut short")]
    Truncated,
    /// Bytes follow the item.
    #[error("{0} bytes follow the message")]
    TrailingBytes(usize),
    /// Arrays and maps nest deeper than [`MAX_DEPTH`].
    #[error("message nests deeper than {MAX_DEPTH}")]
    TooDeep,
    /// Valid CBOR, but another encoding of what it says exists.
    #[error("encoding is not canonical: {0}")]
    NotCanonical(&'static str),
    /// Tags, floats, undefined, and other things no message of Mesh has.
    #[error("message holds {0}")]
    Forbidden(&'static str),
    /// A field of a signed object that must be understood is not.
    #[error("field {0} must be understood, and is not")]
    CriticalField(u64),
    /// A well-formed message that does not say what was expected here.
    #[error("message does not decode: {0}")]
    Meaning(String),
    /// The message is of a kind this version does not know.
    #[error("unknown message {0}")]
    UnknownMessage(i64),
}

/// Encodes a value. Cannot fail: the buffer grows, and no type of ours refuses.
#[must_use]
pub fn to_vec<T: Encode<()>>(value: &T) -> Vec<u8> {
    minicbor::to_vec(value).expect("writing to memory does not fail")
}

/// Checks the dialect, then decodes; unknown fields are ignored.
///
/// # Errors
/// Any [`CborError`] but [`CborError::CriticalField`].
pub fn from_slice<'b, T: Decode<'b, ()>>(bytes: &'b [u8]) -> Result<T, CborError> {
    check(bytes, u64::MAX)?;
    decode_checked(bytes)
}

/// As [`from_slice`], for payloads of signed objects: keys from [`CRITICAL_KEYS_FROM`] on are refused.
///
/// # Errors
/// Any [`CborError`].
pub fn from_signed<'b, T: Decode<'b, ()>>(bytes: &'b [u8]) -> Result<T, CborError> {
    check(bytes, CRITICAL_KEYS_FROM)?;
    decode_checked(bytes)
}

/// Decodes what [`check`] passed.
pub(crate) fn decode_checked<'b, T: Decode<'b, ()>>(bytes: &'b [u8]) -> Result<T, CborError> {
    let mut decoder = Decoder::new(bytes);
    decoder.decode().map_err(|error| CborError::Meaning(error.to_string()))
}

/// Walks one item that has to fill `bytes` and obey the dialect; map keys have to stay below `keys_below`.
///
/// # Errors
/// Any [`CborError`] but [`CborError::Meaning`] and [`CborError::UnknownMessage`].
pub fn check(bytes: &[u8], keys_below: u64) -> Result<(), CborError> {
    let mut walk = Walk { rest: bytes, keys_below };
    walk.item(0)?;
    if walk.rest.is_empty() { Ok(()) } else { Err(CborError::TrailingBytes(walk.rest.len())) }
}

struct Walk<'a> {
    rest: &'a [u8],
    keys_below: u64,
}

impl<'a> Walk<'a> {
    fn item(&mut self, depth: usize) -> Result<(), CborError> {
        if depth > MAX_DEPTH {
            return Err(CborError::TooDeep);
        }
        let (major, value) = self.head()?;
        match major {
            0 | 1 => Ok(()),
            2 => self.take(value).map(|_| ()),
            3 => {
                let text = self.take(value)?;
                std::str::from_utf8(text).map(|_| ()).map_err(|_| CborError::Forbidden("text that is not UTF-8"))
            }
            4 => (0..value).try_for_each(|_| self.item(depth + 1)),
            5 => self.map(value, depth),
            6 => Err(CborError::Forbidden("a tag")),
            _ => match value {
                20..=22 => Ok(()),
                _ => Err(CborError::Forbidden("a float or an unassigned value")),
            },
        }
    }

    fn map(&mut self, pairs: u64, depth: usize) -> Result<(), CborError> {
        let mut previous = None;
        for _ in 0..pairs {
            let (major, key) = self.head()?;
            if major != 0 {
                return Err(CborError::Forbidden("a map key that is not an unsigned integer"));
            }
            if previous.is_some_and(|previous| key <= previous) {
                return Err(CborError::NotCanonical("map keys repeat or do not rise"));
            }
            if key >= self.keys_below {
                return Err(CborError::CriticalField(key));
            }
            previous = Some(key);
            self.item(depth + 1)?;
        }
        Ok(())
    }

    /// Reads the initial byte and its argument; for major type 7 the argument is the value's number.
    fn head(&mut self) -> Result<(u8, u64), CborError> {
        let first = self.take(1)?[0];
        let (major, info) = (first >> 5, first & 0x1f);
        if major == 7 {
            return if info < 24 { Ok((7, u64::from(info))) } else { Err(CborError::Forbidden("a float or a break")) };
        }
        let (value, least) = match info {
            0..=23 => return Ok((major, u64::from(info))),
            24 => (u64::from(self.take(1)?[0]), 24),
            25 => (self.number::<2>()?, 1 << 8),
            26 => (self.number::<4>()?, 1 << 16),
            27 => (self.number::<8>()?, 1 << 32),
            31 => return Err(CborError::NotCanonical("indefinite length")),
            _ => return Err(CborError::Forbidden("a reserved length")),
        };
        if value < least {
            Err(CborError::NotCanonical("number is not in its shortest form"))
        } else {
            Ok((major, value))
        }
    }

    fn number<const N: usize>(&mut self) -> Result<u64, CborError> {
        Ok(self.take(N as u64)?.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], CborError> {
        let count = usize::try_from(count).map_err(|_| CborError::Truncated)?;
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(CborError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }
}

/// Reads a byte string of exactly 32 bytes.
pub(crate) fn array32(d: &mut Decoder<'_>) -> Result<[u8; 32], DecodeError> {
    d.bytes()?.try_into().map_err(|_| DecodeError::message("not 32 bytes"))
}

/// Reads and writes [`IpNet`]: address bytes (4 or 16, network order), then one byte of prefix length. Host bits are 0.
pub mod net {
    use super::{DecodeError, Decoder, EncodeError, Encoder, IpNet, Ipv4Net, Ipv6Net, Write, ip_from};

    /// For `#[cbor(with)]`.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn encode<C, W: Write>(net: &IpNet, e: &mut Encoder<W>, _: &mut C) -> Result<(), EncodeError<W::Error>> {
        let mut bytes = super::ip_bytes(net.addr());
        bytes.push(net.prefix_len());
        e.bytes(&bytes)?.ok()
    }

    /// For `#[cbor(with)]`.
    ///
    /// # Errors
    /// A length other than 5 or 17, a prefix longer than the address, or host bits that are set.
    pub fn decode<C>(d: &mut Decoder<'_>, _: &mut C) -> Result<IpNet, DecodeError> {
        let bad = |_| DecodeError::message("prefix is longer than the address");
        let bytes = d.bytes()?;
        let (length, address) = bytes.split_last().ok_or_else(|| DecodeError::message("empty prefix"))?;
        let net = match ip_from(address)? {
            std::net::IpAddr::V4(address) => IpNet::V4(Ipv4Net::new(address, *length).map_err(bad)?),
            std::net::IpAddr::V6(address) => IpNet::V6(Ipv6Net::new(address, *length).map_err(bad)?),
        };
        if net.trunc() == net { Ok(net) } else { Err(DecodeError::message("prefix has host bits set")) }
    }
}

macro_rules! list_of {
    ($(#[$doc:meta])* $module:ident, $item:ty, $one:ident) => {
        $(#[$doc])*
        pub mod $module {
            use super::{DecodeError, Decoder, EncodeError, Encoder, Write};

            /// For `#[cbor(with)]`.
            ///
            /// # Errors
            /// Those of the writer.
            pub fn encode<C, W: Write>(
                list: &[$item],
                e: &mut Encoder<W>,
                ctx: &mut C,
            ) -> Result<(), EncodeError<W::Error>> {
                e.array(list.len() as u64)?;
                list.iter().try_for_each(|item| super::$one::encode(item, e, ctx))
            }

            /// For `#[cbor(with)]`.
            ///
            /// # Errors
            /// Those of an element.
            pub fn decode<C>(d: &mut Decoder<'_>, ctx: &mut C) -> Result<Vec<$item>, DecodeError> {
                let count = d.array()?.ok_or_else(|| DecodeError::message("indefinite length"))?;
                (0..count).map(|_| super::$one::decode(d, ctx)).collect()
            }
        }
    };
}

list_of! {
    /// Reads and writes a list of [`IpNet`].
    nets, ipnet::IpNet, net
}
list_of! {
    /// Reads and writes a list of [`SocketAddr`].
    sockets, std::net::SocketAddr, socket
}

/// Reads and writes [`SocketAddr`]: address bytes (4 or 16, network order), then the port (2, big-endian).
pub mod socket {
    use super::{DecodeError, Decoder, EncodeError, Encoder, SocketAddr, Write, ip_from};

    /// For `#[cbor(with)]`.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn encode<C, W: Write>(
        socket: &SocketAddr,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), EncodeError<W::Error>> {
        let mut bytes = super::ip_bytes(socket.ip());
        bytes.extend(socket.port().to_be_bytes());
        e.bytes(&bytes)?.ok()
    }

    /// For `#[cbor(with)]`.
    ///
    /// # Errors
    /// A length other than 6 or 18, or port 0.
    pub fn decode<C>(d: &mut Decoder<'_>, _: &mut C) -> Result<SocketAddr, DecodeError> {
        let bytes = d.bytes()?;
        let (address, port) =
            bytes.split_last_chunk::<2>().ok_or_else(|| DecodeError::message("socket address is cut short"))?;
        let port = u16::from_be_bytes(*port);
        if port == 0 {
            return Err(DecodeError::message("port 0"));
        }
        Ok(SocketAddr::new(ip_from(address)?, port))
    }
}

/// Reads and writes [`IpAddr`]: 4 or 16 bytes, network order.
pub mod ip {
    use super::{DecodeError, Decoder, EncodeError, Encoder, IpAddr, Write};

    /// For `#[cbor(with)]`.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn encode<C, W: Write>(ip: &IpAddr, e: &mut Encoder<W>, _: &mut C) -> Result<(), EncodeError<W::Error>> {
        e.bytes(&super::ip_bytes(*ip))?.ok()
    }

    /// For `#[cbor(with)]`.
    ///
    /// # Errors
    /// A length other than 4 or 16.
    pub fn decode<C>(d: &mut Decoder<'_>, _: &mut C) -> Result<IpAddr, DecodeError> {
        super::ip_from(d.bytes()?)
    }
}

fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn ip_from(bytes: &[u8]) -> Result<IpAddr, DecodeError> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::V4(Ipv4Addr::from(four)));
    }
    if let Ok(sixteen) = <[u8; 16]>::try_from(bytes) {
        return Ok(IpAddr::V6(Ipv6Addr::from(sixteen)));
    }
    Err(DecodeError::message("address is neither 4 nor 16 bytes"))
}

#[cfg(test)]
mod tests;
