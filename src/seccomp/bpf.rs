//! An assembler for filters that writes them backwards.
//!
//! BPF jumps only forward, so a program written from its end knows every target when it writes a jump: a [`Label`] is an
//! instruction that is there already. A conditional jump reaches 255 instructions; the assembler copies a return or inserts
//! a long jump where the target is farther.

use crate::sys::seccomp::{INSTRUCTION_SIZE, MAX_INSTRUCTIONS};

use super::SeccompError;

/// An instruction that is written: its distance from the end of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Label(usize);

/// How a conditional jump compares the accumulator with its value. The opcodes are BPF_JMP | … | BPF_K of
/// `linux/bpf_common.h`.
#[derive(Debug, Clone, Copy)]
#[repr(u16)]
pub(super) enum Jump {
    /// Equal.
    Eq = 0x15,
    /// Greater, unsigned.
    Gt = 0x25,
    /// Greater or equal, unsigned.
    Ge = 0x35,
}

pub(super) const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
pub(super) const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
pub(super) const GOTO: u16 = 0x05; // BPF_JMP | BPF_JA
pub(super) const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// How far a conditional jump reaches.
const REACH: usize = 255;

/// `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instruction {
    pub(super) code: u16,
    pub(super) jt: u8,
    pub(super) jf: u8,
    pub(super) k: u32,
}

/// A program in the making: its last instruction first.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    reversed: Vec<Instruction>,
    /// The youngest return of each value.
    returns: Vec<(u32, Label)>,
}

impl Assembler {
    /// Ends the program here with a verdict.
    pub(super) fn ret(&mut self, code: u32) -> Label {
        let known = self.returns.iter().position(|&(other, _)| other == code);
        if let Some(index) = known {
            let (_, label) = self.returns[index];
            if self.distance(label) <= REACH {
                return label;
            }
            self.returns.swap_remove(index);
        }
        let label = self.push(Instruction { code: RETURN, jt: 0, jf: 0, k: code });
        self.returns.push((code, label));
        label
    }

    /// Loads the 32-bit word at `offset` of `struct seccomp_data`, then goes on at `next`.
    pub(super) fn load(&mut self, offset: u32, next: Label) -> Label {
        self.then(LOAD, offset, next)
    }

    /// Keeps the bits of `mask` in the accumulator, then goes on at `next`.
    pub(super) fn and(&mut self, mask: u32, next: Label) -> Label {
        self.then(AND, mask, next)
    }

    /// Goes on at `yes` if the comparison with `value` holds, else at `no`.
    pub(super) fn jump(&mut self, how: Jump, value: u32, yes: Label, no: Label) -> Label {
        if yes == no {
            return yes;
        }
        let no = self.near(no);
        let yes = self.near(yes);
        // What was inserted for `yes` may have pushed `no` out of reach, by one instruction.
        let no = self.near(no);
        let (jt, jf) = (self.distance(yes) as u8, self.distance(no) as u8);
        self.push(Instruction { code: how as u16, jt, jf, k: value })
    }

    /// The array of `struct sock_filter` that starts at `first`, in native byte order.
    pub(super) fn finish(mut self, first: Label) -> Result<Vec<u8>, SeccompError> {
        if self.distance(first) != 0 {
            self.goto(first);
        }
        if self.reversed.len() > MAX_INSTRUCTIONS {
            return Err(SeccompError::TooLong { instructions: self.reversed.len() });
        }
        let mut bytes = Vec::with_capacity(self.reversed.len() * INSTRUCTION_SIZE);
        for Instruction { code, jt, jf, k } in self.reversed.into_iter().rev() {
            bytes.extend_from_slice(&code.to_ne_bytes());
            bytes.extend_from_slice(&[jt, jf]);
            bytes.extend_from_slice(&k.to_ne_bytes());
        }
        Ok(bytes)
    }

    /// An instruction that does something and falls through to `next`.
    fn then(&mut self, code: u16, k: u32, next: Label) -> Label {
        if self.distance(next) != 0 {
            self.goto(next);
        }
        self.push(Instruction { code, jt: 0, jf: 0, k })
    }

    /// `label`, or something within reach of the next instruction that leads there.
    fn near(&mut self, label: Label) -> Label {
        if self.distance(label) <= REACH {
            return label;
        }
        match self.reversed[label.0] {
            Instruction { code: RETURN, k, .. } => self.ret(k),
            _ => self.goto(label),
        }
    }

    fn goto(&mut self, label: Label) -> Label {
        let k = self.distance(label) as u32;
        self.push(Instruction { code: GOTO, jt: 0, jf: 0, k })
    }

    /// How many instructions the next one would skip to reach `label`.
    fn distance(&self, label: Label) -> usize {
        self.reversed.len() - 1 - label.0
    }

    fn push(&mut self, instruction: Instruction) -> Label {
        self.reversed.push(instruction);
        Label(self.reversed.len() - 1)
    }
}
