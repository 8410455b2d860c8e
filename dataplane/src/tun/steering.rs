//! Which queue the kernel puts a packet into: a program of ours that computes the lane of its flow.
//!
//! The kernel's own choice follows what was last written to which queue, forgets a flow after seconds and hashes
//! differently on each machine. This program computes [`FlowHash::lane_of`], so that a flow keeps its lane and both
//! ends agree. It is assembled here, a few hundred instructions without a loop, and handed to the kernel by bpf(2) as a
//! socket filter, which TUN devices take with `TUNSETSTEERINGEBPF` (kernel 4.16 and later). It stays with the device,
//! also while no process has it open.
#![allow(unsafe_code, reason = "bpf(2) and an ioctl; each block is one call")]

mod assembler;
mod program;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

use tracing::debug;

use crate::packet::flow::FlowHash;
use assembler::Instruction;

const TUNSETSTEERINGEBPF: libc::c_ulong = 0x8004_54e0;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;
/// Room for what the kernel's verifier says; the end of a longer text is lost.
const LOG_LEN: usize = 64 << 10;

/// The kernel did not take the program.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SteeringError {
    /// It was refused: no `CAP_BPF`, no bpf(2) at all, or the verifier does not like it. The verifier's words are logged at
    /// debug level.
    #[error("load the steering program")]
    Load(#[source] io::Error),
    /// The device does not take one.
    #[error("attach the steering program")]
    Attach(#[source] io::Error),
}

/// A program that the kernel has checked.
#[derive(Debug)]
pub struct Steering {
    program: OwnedFd,
}

impl Steering {
    /// Makes the program that chooses among `lanes` queues, and hands it to the kernel.
    ///
    /// # Errors
    ///
    /// [`SteeringError::Load`].
    pub fn load(flow: &FlowHash, lanes: u32) -> Result<Self, SteeringError> {
        let code = program::assemble(flow, lanes);
        match load(&code, &mut []) {
            Ok(program) => Ok(Self { program }),
            Err(error) => {
                let mut log = vec![0; LOG_LEN];
                // Only to be told why.
                let _ = load(&code, &mut log);
                let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
                let verifier = String::from_utf8_lossy(&log[..end]);
                debug!(%error, instructions = code.len(), %verifier, "steering program refused");
                Err(SteeringError::Load(error))
            }
        }
    }

    /// Lets the device that `queue` belongs to use the program, in place of the one that it has.
    ///
    /// # Errors
    ///
    /// [`SteeringError::Attach`].
    pub fn attach(&self, queue: &impl AsFd) -> Result<(), SteeringError> {
        let program: libc::c_int = self.program.as_raw_fd();
        // SAFETY: both descriptors are open; the kernel reads one int, which outlives the call.
        if unsafe { libc::ioctl(queue.as_fd().as_raw_fd(), TUNSETSTEERINGEBPF, &raw const program) } < 0 {
            return Err(SteeringError::Attach(io::Error::last_os_error()));
        }
        Ok(())
    }
}

/// What bpf(2) wants to know to load a program, as far as kernel 4.15 reads it.
#[repr(C)]
#[derive(Debug)]
struct LoadRequest {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_len: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// Loads a program; what the verifier says goes into `log` unless that is empty.
fn load(code: &[Instruction], log: &mut [u8]) -> io::Result<OwnedFd> {
    let mut request = LoadRequest {
        kind: BPF_PROG_TYPE_SOCKET_FILTER,
        instructions: code.len() as u32,
        code: code.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: u32::from(!log.is_empty()),
        log_len: log.len() as u32,
        log: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
        kernel_version: 0,
        flags: 0,
        name: *b"mesh_steering\0\0\0",
    };
    let len = size_of::<LoadRequest>();
    // SAFETY: the request is as long as stated; code, licence and log, to which it points, outlive the call, and the
    // kernel writes to the log alone, no more than its length.
    let program = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw mut request, len) };
    if program < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made this descriptor for us, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(program as libc::c_int) })
}
