//! A machine for the part of BPF that filters use, as strict as the kernel is.

use super::super::bpf::{AND, GOTO, Instruction, Jump, LOAD, RETURN};
use crate::sys::seccomp::{INSTRUCTION_SIZE, MAX_INSTRUCTIONS};

/// `struct seccomp_data`, without the instruction pointer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Call {
    pub(super) number: u32,
    pub(super) audit: u32,
    pub(super) args: [u64; 6],
}

pub(super) fn decode(filter: &[u8]) -> Vec<Instruction> {
    assert!(filter.len().is_multiple_of(INSTRUCTION_SIZE) && filter.len() <= MAX_INSTRUCTIONS * INSTRUCTION_SIZE);
    let instruction = |bytes: &[u8]| Instruction {
        code: u16::from_ne_bytes([bytes[0], bytes[1]]),
        jt: bytes[2],
        jf: bytes[3],
        k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
    };
    filter.chunks(INSTRUCTION_SIZE).map(instruction).collect()
}

/// What the program returns for a call.
pub(super) fn run(program: &[Instruction], call: &Call) -> u32 {
    let word = |offset: u32| match offset {
        0 => call.number,
        4 => call.audit,
        16..64 if offset.is_multiple_of(8) => call.args[(offset as usize - 16) / 8] as u32,
        16..64 if offset.is_multiple_of(4) => (call.args[(offset as usize - 16) / 8] >> 32) as u32,
        _ => panic!("load of {offset}"),
    };
    let (mut pc, mut accumulator) = (0, 0);
    loop {
        let Instruction { code, jt, jf, k } = program[pc];
        pc += 1;
        let holds = match code {
            LOAD => {
                accumulator = word(k);
                continue;
            }
            AND => {
                accumulator &= k;
                continue;
            }
            GOTO => {
                pc += k as usize;
                continue;
            }
            RETURN => return k,
            _ if code == Jump::Eq as u16 => accumulator == k,
            _ if code == Jump::Gt as u16 => accumulator > k,
            _ if code == Jump::Ge as u16 => accumulator >= k,
            _ => panic!("opcode {code:#x}"),
        };
        pc += usize::from(if holds { jt } else { jf });
    }
}
