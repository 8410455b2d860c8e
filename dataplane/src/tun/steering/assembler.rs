//! As much of an assembler for the kernel's virtual machine as a short program without loops needs.
//!
//! Source of the encoding: the instruction set, RFC 9669.

/// One instruction as the kernel takes it; a 64-bit constant takes two.
pub(super) type Instruction = [u8; 8];

/// A register: 0 holds results, 1 to 5 arguments (lost in a call), 6 to 9 are kept, 10 is the frame pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reg(pub(super) u8);

/// The end of the stack; slots have negative offsets from it.
pub(super) const FRAME: Reg = Reg(10);

/// A place to jump to, named before it is known.
#[derive(Debug, Clone, Copy)]
pub(super) struct Label(usize);

/// What to do with two 64-bit values.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
pub(super) enum Op {
    Add = 0x00,
    Mul = 0x20,
    And = 0x50,
    ShiftLeft = 0x60,
    ShiftRight = 0x70,
    Modulo = 0x90,
    Xor = 0xa0,
    Move = 0xb0,
}

/// When to jump; values compare without sign.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
pub(super) enum When {
    Equal = 0x10,
    Greater = 0x20,
    AnyBit = 0x40,
    NotEqual = 0x50,
    Less = 0xa0,
}

/// How many bytes a load or store moves.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
pub(super) enum Size {
    Word = 0x00,
    Half = 0x08,
    Byte = 0x10,
    Double = 0x18,
}

const ALU64: u8 = 0x07;
const JUMP: u8 = 0x05;
const FROM_REG: u8 = 0x08;
const LOAD: u8 = 0x61;
const STORE: u8 = 0x63;
const LOAD_CONSTANT: u8 = 0x18;
const TO_BIG_ENDIAN: u8 = 0xdc;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// A program in the making.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    code: Vec<Instruction>,
    /// Instructions that jump, and where to.
    jumps: Vec<(usize, Label)>,
    labels: Vec<usize>,
}

impl Assembler {
    /// A label, to be [`place`](Self::place)d once, after all jumps to it.
    pub(super) fn label(&mut self) -> Label {
        self.labels.push(0);
        Label(self.labels.len() - 1)
    }

    /// The label is here.
    pub(super) fn place(&mut self, label: Label) {
        self.labels[label.0] = self.code.len();
    }

    /// `to = to op from`.
    pub(super) fn op(&mut self, op: Op, to: Reg, from: Reg) {
        self.push(ALU64 | FROM_REG | op as u8, to, from, 0, 0);
    }

    /// `to = to op constant`, the constant sign-extended.
    pub(super) fn op_constant(&mut self, op: Op, to: Reg, constant: i32) {
        self.push(ALU64 | op as u8, to, Reg(0), 0, constant);
    }

    /// `to = constant`.
    pub(super) fn constant(&mut self, to: Reg, constant: u64) {
        self.push(LOAD_CONSTANT, to, Reg(0), 0, constant as u32 as i32);
        self.push(0, Reg(0), Reg(0), 0, (constant >> 32) as i32);
    }

    /// `to` = what lies `offset` bytes from `base`, in the machine's byte order.
    pub(super) fn load(&mut self, size: Size, to: Reg, base: Reg, offset: i16) {
        self.push(LOAD | size as u8, to, base, offset, 0);
    }

    /// `to` = the number in network byte order that lies `offset` bytes from `base`.
    pub(super) fn load_network(&mut self, size: Size, to: Reg, base: Reg, offset: i16) {
        self.load(size, to, base, offset);
        let bits = match size {
            Size::Byte => return,
            Size::Half => 16,
            Size::Word => 32,
            Size::Double => 64,
        };
        self.push(TO_BIG_ENDIAN, to, Reg(0), 0, bits);
    }

    /// Puts `from` where `offset` points from `base`.
    pub(super) fn store(&mut self, size: Size, base: Reg, offset: i16, from: Reg) {
        self.push(STORE | size as u8, base, from, offset, 0);
    }

    /// Goes on at `label`.
    pub(super) fn jump(&mut self, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.push(JUMP, Reg(0), Reg(0), 0, 0);
    }

    /// Goes on at `label` if the two compare so.
    pub(super) fn jump_if(&mut self, left: Reg, when: When, right: Reg, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.push(JUMP | FROM_REG | when as u8, left, right, 0, 0);
    }

    /// Goes on at `label` if `left` and the sign-extended constant compare so.
    pub(super) fn jump_if_constant(&mut self, left: Reg, when: When, constant: i32, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.push(JUMP | when as u8, left, Reg(0), 0, constant);
    }

    /// Calls a function of the kernel.
    pub(super) fn call(&mut self, function: i32) {
        self.push(CALL, Reg(0), Reg(0), 0, function);
    }

    /// Ends with what register 0 holds.
    pub(super) fn exit(&mut self) {
        self.push(EXIT, Reg(0), Reg(0), 0, 0);
    }

    /// The finished program.
    ///
    /// # Panics
    ///
    /// If a jump does not lead forward, or further than 32,767 instructions: the program is ours, not input.
    pub(super) fn finish(mut self) -> Vec<Instruction> {
        for (at, label) in self.jumps {
            let distance = self.labels[label.0].checked_sub(at + 1).expect("labels are placed behind their jumps");
            let distance = i16::try_from(distance).expect("the program is short");
            self.code[at][2..4].copy_from_slice(&distance.to_ne_bytes());
        }
        self.code
    }

    fn push(&mut self, code: u8, to: Reg, from: Reg, offset: i16, constant: i32) {
        let registers = if cfg!(target_endian = "little") { to.0 | from.0 << 4 } else { to.0 << 4 | from.0 };
        let [o0, o1] = offset.to_ne_bytes();
        let [c0, c1, c2, c3] = constant.to_ne_bytes();
        self.code.push([code, registers, o0, o1, c0, c1, c2, c3]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn instructions_are_encoded_as_the_kernel_reads_them() {
        let mut code = Assembler::default();
        let end = code.label();
        code.op(Op::Move, Reg(6), Reg(1));
        code.jump_if_constant(Reg(0), When::NotEqual, 4, end);
        code.load_network(Size::Half, Reg(9), FRAME, -46);
        code.constant(Reg(1), 0x1122_3344_5566_7788);
        code.store(Size::Double, FRAME, -8, Reg(9));
        code.place(end);
        code.exit();
        let expected: [Instruction; 8] = [
            [0xbf, 0x16, 0, 0, 0, 0, 0, 0],
            [0x55, 0x00, 5, 0, 4, 0, 0, 0],
            [0x69, 0xa9, 0xd2, 0xff, 0, 0, 0, 0],
            [0xdc, 0x09, 0, 0, 16, 0, 0, 0],
            [0x18, 0x01, 0, 0, 0x88, 0x77, 0x66, 0x55],
            [0x00, 0x00, 0, 0, 0x44, 0x33, 0x22, 0x11],
            [0x7b, 0x9a, 0xf8, 0xff, 0, 0, 0, 0],
            [0x95, 0x00, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!(code.finish(), expected);
    }
}
