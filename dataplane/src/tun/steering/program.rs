//! The program itself: [`FlowHash::lane_of`] in instructions of the kernel's virtual machine.
//!
//! ```text
//! read 20 bytes ─> version 4 ────────────────────────────┐
//!               └> version 6, read 40, six extensions ───┴> ports ─> hash ─> modulo lanes
//! anything that is no whole packet ─> lane 0
//! ```
//!
//! The packet lies in kernel memory that need not be contiguous, so pieces of it are copied to the stack first.

use super::assembler::{Assembler, FRAME, Instruction, Label, Op, Reg, Size, When};
use crate::packet::{
    flow::{FlowHash, MULTIPLIERS},
    header::{MAX_EXTENSIONS, TCP, UDP},
};

/// `bpf_skb_load_bytes(packet, offset, to, len)`: zero if the packet has so many bytes.
const LOAD_BYTES: i32 = 26;
/// Where the program's context holds the packet's length.
const CONTEXT_LEN: i16 = 0;

// Kept over calls.
const CONTEXT: Reg = Reg(6);
/// Where the next header begins; the source port in the end.
const AT: Reg = Reg(7);
/// Number of the protocol that begins there.
const PROTOCOL: Reg = Reg(8);
/// Length by the header; the destination port in the end.
const LEN: Reg = Reg(9);
// Lost in calls.
const RESULT: Reg = Reg(0);
const SCRATCH: Reg = Reg(1);
const SUM: Reg = Reg(3);
const FIRST_MULTIPLIER: Reg = Reg(4);
const SECOND_MULTIPLIER: Reg = Reg(5);

// Slots of the stack.
const HEADER: i16 = -48;
const PIECE: i16 = -56;
const FRAGMENT: i16 = -64;
const SOURCE: Slots = Slots { high: -72, low: -80 };
const DESTINATION: Slots = Slots { high: -88, low: -96 };

/// Where the halves of an address are kept.
#[derive(Debug, Clone, Copy)]
struct Slots {
    high: i16,
    low: i16,
}

/// The program that computes the lane, of `lanes`, of a packet's flow.
pub(super) fn assemble(flow: &FlowHash, lanes: u32) -> Vec<Instruction> {
    let mut code = Assembler::default();
    let [v4, v6, ports, hash, none] = [(); 5].map(|()| code.label());
    code.op(Op::Move, CONTEXT, SCRATCH);
    read(&mut code, None, HEADER, 20, none);
    code.load(Size::Byte, RESULT, FRAME, HEADER);
    code.op(Op::Move, SCRATCH, RESULT);
    code.op_constant(Op::ShiftRight, SCRATCH, 4);
    code.jump_if_constant(SCRATCH, When::Equal, 4, v4);
    code.jump_if_constant(SCRATCH, When::Equal, 6, v6);
    code.jump(none);

    code.place(v4);
    parse_v4(&mut code, none);
    code.jump(ports);
    code.place(v6);
    parse_v6(&mut code, none);
    skip_extensions(&mut code, ports);

    code.place(ports);
    read_ports(&mut code, hash);
    code.place(hash);
    hash_flow(&mut code, flow);
    code.op_constant(Op::Modulo, RESULT, lanes.max(1) as i32);
    code.exit();
    code.place(none);
    code.op_constant(Op::Move, RESULT, 0);
    code.exit();
    code.finish()
}

/// Copies `len` bytes from `from` in the packet, or from its start, to the stack.
fn read(code: &mut Assembler, from: Option<Reg>, to: i16, len: i32, otherwise: Label) {
    code.op(Op::Move, Reg(1), CONTEXT);
    match from {
        Some(from) => code.op(Op::Move, Reg(2), from),
        None => code.op_constant(Op::Move, Reg(2), 0),
    }
    code.op(Op::Move, Reg(3), FRAME);
    code.op_constant(Op::Add, Reg(3), i32::from(to));
    code.op_constant(Op::Move, Reg(4), len);
    code.call(LOAD_BYTES);
    code.jump_if_constant(RESULT, When::NotEqual, 0, otherwise);
}

/// Goes to `none` unless the packet has [`LEN`] bytes.
fn check_len(code: &mut Assembler, none: Label) {
    code.load(Size::Word, SCRATCH, CONTEXT, CONTEXT_LEN);
    code.jump_if(SCRATCH, When::Less, LEN, none);
}

/// As `parse_v4` of [`Header`](crate::packet::header::Header); the first byte is in [`RESULT`].
fn parse_v4(code: &mut Assembler, none: Label) {
    code.op(Op::Move, AT, RESULT);
    code.op_constant(Op::And, AT, 15);
    code.op_constant(Op::ShiftLeft, AT, 2);
    code.jump_if_constant(AT, When::Less, 20, none);
    code.load_network(Size::Half, LEN, FRAME, HEADER + 2);
    code.jump_if(LEN, When::Less, AT, none);
    check_len(code, none);
    code.load(Size::Byte, PROTOCOL, FRAME, HEADER + 9);
    code.load_network(Size::Half, SCRATCH, FRAME, HEADER + 6);
    code.op_constant(Op::And, SCRATCH, 0x3fff);
    code.store(Size::Double, FRAME, FRAGMENT, SCRATCH);
    code.op_constant(Op::Move, RESULT, 0);
    for (slots, field) in [(SOURCE, 12), (DESTINATION, 16)] {
        code.load_network(Size::Word, SCRATCH, FRAME, HEADER + field);
        code.store(Size::Double, FRAME, slots.low, SCRATCH);
        code.store(Size::Double, FRAME, slots.high, RESULT);
    }
}

/// As `parse_v6`, up to the extension headers.
fn parse_v6(code: &mut Assembler, none: Label) {
    read(code, None, HEADER, 40, none);
    code.load_network(Size::Half, LEN, FRAME, HEADER + 4);
    code.op_constant(Op::Add, LEN, 40);
    check_len(code, none);
    code.load(Size::Byte, PROTOCOL, FRAME, HEADER + 6);
    code.op_constant(Op::Move, AT, 40);
    code.op_constant(Op::Move, SCRATCH, 0);
    code.store(Size::Double, FRAME, FRAGMENT, SCRATCH);
    for (slots, field) in [(SOURCE, 8), (DESTINATION, 24)] {
        for (slot, half) in [(slots.high, 0), (slots.low, 8)] {
            code.load_network(Size::Double, SCRATCH, FRAME, HEADER + field + half);
            code.store(Size::Double, FRAME, slot, SCRATCH);
        }
    }
}

/// As `skip_extensions`; all ways lead to `end`.
fn skip_extensions(code: &mut Assembler, end: Label) {
    for _ in 0..MAX_EXTENSIONS {
        let [measured, fragment, skip] = [(); 3].map(|()| code.label());
        for protocol in [0, 43, 60] {
            code.jump_if_constant(PROTOCOL, When::Equal, protocol, measured);
        }
        code.jump_if_constant(PROTOCOL, When::NotEqual, 44, end);
        read_extension(code, end);
        code.jump(fragment);

        code.place(measured);
        read_extension(code, end);
        code.load(Size::Byte, SCRATCH, FRAME, PIECE + 1);
        code.op_constant(Op::ShiftLeft, SCRATCH, 3);
        code.op_constant(Op::Add, SCRATCH, 8);
        code.jump(skip);

        code.place(fragment);
        code.load_network(Size::Half, SCRATCH, FRAME, PIECE + 2);
        // Offset and "more follow".
        code.op_constant(Op::And, SCRATCH, 0xfff9);
        code.store(Size::Double, FRAME, FRAGMENT, SCRATCH);
        code.op_constant(Op::Move, SCRATCH, 8);

        code.place(skip);
        code.op(Op::Add, SCRATCH, AT);
        code.jump_if(SCRATCH, When::Greater, LEN, end);
        code.op(Op::Move, AT, SCRATCH);
        code.load(Size::Byte, PROTOCOL, FRAME, PIECE);
        code.load(Size::Double, SCRATCH, FRAME, FRAGMENT);
        code.jump_if_constant(SCRATCH, When::AnyBit, 0xfff8, end);
    }
}

/// Copies the first four bytes of an extension header.
fn read_extension(code: &mut Assembler, end: Label) {
    code.op(Op::Move, SCRATCH, AT);
    code.op_constant(Op::Add, SCRATCH, 4);
    code.jump_if(SCRATCH, When::Greater, LEN, end);
    read(code, Some(AT), PIECE, 4, end);
}

/// Ports into [`AT`] and [`LEN`]; zeros where the packet shows none, and for fragments no protocol either.
fn read_ports(code: &mut Assembler, hash: Label) {
    let [whole, shown, hidden] = [(); 3].map(|()| code.label());
    code.load(Size::Double, SCRATCH, FRAME, FRAGMENT);
    code.jump_if_constant(SCRATCH, When::Equal, 0, whole);
    code.op_constant(Op::Move, PROTOCOL, 0);
    code.jump(hidden);
    code.place(whole);
    code.jump_if_constant(PROTOCOL, When::Equal, i32::from(TCP), shown);
    code.jump_if_constant(PROTOCOL, When::NotEqual, i32::from(UDP), hidden);
    code.place(shown);
    read_extension(code, hidden);
    code.load_network(Size::Half, AT, FRAME, PIECE);
    code.load_network(Size::Half, LEN, FRAME, PIECE + 2);
    code.jump(hash);
    code.place(hidden);
    code.op_constant(Op::Move, AT, 0);
    code.op_constant(Op::Move, LEN, 0);
}

/// As [`FlowHash::hash`], into [`RESULT`].
fn hash_flow(code: &mut Assembler, flow: &FlowHash) {
    let [first, second] = flow.keys();
    code.constant(FIRST_MULTIPLIER, MULTIPLIERS[0]);
    code.constant(SECOND_MULTIPLIER, MULTIPLIERS[1]);
    code.op_constant(Op::Move, SUM, 0);
    for (slots, port) in [(SOURCE, AT), (DESTINATION, LEN)] {
        code.load(Size::Double, RESULT, FRAME, slots.high);
        xor(code, first);
        mix(code);
        code.load(Size::Double, SCRATCH, FRAME, slots.low);
        code.op(Op::Add, RESULT, SCRATCH);
        xor(code, second);
        code.op_constant(Op::ShiftLeft, port, 48);
        code.op(Op::Xor, RESULT, port);
        mix(code);
        code.op(Op::Add, SUM, RESULT);
    }
    code.op(Op::Move, RESULT, SUM);
    code.op(Op::Xor, RESULT, PROTOCOL);
    xor(code, second);
    mix(code);
    code.op_constant(Op::ShiftRight, RESULT, 32);
}

fn xor(code: &mut Assembler, key: u64) {
    code.constant(SCRATCH, key);
    code.op(Op::Xor, RESULT, SCRATCH);
}

/// As `mix` beside [`FlowHash`].
fn mix(code: &mut Assembler) {
    for (shift, multiplier) in [(30, Some(FIRST_MULTIPLIER)), (27, Some(SECOND_MULTIPLIER)), (31, None)] {
        code.op(Op::Move, SCRATCH, RESULT);
        code.op_constant(Op::ShiftRight, SCRATCH, shift);
        code.op(Op::Xor, RESULT, SCRATCH);
        if let Some(multiplier) = multiplier {
            code.op(Op::Mul, RESULT, multiplier);
        }
    }
}
