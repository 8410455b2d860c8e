//! Request and response: one byte each way over one TCP connection.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{DEAD, input_ended, percentile_us, ready};

const PORT: u16 = 7002;

/// Answers every byte of one connection.
pub(super) fn serve(address: Ipv4Addr) -> Result<Value> {
    let listener = TcpListener::bind((address, PORT)).with_context(|| format!("listen on {address}"))?;
    ready()?;
    let ended = input_ended();
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(DEAD))?;
    let mut byte = [0];
    let mut answered = 0_u64;
    while !ended.load(Ordering::Relaxed) && stream.read(&mut byte)? == 1 {
        stream.write_all(&byte)?;
        answered += 1;
    }
    Ok(json!({"answered": answered}))
}

/// Asks for `seconds`.
pub(super) fn request(address: Ipv4Addr, seconds: f64) -> Result<Value> {
    let mut stream = TcpStream::connect_timeout(&(address, PORT).into(), DEAD).context("connect")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(DEAD))?;
    let time = Duration::from_secs_f64(seconds);
    let mut nanos = Vec::with_capacity(1 << 18);
    let start = Instant::now();
    let mut last = Duration::ZERO;
    let mut byte = [0x55];
    while last < time {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte).context("no answer")?;
        let now = start.elapsed();
        nanos.push(u64::try_from((now - last).as_nanos())?);
        last = now;
    }
    nanos.sort_unstable();
    Ok(json!({
        "exchanges": nanos.len(),
        "per_second": nanos.len() as f64 / last.as_secs_f64(),
        "p50_us": percentile_us(&nanos, 0.5),
        "p99_us": percentile_us(&nanos, 0.99),
    }))
}
