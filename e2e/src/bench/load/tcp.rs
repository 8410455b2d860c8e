//! TCP streams of a known pattern, checked where they arrive.

use std::io::{Read, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use socket2::SockRef;

use super::{DEAD, ready};

const PORT: u16 = 7001;
/// One write and one read at most: it stays in the second-level cache, as that of other load generators.
const BLOCK: usize = 128 << 10;
/// One block in so many is compared whole; of the others, the first bytes of each page.
const WHOLE: u64 = 16;
const PAGE: usize = 4096;
const GLANCE: usize = 64;

/// Accepts `streams` and takes what comes until each ends.
pub(super) fn serve(address: Ipv4Addr, streams: usize) -> Result<Value> {
    let listener = TcpListener::bind((address, PORT)).with_context(|| format!("listen on {address}"))?;
    ready()?;
    let mut threads = Vec::new();
    for _ in 0..streams {
        let (stream, _) = listener.accept()?;
        threads.push(std::thread::spawn(move || receive(stream)));
    }
    let mut bytes = 0;
    let mut time = Duration::ZERO;
    for result in join(threads)? {
        bytes += result.0;
        time = time.max(result.1);
    }
    Ok(json!({"bytes": bytes, "seconds": time.as_secs_f64()}))
}

fn receive(mut stream: TcpStream) -> Result<(u64, Duration)> {
    stream.set_read_timeout(Some(DEAD))?;
    let pattern = pattern();
    let mut buffer = vec![0; BLOCK];
    let (mut total, mut start) = (0_u64, None);
    loop {
        let filled = fill(&mut stream, &mut buffer)?;
        let start = *start.get_or_insert_with(Instant::now);
        check(&buffer[..filled], &pattern, total / BLOCK as u64)?;
        total += filled as u64;
        if filled < BLOCK {
            return Ok((total, start.elapsed()));
        }
    }
}

fn fill(stream: &mut impl Read, buffer: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match stream.read(&mut buffer[filled..]).context("receive")? {
            0 => break,
            length => filled += length,
        }
    }
    Ok(filled)
}

fn check(block: &[u8], pattern: &[u8], number: u64) -> Result<()> {
    let step = if number.is_multiple_of(WHOLE) { PAGE } else { GLANCE };
    for (got, expected) in block.chunks(PAGE).zip(pattern.chunks(PAGE)) {
        let length = got.len().min(step);
        ensure!(got[..length] == expected[..length], "block {number} arrived with other bytes");
    }
    Ok(())
}

/// Sends over `streams` for `seconds`, and waits until the other end has it all.
pub(super) fn send(address: Ipv4Addr, streams: usize, seconds: f64) -> Result<Value> {
    let before = retransmitted()?;
    let time = Duration::from_secs_f64(seconds);
    let mut threads = Vec::new();
    for _ in 0..streams {
        let stream = TcpStream::connect_timeout(&(address, PORT).into(), DEAD).context("connect")?;
        SockRef::from(&stream).set_tcp_congestion(b"cubic").context("choose cubic")?;
        threads.push(std::thread::spawn(move || push(stream, time)));
    }
    let bytes: u64 = join(threads)?.into_iter().sum();
    Ok(json!({"bytes": bytes, "retransmits": retransmitted()?.saturating_sub(before)}))
}

fn push(mut stream: TcpStream, time: Duration) -> Result<u64> {
    stream.set_write_timeout(Some(DEAD))?;
    stream.set_read_timeout(Some(DEAD))?;
    let pattern = pattern();
    let end = Instant::now() + time;
    let mut bytes = 0;
    while Instant::now() < end {
        stream.write_all(&pattern).context("send")?;
        bytes += pattern.len() as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let length = stream.read(&mut [0]).context("wait for the other end")?;
    ensure!(length == 0, "the other end talks");
    Ok(bytes)
}

/// Bytes that look like none of their neighbours, so that a lost or doubled segment shows.
fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(BLOCK);
    while bytes.len() < BLOCK {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_be_bytes());
    }
    bytes
}

fn join<T>(threads: Vec<JoinHandle<Result<T>>>) -> Result<Vec<T>> {
    threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a stream panicked"))?).collect()
}

/// Segments this namespace sent more than once so far.
fn retransmitted() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/net/snmp")?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else { bail!("no TCP in /proc/net/snmp") };
    let at = names.split(' ').position(|name| name == "RetransSegs").context("no RetransSegs")?;
    Ok(values.split(' ').nth(at).context("no value of RetransSegs")?.parse()?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_byte_at_the_start_of_a_page_is_seen_in_every_block_and_anywhere_in_some() {
        let pattern = pattern();
        check(&pattern, &pattern, 0).unwrap();
        check(&pattern[..100], &pattern, 1).unwrap();
        let mut other = pattern.clone();
        other[3 * PAGE] ^= 1;
        assert!(check(&other, &pattern, 1).is_err());
        other = pattern.clone();
        other[3 * PAGE + 1000] ^= 1;
        assert!(check(&other, &pattern, WHOLE).is_err());
    }

    #[test]
    fn a_shifted_stream_is_seen_in_every_block() {
        let pattern = pattern();
        assert!(check(&pattern[1380..], &pattern, 1).is_err());
    }
}
