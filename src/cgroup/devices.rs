//! Device rules: their one meaning, and its two forms.
//!
//! The meaning: each of read, write and mknod that an access asks for is decided by the last rule that matches the device
//! and names it; where none does, the access is refused. So a rule for `rw` allows `r`, `w` and `rw`, and not `m`, and a rule
//! that denies `w` refuses `rw`. cgroup v2 gets this as a BPF program ([`program`]); v1 as the kernel's own list of
//! exceptions ([`exceptions`]), which can't take a device out of a wider exception: rules that would need it are refused
//! rather than weakened.

use super::CgroupError;
use crate::plan::DeviceRule;
use crate::sys::bpf::Insn;

/// `BPF_DEVCG_ACC_*` (linux/bpf.h).
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

/// `BPF_DEVCG_DEV_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Block = 1,
    Char = 2,
}

/// A rule with its texts understood. `None` matches all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rule {
    allow: bool,
    kind: Option<Kind>,
    major: Option<u32>,
    minor: Option<u32>,
    /// Of MKNOD, READ and WRITE; never none.
    access: u32,
}

impl Rule {
    /// The rule holds for all that there is.
    fn is_total(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none() && self.access == ALL
    }
}

/// Rules a filter may have: a bound on the program, far above any real list.
const MAX_RULES: usize = 2048;

/// Understands the rules. One that names no access allows nothing and denies everything; the former is left out.
pub(super) fn parse(rules: &[DeviceRule]) -> Result<Vec<Rule>, CgroupError> {
    if rules.len() > MAX_RULES {
        return Err(CgroupError::BadValue { what: "number of device rules", value: rules.len().to_string(), why: "there may be 2048 at most" });
    }
    let mut parsed = Vec::with_capacity(rules.len());
    for rule in rules {
        let bad = |why| CgroupError::DeviceRule { rule: text(rule), why };
        let kind = match char::from_u32(rule.kind) {
            Some('a') => None,
            Some('b') => Some(Kind::Block),
            Some('c' | 'u') => Some(Kind::Char),
            _ => return Err(bad("the type is not a, b or c")),
        };
        let mut access = 0;
        for letter in rule.access.bytes() {
            access |= match letter {
                b'm' => MKNOD,
                b'r' => READ,
                b'w' => WRITE,
                _ => return Err(bad("the access is not of r, w and m")),
            };
        }
        if access == 0 && rule.allow {
            continue;
        }
        let access = if access == 0 { ALL } else { access };
        parsed.push(Rule { allow: rule.allow, kind, major: rule.major, minor: rule.minor, access });
    }
    Ok(parsed)
}

/// `allow c 1:* rw`, for errors.
fn text(rule: &DeviceRule) -> String {
    let number = |n: Option<u32>| n.map_or_else(|| "*".to_string(), |n| n.to_string());
    let kind = char::from_u32(rule.kind).unwrap_or('?').escape_default();
    let verb = if rule.allow { "allow" } else { "deny" };
    format!("{verb} {kind} {}:{} {}", number(rule.major), number(rule.minor), rule.access.escape_default())
}

/// A v1 list: what holds for all devices, and where it doesn't.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Exceptions {
    /// Everything is allowed but the exceptions; else everything is denied but them.
    pub(super) allow: bool,
    /// In the form of `devices.allow` and `devices.deny`: `c 1:3 rwm`.
    pub(super) list: Vec<String>,
}

/// The v1 form of rules (Documentation/admin-guide/cgroup-v1/devices.rst).
pub(super) fn exceptions(rules: &[DeviceRule]) -> Result<Exceptions, CgroupError> {
    let mut allow = false;
    let mut list: Vec<Rule> = Vec::new();
    // v1 knows `a` only as everything; in an exception it is the two types.
    let rules = parse(rules)?.into_iter().flat_map(|rule| match rule.kind {
        None if !rule.is_total() => vec![Rule { kind: Some(Kind::Block), ..rule }, Rule { kind: Some(Kind::Char), ..rule }],
        _ => vec![rule],
    });
    for rule in rules {
        if rule.is_total() {
            allow = rule.allow;
            list.clear();
        } else if rule.allow == allow {
            // Takes back what earlier exceptions said of these devices.
            for exception in &mut list {
                let covers = |wide: Option<u32>, narrow: Option<u32>| wide.is_none() || wide == narrow;
                if exception.kind != rule.kind || exception.access & rule.access == 0 || !overlap(exception, &rule) {
                    continue;
                }
                if !covers(rule.major, exception.major) || !covers(rule.minor, exception.minor) {
                    let why = "cgroup v1 cannot take devices out of an earlier, wider rule";
                    return Err(CgroupError::DeviceRule { rule: format!("{}, after {}", line(&rule), line(exception)), why });
                }
                exception.access &= !rule.access;
            }
            list.retain(|exception| exception.access != 0);
        } else {
            match list.iter_mut().find(|old| (old.kind, old.major, old.minor) == (rule.kind, rule.major, rule.minor)) {
                Some(old) => old.access |= rule.access,
                None => list.push(rule),
            }
        }
    }
    Ok(Exceptions { allow, list: list.iter().map(line).collect() })
}

/// Some device matches both.
fn overlap(a: &Rule, b: &Rule) -> bool {
    let meet = |a: Option<u32>, b: Option<u32>| a.is_none() || b.is_none() || a == b;
    meet(a.major, b.major) && meet(a.minor, b.minor)
}

fn line(rule: &Rule) -> String {
    let number = |n: Option<u32>| n.map_or_else(|| "*".to_string(), |n| n.to_string());
    let kind = match rule.kind {
        None => 'a',
        Some(Kind::Block) => 'b',
        Some(Kind::Char) => 'c',
    };
    let access: String = [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')].iter().filter(|(bit, _)| rule.access & bit != 0).map(|(_, c)| c).collect();
    format!("{kind} {}:{} {access}", number(rule.major), number(rule.minor))
}

/// The registers that the program uses: the answer, the context, and the three parts of the question.
mod reg {
    pub(super) const ANSWER: u8 = 0;
    pub(super) const CONTEXT: u8 = 1;
    pub(super) const WANTED: u8 = 2;
    pub(super) const KIND: u8 = 3;
    pub(super) const MAJOR: u8 = 4;
    pub(super) const MINOR: u8 = 5;
    pub(super) const SCRATCH: u8 = 6;
}

/// Operations, as the class, the operation and the operand's source together (linux/bpf.h). Jumps compare 32 bits
/// (BPF_JMP32), since an immediate is sign-extended in a 64-bit one.
mod op {
    pub(super) const LOAD_WORD: u8 = 0x61;
    pub(super) const MOVE: u8 = 0xbc;
    pub(super) const MOVE_IMM: u8 = 0xb4;
    pub(super) const AND: u8 = 0x54;
    pub(super) const XOR: u8 = 0xa4;
    pub(super) const SHIFT_RIGHT: u8 = 0x74;
    pub(super) const JUMP: u8 = 0x05;
    pub(super) const JUMP_UNLESS_EQUAL: u8 = 0x56;
    pub(super) const JUMP_IF_ANY: u8 = 0x46;
    pub(super) const EXIT: u8 = 0x95;
}

/// The v2 form: a program of type BPF_PROG_TYPE_CGROUP_DEVICE that answers 1 to allow.
///
/// Rules are walked from the last to the first. WANTED holds what is still undecided: a rule that allows takes its accesses
/// out, and nothing left is a yes; a rule that denies one that is left is a no, and so is the end.
///
/// Numbers are compared through a scratch register. Compared directly, the verifier would know the number where a rule
/// matches, and walk the rest of the program once for every rule: a few hundred would be too many for it (E2BIG).
pub(super) fn program(rules: &[DeviceRule]) -> Result<Vec<Insn>, CgroupError> {
    let insn = |code, dst: u8, src: u8, off, imm| Insn { code, regs: dst | src << 4, off, imm };
    let imm = |code, dst, value: u32| insn(code, dst, 0, 0, value as i32);
    let answer = |allow: bool| [imm(op::MOVE_IMM, reg::ANSWER, u32::from(allow)), imm(op::EXIT, 0, 0)];

    // struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor; }, access_type being access << 16 | type.
    let mut out = vec![
        insn(op::LOAD_WORD, reg::WANTED, reg::CONTEXT, 0, 0),
        insn(op::LOAD_WORD, reg::MAJOR, reg::CONTEXT, 4, 0),
        insn(op::LOAD_WORD, reg::MINOR, reg::CONTEXT, 8, 0),
        insn(op::MOVE, reg::KIND, reg::WANTED, 0, 0),
        imm(op::AND, reg::KIND, 0xffff),
        imm(op::SHIFT_RIGHT, reg::WANTED, 16),
    ];
    for rule in parse(rules)?.iter().rev() {
        if rule.is_total() {
            // Nothing after it could be reached, and the verifier refuses what can't be.
            out.extend(answer(rule.allow));
            return Ok(out);
        }
        let mut body = Vec::new();
        if rule.allow {
            body.push(imm(op::AND, reg::WANTED, ALL & !rule.access));
            body.push(insn(op::JUMP_UNLESS_EQUAL, reg::WANTED, 0, 2, 0));
        } else {
            body.push(insn(op::JUMP_IF_ANY, reg::WANTED, 0, 1, rule.access as i32));
            body.push(insn(op::JUMP, 0, 0, 2, 0));
        }
        body.extend(answer(rule.allow));

        let tests = [(reg::KIND, rule.kind.map(|kind| kind as u32)), (reg::MAJOR, rule.major), (reg::MINOR, rule.minor)];
        let tests: Vec<(u8, u32)> = tests.into_iter().filter_map(|(register, value)| Some((register, value?))).collect();
        for (i, &(register, value)) in tests.iter().enumerate() {
            let over = (tests.len() - i - 1) * 3 + body.len();
            out.push(insn(op::MOVE, reg::SCRATCH, register, 0, 0));
            out.push(imm(op::XOR, reg::SCRATCH, value));
            out.push(insn(op::JUMP_UNLESS_EQUAL, reg::SCRATCH, 0, over as i16, 0));
        }
        out.extend(body);
    }
    out.extend(answer(false));
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would answer: runs the program on one access.
    fn run(program: &[Insn], access: u32, kind: u32, major: u32, minor: u32) -> bool {
        let mut regs = [0u32; 16];
        let mut at = 0usize;
        for _ in 0..100_000 {
            let i = program[at];
            let (dst, src) = ((i.regs & 15) as usize, (i.regs >> 4) as usize);
            at += 1;
            let jump = match i.code {
                op::LOAD_WORD => {
                    assert_eq!(src as u8, reg::CONTEXT);
                    regs[dst] = [access << 16 | kind, major, minor][i.off as usize / 4];
                    false
                }
                op::MOVE => {
                    regs[dst] = regs[src];
                    false
                }
                op::MOVE_IMM => {
                    regs[dst] = i.imm as u32;
                    false
                }
                op::AND => {
                    regs[dst] &= i.imm as u32;
                    false
                }
                op::XOR => {
                    regs[dst] ^= i.imm as u32;
                    false
                }
                op::SHIFT_RIGHT => {
                    regs[dst] >>= i.imm;
                    false
                }
                op::JUMP => true,
                op::JUMP_UNLESS_EQUAL => regs[dst] != i.imm as u32,
                op::JUMP_IF_ANY => regs[dst] & i.imm as u32 != 0,
                op::EXIT => return regs[reg::ANSWER as usize] == 1,
                code => panic!("no such operation: {code:#x}"),
            };
            if jump {
                assert!(i.off >= 0, "the program has no loops");
                at += i.off as usize;
            }
        }
        panic!("the program does not end");
    }

    /// The meaning, straight from the module's documentation.
    fn meaning(rules: &[DeviceRule], access: u32, kind: u32, major: u32, minor: u32) -> bool {
        [MKNOD, READ, WRITE].iter().filter(|&&bit| access & bit != 0).all(|&bit| {
            parse(rules)
                .unwrap()
                .iter()
                .rev()
                .find(|rule| {
                    rule.kind.is_none_or(|k| k as u32 == kind)
                        && rule.major.is_none_or(|n| n == major)
                        && rule.minor.is_none_or(|n| n == minor)
                        && rule.access & bit != 0
                })
                .is_some_and(|rule| rule.allow)
        })
    }

    /// Reads `allow c 1:* rw`.
    fn rule(text: &str) -> DeviceRule {
        let words: Vec<&str> = text.split([' ', ':']).collect();
        let number = |word: &str| (word != "*").then(|| word.parse().unwrap());
        DeviceRule {
            allow: words[0] == "allow",
            kind: words[1].chars().next().unwrap() as u32,
            major: number(words[2]),
            minor: number(words[3]),
            access: words.get(4).unwrap_or(&"").to_string(),
        }
    }

    fn rules(texts: &[&str]) -> Vec<DeviceRule> {
        texts.iter().map(|text| rule(text)).collect()
    }

    const DENY: &str = "deny a *:* rwm";

    #[test]
    fn the_program_means_what_the_rules_say() {
        let lists: &[&[&str]] = &[
            &[],
            &[DENY],
            &["allow a *:* rwm"],
            &[DENY, "allow c 1:3 rwm", "allow c 1:5 r", "allow b 8:* rw"],
            &[DENY, "allow c *:* m", "allow b *:* m", "allow c 136:* rwm", "allow c 5:2 rwm"],
            &["allow a *:* rwm", "deny c 1:3 w", "deny b *:0 rwm"],
            &[DENY, "allow c 1:* rwm", "deny c 1:3 rwm", "allow c 1:3 r"],
            &[DENY, "allow c 1:3 r", "allow c 1:3 w"],
            &["allow c 1:3 rwm", DENY, "allow c 1:5 rwm"],
            &["allow c 1:3"],
            &[DENY, "allow c 1:3 rwm", "deny c 1:3"],
            &[DENY, "allow a 8:* r", "deny a *:3 w"],
            &[DENY, "allow c 4294967295:4294967295 rwm", "allow b 2147483648:0 r"],
        ];
        for list in lists {
            let rules = rules(list);
            let program = program(&rules).unwrap();
            for access in 1..=ALL {
                for kind in [Kind::Block, Kind::Char] {
                    for major in [0, 1, 5, 8, 136, 2_147_483_648, u32::MAX] {
                        for minor in [0, 2, 3, 5, u32::MAX] {
                            let kind = kind as u32;
                            let want = meaning(&rules, access, kind, major, minor);
                            assert_eq!(run(&program, access, kind, major, minor), want, "{list:?}: access {access}, {kind} {major}:{minor}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn accesses_are_subsets() {
        let check = |list: &[&str], access: u32, allowed: bool| {
            assert_eq!(run(&program(&rules(list)).unwrap(), access, Kind::Char as u32, 1, 3), allowed, "{list:?} {access}");
        };
        for (access, allowed) in [(READ, true), (WRITE, true), (READ | WRITE, true), (MKNOD, false), (READ | MKNOD, false)] {
            check(&[DENY, "allow c 1:3 rw"], access, allowed);
        }
        check(&["allow a *:* rwm", "deny c 1:3 w"], READ | WRITE, false);
        check(&["allow a *:* rwm", "deny c 1:3 w"], READ, true);
        check(&[DENY, "allow c 1:3 r", "allow c 1:3 w"], READ | WRITE, true);
    }

    #[test]
    fn v1_gets_a_default_and_exceptions() {
        let check = |list: &[&str], allow: bool, want: &[&str]| {
            let want = Exceptions { allow, list: want.iter().map(|s| s.to_string()).collect() };
            assert_eq!(exceptions(&rules(list)).unwrap(), want, "{list:?}");
        };
        check(&[], false, &[]);
        check(&[DENY, "allow c 1:3 rwm", "allow b 8:* rw"], false, &["c 1:3 rwm", "b 8:* rw"]);
        check(&["allow a *:* rwm"], true, &[]);
        check(&["allow a *:* rwm", "deny c 1:3 w"], true, &["c 1:3 w"]);
        check(&[DENY, "allow c 1:3 r", "allow c 1:3 m"], false, &["c 1:3 rm"]);
        check(&[DENY, "allow c 1:3 rwm", "deny c 1:3 m"], false, &["c 1:3 rw"]);
        check(&[DENY, "allow c 1:3 rwm", "deny c *:* rwm", "allow b 7:0 r"], false, &["b 7:0 r"]);
        check(&[DENY, "allow a 8:* r"], false, &["b 8:* r", "c 8:* r"]);
        check(&["allow c 1:3 rwm", DENY], false, &[]);
    }

    #[test]
    fn what_v1_cannot_express_is_refused() {
        assert!(exceptions(&rules(&[DENY, "allow c 1:* rwm", "deny c 1:3 rwm"])).is_err());
        assert!(exceptions(&rules(&["allow a *:* rwm", "deny c *:* w", "allow c 1:3 w"])).is_err());
        assert!(exceptions(&rules(&[DENY, "allow c 1:* r", "deny c 1:3 w"])).is_ok());
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["allow p 1:3 r", "allow c 1:3 x", "allow \u{0} 1:3 r"] {
            assert!(program(&rules(&[text])).is_err(), "{text:?}");
        }
        assert!(program(&vec![rule(DENY); MAX_RULES + 1]).is_err());
        let longest = vec![rule("allow c 1:3 r"); MAX_RULES];
        assert!(!run(&program(&longest).unwrap(), WRITE, Kind::Char as u32, 1, 3));
    }
}
