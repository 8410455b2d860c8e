//! The program beside the function it stands for, in the kernel that is to run it.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::packet::header::{TCP, UDP};

const BPF_PROG_TEST_RUN: libc::c_int = 10;

/// What bpf(2) wants to know to run a program once, as far as kernel 4.15 reads it.
#[repr(C)]
struct RunRequest {
    program: u32,
    result: u32,
    data_len: u32,
    out_len: u32,
    data: u64,
    out: u64,
    repeat: u32,
    nanos: u32,
}

/// What the kernel lets the program say about `packet`.
fn run(steering: &Steering, packet: &[u8]) -> u32 {
    // The kernel takes an Ethernet header off first; an experimental type keeps it from looking further.
    let mut frame = vec![0; 12];
    frame.extend([0x88, 0xb5]);
    frame.extend(packet);
    let mut request = RunRequest {
        program: steering.program.as_raw_fd() as u32,
        result: 0,
        data_len: frame.len() as u32,
        out_len: 0,
        data: frame.as_ptr() as u64,
        out: 0,
        repeat: 1,
        nanos: 0,
    };
    let len = size_of::<RunRequest>();
    // SAFETY: the request is as long as stated and the frame, which it points to, outlives the call.
    let done = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut request, len) };
    assert_eq!(done, 0, "{} {packet:?}", io::Error::last_os_error());
    request.result
}

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.next() as usize % limit
    }

    fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    fn pick(&mut self, choices: &[u8]) -> u8 {
        choices[self.below(choices.len())]
    }
}

fn v4(dice: &mut Dice) -> Vec<u8> {
    let options = if dice.one_in(3) { dice.below(11) * 4 } else { 0 };
    let payload = dice.below(40);
    let mut packet = dice.bytes(20 + options + payload);
    packet[0] = 0x40 | (5 + options / 4) as u8;
    let len = packet.len() as u16;
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    let flags = if dice.one_in(3) { dice.pick(&[0x20, 0x60, 0x01, 0x80]) } else { dice.pick(&[0, 0x40]) };
    packet[6..8].copy_from_slice(&[flags, if dice.one_in(4) { 1 } else { 0 }]);
    packet[9] = dice.pick(&[TCP, UDP, 1, 50, 0]);
    packet
}

fn v6(dice: &mut Dice) -> Vec<u8> {
    let mut packet = dice.bytes(40);
    packet[0] = 0x60 | packet[0] & 15;
    let mut protocol_at = 6;
    let extensions = if dice.one_in(3) { 0 } else { dice.below(9) };
    for _ in 0..extensions {
        let kind = dice.pick(&[0, 43, 60, 44, 44]);
        packet[protocol_at] = kind;
        protocol_at = packet.len();
        let units = if kind == 44 || dice.one_in(2) { 0 } else { dice.below(4) };
        let mut extension = dice.bytes(8 + units * 8);
        if kind != 44 {
            extension[1] = units as u8;
        } else if dice.one_in(2) {
            // An atomic fragment, or the first of several; reserved bits are nobody's business.
            extension[2..4].copy_from_slice(&[0, dice.pick(&[0, 0, 1, 6])]);
        }
        packet.extend(extension);
    }
    packet[protocol_at] = dice.pick(&[TCP, UDP, 58, 59, 50, 135]);
    let payload = dice.below(30);
    packet.extend(dice.bytes(payload));
    let len = packet.len() as u16 - 40;
    packet[4..6].copy_from_slice(&len.to_be_bytes());
    packet
}

/// Cut off, padded, or wrong in a byte.
fn spoil(dice: &mut Dice, packet: &mut Vec<u8>) {
    match dice.below(4) {
        0 => packet.truncate(1 + dice.below(packet.len())),
        1 => {
            let padding = 1 + dice.below(20);
            packet.extend(dice.bytes(padding));
        }
        2 => {
            let at = dice.below(packet.len().min(60));
            packet[at] = dice.next() as u8;
        }
        _ => {}
    }
}

#[test]
fn the_kernel_computes_the_same_lane() {
    let mut dice = Dice(7);
    for lanes in [1, 2, 3, 4, 8] {
        let flow = FlowHash::new(dice.bytes(16).try_into().unwrap());
        let steering = Steering::load(&flow, lanes).unwrap();
        let mut seen = vec![0; lanes as usize];
        for n in 0..6_000 {
            let mut packet = if dice.one_in(2) { v4(&mut dice) } else { v6(&mut dice) };
            if n % 3 == 0 {
                spoil(&mut dice, &mut packet);
            }
            let expected = flow.lane_of(&packet, lanes as usize);
            assert_eq!(run(&steering, &packet) as usize, expected, "{lanes} lanes, {packet:02x?}");
            seen[expected] += 1;
        }
        assert!(seen.iter().all(|count| *count > 400), "all lanes are used: {seen:?}");
    }
}

#[test]
fn noise_does_not_tell_them_apart_either() {
    let mut dice = Dice(8);
    let flow = FlowHash::new([3; 16]);
    let steering = Steering::load(&flow, 8).unwrap();
    for _ in 0..20_000 {
        let len = 1 + dice.below(100);
        let mut packet = dice.bytes(len);
        packet[0] = dice.pick(&[0x45, 0x46, 0x60, 0x6f, 0x4f, packet[0]]);
        if packet.len() > 5 && dice.one_in(2) {
            packet[2] = 0;
            packet[4] = 0;
        }
        assert_eq!(run(&steering, &packet) as usize, flow.lane_of(&packet, 8), "{packet:02x?}");
    }
}

#[test]
fn what_is_no_device_takes_no_program() {
    let steering = Steering::load(&FlowHash::new([3; 16]), 4).unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(steering.attach(&file), Err(SteeringError::Attach(_))));
}

#[test]
fn a_program_that_the_verifier_refuses_is_explained() {
    // Ends without a result in register 0.
    let mut code = assembler::Assembler::default();
    code.exit();
    let code = code.finish();
    let mut log = vec![0; LOG_LEN];
    assert!(load(&code, &mut log).is_err());
    assert!(log.starts_with(b"0: "), "{}", String::from_utf8_lossy(&log));
}
