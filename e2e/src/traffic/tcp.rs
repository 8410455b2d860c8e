//! TCP: a bulk transfer whose every byte is checked, and an HTTP request.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use mesh_hostnet::netns::Netns;

use crate::capture::Marker;

const BLOCK: usize = 256 << 10;
/// A connection that carries nothing for this long is dead.
const DEAD: Duration = Duration::from_secs(20);

/// Accepts one connection and checks what arrives against what [`BulkTransfer`] sends.
#[derive(Debug)]
pub struct BulkServer {
    address: SocketAddr,
    received: Arc<AtomicU64>,
    thread: JoinHandle<Result<u64>>,
}

impl BulkServer {
    /// Listens on `address` in `netns`.
    ///
    /// # Errors
    /// If the socket is refused.
    pub fn start(netns: &Netns, address: IpAddr, marker: Marker) -> Result<Self> {
        let listener =
            netns.run(|| TcpListener::bind((address, 0)))?.with_context(|| format!("listen on {address}"))?;
        let address = listener.local_addr()?;
        let received = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&received);
        let thread = std::thread::Builder::new()
            .name("bulk server".to_owned())
            .spawn(move || check(&listener, marker, &counter))?;
        Ok(Self { address, received, thread })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that arrived so far, all of them right.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Waits for the end of the connection; gives the bytes that arrived.
    ///
    /// # Errors
    /// If a byte was wrong, or the connection broke.
    pub fn finish(self) -> Result<u64> {
        self.thread.join().map_err(|_| anyhow!("the bulk server panicked"))?
    }
}

/// A connection that sends until it is stopped or has sent enough.
#[derive(Debug)]
pub struct BulkTransfer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(u64, Duration)>>,
}

impl BulkTransfer {
    /// Connects from `netns` and sends at most `bytes`.
    ///
    /// # Errors
    /// If the connection is not made within 20 s.
    pub fn start(netns: &Netns, to: SocketAddr, bytes: u64, marker: Marker) -> Result<Self> {
        let stream = netns
            .run(|| TcpStream::connect_timeout(&to, DEAD))?
            .with_context(|| format!("connect to {to} from {}", netns.name()))?;
        stream.set_write_timeout(Some(DEAD))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("bulk client".to_owned())
            .spawn(move || send(stream, bytes, marker, &stopping))?;
        Ok(Self { stop, thread })
    }

    /// Stops it; gives the bytes sent, and the time they took.
    ///
    /// # Errors
    /// If the connection broke.
    pub fn stop(self) -> Result<(u64, Duration)> {
        self.stop.store(true, Ordering::Relaxed);
        self.finish()
    }

    /// Waits until all is sent; gives the bytes sent, and the time they took.
    ///
    /// # Errors
    /// If the connection broke.
    pub fn finish(self) -> Result<(u64, Duration)> {
        self.thread.join().map_err(|_| anyhow!("the bulk client panicked"))?
    }
}

/// Every block starts with the marker and its number; the rest follows from the number.
fn block(marker: Marker, number: u64) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK);
    block.extend(marker);
    block.extend(number.to_be_bytes());
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while block.len() < BLOCK {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        block.extend(state.to_be_bytes());
    }
    block
}

fn send(mut stream: TcpStream, bytes: u64, marker: Marker, stop: &AtomicBool) -> Result<(u64, Duration)> {
    let start = Instant::now();
    let mut sent = 0;
    for number in 0.. {
        if sent >= bytes || stop.load(Ordering::Relaxed) {
            break;
        }
        let block = block(marker, number);
        let length = usize::try_from(bytes - sent).unwrap_or(usize::MAX).min(BLOCK);
        stream.write_all(&block[..length]).context("send")?;
        sent += length as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // The other end closes after the last byte: only then the time is over.
    stream.set_read_timeout(Some(DEAD))?;
    stream.read_to_end(&mut Vec::new()).context("wait for the other end")?;
    Ok((sent, start.elapsed()))
}

fn check(listener: &TcpListener, marker: Marker, received: &AtomicU64) -> Result<u64> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(DEAD))?;
    let mut buffer = vec![0; BLOCK];
    for number in 0.. {
        let mut filled = 0;
        while filled < BLOCK {
            let length = stream.read(&mut buffer[filled..]).context("receive")?;
            if length == 0 {
                break;
            }
            filled += length;
            received.fetch_add(length as u64, Ordering::Relaxed);
        }
        let expected = block(marker, number);
        ensure!(buffer[..filled] == expected[..filled], "block {number} arrived with other bytes");
        if filled < BLOCK {
            break;
        }
    }
    Ok(received.load(Ordering::Relaxed))
}

/// Answers every HTTP request with one text.
#[derive(Debug)]
pub struct HttpServer {
    address: SocketAddr,
}

impl HttpServer {
    /// Listens on `address` in `netns`, for as long as this process lives.
    ///
    /// # Errors
    /// If the socket is refused.
    pub fn start(netns: &Netns, address: IpAddr, text: String) -> Result<Self> {
        let listener =
            netns.run(|| TcpListener::bind((address, 8080)))?.with_context(|| format!("listen on {address}"))?;
        let address = listener.local_addr()?;
        std::thread::Builder::new().name("http server".to_owned()).spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away half-way is its own affair.
                let _ = answer(stream, &text);
            }
        })?;
        Ok(Self { address })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn answer(mut stream: TcpStream, text: &str) -> Result<()> {
    stream.set_read_timeout(Some(DEAD))?;
    for line in BufReader::new(&stream).lines() {
        if line?.is_empty() {
            break;
        }
    }
    let length = text.len();
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}")?;
    Ok(())
}

/// Asks an [`HttpServer`] from `netns`; gives the body.
///
/// # Errors
/// If there is no answer within 20 s, or it is not 200.
pub fn http_get(netns: &Netns, to: SocketAddr, header: &str) -> Result<String> {
    let mut stream = netns
        .run(|| TcpStream::connect_timeout(&to, DEAD))?
        .with_context(|| format!("connect to {to} from {}", netns.name()))?;
    stream.set_read_timeout(Some(DEAD))?;
    write!(stream, "GET / HTTP/1.1\r\nHost: {to}\r\nX-Marker: {header}\r\nConnection: close\r\n\r\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    let (head, body) = reply.split_once("\r\n\r\n").context("no HTTP reply")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "HTTP reply: {head}");
    Ok(body.to_owned())
}
