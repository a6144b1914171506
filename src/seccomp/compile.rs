//! From a profile to a program: which verdict each number of each architecture has, then the search for it.

use std::collections::BTreeMap;

use super::bpf::{Assembler, Jump, Label};
use super::syscalls::{X32_BIT, multiplexed, number};
use super::{Action, Arch, Arg, Op, Profile, Rule, SeccompError};

/// Offsets in `struct seccomp_data` (`linux/seccomp.h`).
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

/// The arguments a system call can have.
const MAX_ARGS: u8 = 6;

/// What runc puts in front of a filter answers with this.
const ENOSYS: Action = Action::Errno(38);

/// What libseccomp does to a call of an architecture it was not told of.
const BAD_ARCH: Action = Action::KillThread;

/// Compiles a profile for processes of an architecture and those it can also execute.
///
/// The result is an array of `struct sock_filter` in native byte order, of at most `sys::seccomp::MAX_INSTRUCTIONS`.
///
/// # Errors
/// A rule with an argument beyond the sixth, with `Notify`, or a profile too large for one filter.
pub fn compile(profile: &Profile, native: Arch) -> Result<Vec<u8>, SeccompError> {
    if profile.default_action == Action::Notify || profile.rules.iter().any(|rule| rule.action == Action::Notify) {
        return Err(SeccompError::Listener);
    }
    let mut assembler = Assembler::default();
    let bad_arch = assembler.ret(BAD_ARCH.code());
    let mut audits = vec![native.audit()];
    for arch in &profile.architectures {
        if !audits.contains(&arch.audit()) {
            audits.push(arch.audit());
        }
    }
    // Backwards: the native architecture is the last to be written and the first to be asked for.
    let mut next = bad_arch;
    let mut starts = Vec::with_capacity(audits.len());
    for audit in audits.into_iter().rev() {
        let ranges = ranges(profile, native, audit)?;
        let tree = search(&mut assembler, &ranges);
        starts.push((audit, assembler.load(NUMBER, tree)));
    }
    for (audit, start) in starts {
        next = assembler.jump(Jump::Eq, audit, start, next);
    }
    let first = assembler.load(ARCH, next);
    assembler.finish(first)
}

/// What happens to one call.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Call {
    always: Option<Action>,
    /// Tried in this order while there is no `always`.
    sometimes: Vec<(Vec<Condition>, Action)>,
}

/// An [`Arg`] as an architecture compares it: with only the bits it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Condition {
    index: u8,
    op: Op,
    value: u64,
    /// Bits of the argument that count; all but for [`Op::MaskedEq`].
    mask: u64,
    wide: bool,
}

/// The verdict on a range of numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Return(Action),
    /// The arguments decide; else the default action.
    Arguments(Vec<(Vec<Condition>, Action)>, Action),
}

/// The verdicts of one of the kernel's entries: each range from its first number up to the next one's. The first is 0.
fn ranges(profile: &Profile, native: Arch, audit: u32) -> Result<Vec<(u32, Verdict)>, SeccompError> {
    let mut calls = BTreeMap::new();
    let listed = |arch: Arch| arch == native || profile.architectures.contains(&arch);
    let arches = Arch::ALL.map(|(_, arch)| arch).into_iter().filter(|&arch| arch.audit() == audit && listed(arch));
    for arch in arches.clone() {
        collect(profile, arch, &mut calls)?;
    }

    // Where no call is named, from which number on which verdict applies; later entries overrule from their number on.
    let default = profile.default_action;
    let newest = |arch: Arch| newest(profile, arch).filter(|_| wants_enosys(default));
    let mut background = vec![(0, default)];
    if listed(Arch::X86_64) && audit == Arch::X86_64.audit() {
        // Numbers with x32's bit are x32's; runc looks at that bit alone, libseccomp at all numbers from it on.
        let plain = newest(Arch::X86_64);
        let (x32, x32_newest) = if listed(Arch::X32) { (default, newest(Arch::X32)) } else { (BAD_ARCH, None) };
        let beyond = |newest: Option<u32>, otherwise: Action| if newest.is_some() { ENOSYS } else { otherwise };
        background.extend(plain.map(|number| (number + 1, ENOSYS)));
        background.push((X32_BIT, x32));
        background.extend(x32_newest.map(|number| (number + 1, ENOSYS)));
        background.push((X32_BIT << 1, beyond(plain, x32)));
        background.push((X32_BIT * 3, beyond(x32_newest, x32)));
        background.push((u32::MAX, beyond(x32_newest, default)));
    } else {
        background.extend(arches.filter_map(newest).map(|number| (number + 1, ENOSYS)));
    }

    let mut ranges: Vec<(u32, Verdict)> = Vec::new();
    let mut push = |start: u32, verdict: Verdict| {
        if ranges.last().is_some_and(|(last, _)| *last == start) {
            ranges.pop();
        }
        if ranges.last().is_none_or(|(_, last)| *last != verdict) {
            ranges.push((start, verdict));
        }
    };
    for (index, &(start, action)) in background.iter().enumerate() {
        let end = background.get(index + 1).map(|&(next, _)| next);
        push(start, Verdict::Return(action));
        for (&number, call) in calls.range(start..).take_while(|(number, _)| end.is_none_or(|end| **number < end)) {
            push(number, call.verdict(default));
            if number != u32::MAX && end != Some(number + 1) {
                push(number + 1, Verdict::Return(action));
            }
        }
    }
    Ok(ranges)
}

/// Whether runc answers ENOSYS for calls the profile is too old for: only if the default action refuses.
fn wants_enosys(default: Action) -> bool {
    !matches!(default, Action::Allow | Action::Log | Action::Trace(_))
}

/// The largest number that the profile names on an architecture. `None`: none but 0, on which runc does not build.
fn newest(profile: &Profile, arch: Arch) -> Option<u32> {
    let names = profile.rules.iter().flat_map(|rule| &rule.names);
    let numbers = names.filter(|name| multiplexed(name, arch).is_none()).filter_map(|name| number(name, arch));
    numbers.max().filter(|&number| number != 0)
}

/// Adds what the profile says of an architecture's calls, by number.
fn collect(profile: &Profile, arch: Arch, calls: &mut BTreeMap<u32, Call>) -> Result<(), SeccompError> {
    for rule in profile.rules.iter().filter(|rule| rule.action != profile.default_action) {
        for name in &rule.names {
            for args in alternatives(rule, name)? {
                if let Some(number) = number(name, arch) {
                    calls.entry(number).or_default().add(conditions(args, arch), rule.action);
                }
                if let Some((number, index)) = multiplexed(name, arch) {
                    let which = Arg { index: 0, op: Op::Eq, value: u64::from(index), value_two: 0 };
                    let args: Vec<Arg> = std::iter::once(which).chain(args.iter().filter(|arg| arg.index != 0).copied()).collect();
                    calls.entry(number).or_default().add(conditions(&args, arch), rule.action);
                }
            }
        }
    }
    Ok(())
}

/// The rule's conditions: all together, or each alone where two are about the same argument.
fn alternatives<'a>(rule: &'a Rule, call: &str) -> Result<Vec<&'a [Arg]>, SeccompError> {
    if let Some(arg) = rule.args.iter().find(|arg| arg.index >= MAX_ARGS) {
        return Err(SeccompError::Argument { call: call.to_owned(), index: arg.index });
    }
    let repeated = rule.args.iter().enumerate().any(|(i, arg)| rule.args[..i].iter().any(|other| other.index == arg.index));
    Ok(if repeated { rule.args.chunks(1).collect() } else { vec![&rule.args] })
}

/// What an architecture compares; without conditions that always hold.
fn conditions(args: &[Arg], arch: Arch) -> Vec<Condition> {
    let wide = arch.is_wide();
    let all = if wide { u64::MAX } else { u64::from(u32::MAX) };
    let condition = |arg: &Arg| match arg.op {
        Op::MaskedEq => Condition { index: arg.index, op: Op::MaskedEq, value: arg.value_two & arg.value & all, mask: arg.value & all, wide },
        op => Condition { index: arg.index, op, value: arg.value & all, mask: all, wide },
    };
    args.iter().map(condition).filter(|condition| condition.mask != 0).collect()
}

impl Call {
    fn add(&mut self, conditions: Vec<Condition>, action: Action) {
        if conditions.is_empty() {
            self.always.get_or_insert(action);
        } else if self.always.is_none() {
            self.sometimes.push((conditions, action));
        }
    }

    fn verdict(&self, default: Action) -> Verdict {
        match self.always {
            Some(action) => Verdict::Return(action),
            None => Verdict::Arguments(self.sometimes.clone(), default),
        }
    }
}

/// Finds the verdict for the number in the accumulator.
fn search(assembler: &mut Assembler, ranges: &[(u32, Verdict)]) -> Label {
    match ranges {
        [] => assembler.ret(BAD_ARCH.code()),
        [(_, Verdict::Return(action))] => assembler.ret(action.code()),
        [(_, Verdict::Arguments(sometimes, default))] => arguments(assembler, sometimes, *default),
        _ => {
            let (below, above) = ranges.split_at(ranges.len() / 2);
            let yes = search(assembler, above);
            let no = search(assembler, below);
            assembler.jump(Jump::Ge, above[0].0, yes, no)
        }
    }
}

/// Tries conditional rules in their order.
fn arguments(assembler: &mut Assembler, sometimes: &[(Vec<Condition>, Action)], default: Action) -> Label {
    let mut next = assembler.ret(default.code());
    // Rules that only compare one argument with one value each, as profiles have by the dozen, load that argument once.
    for group in sometimes.chunk_by(one_of).rev() {
        let (conditions, action) = &group[0];
        let yes = assembler.ret(action.code());
        next = match conditions[..] {
            [condition] if condition.op == Op::Eq => {
                let no = next;
                let lower = group.iter().rev().fold(no, |no, (conditions, _)| assembler.jump(Jump::Eq, conditions[0].value as u32, yes, no));
                let lower = assembler.load(condition.lower(), lower);
                if condition.wide { upper_equal(assembler, condition, lower, no) } else { lower }
            }
            _ => conditions.iter().rev().fold(yes, |yes, &condition| compare(assembler, condition, yes, next)),
        };
    }
    next
}

/// Whether two rules ask for one value each of the same argument, with the same upper half, for the same action.
fn one_of(one: &(Vec<Condition>, Action), other: &(Vec<Condition>, Action)) -> bool {
    match (&one.0[..], &other.0[..]) {
        ([a], [b]) => a.op == Op::Eq && b.op == Op::Eq && a.index == b.index && a.value >> 32 == b.value >> 32 && one.1 == other.1,
        _ => false,
    }
}

impl Condition {
    /// Where the argument's lower half is; the upper one follows, on every architecture known here.
    fn lower(self) -> u32 {
        ARGS + 8 * u32::from(self.index)
    }

    fn upper(self) -> u32 {
        self.lower() + 4
    }
}

fn upper_equal(assembler: &mut Assembler, condition: Condition, yes: Label, no: Label) -> Label {
    let jump = assembler.jump(Jump::Eq, (condition.value >> 32) as u32, yes, no);
    assembler.load(condition.upper(), jump)
}

/// One condition: the upper half of the argument decides, unless it is equal.
fn compare(assembler: &mut Assembler, condition: Condition, yes: Label, no: Label) -> Label {
    let (upper_mask, lower_mask) = ((condition.mask >> 32) as u32, condition.mask as u32);
    let (upper, lower) = ((condition.value >> 32) as u32, condition.value as u32);
    // Each comparison the machine lacks is one it has with the answers swapped.
    let (how, yes, no) = match condition.op {
        Op::Eq | Op::MaskedEq => (Jump::Eq, yes, no),
        Op::Ne => (Jump::Eq, no, yes),
        Op::Gt => (Jump::Gt, yes, no),
        Op::Le => (Jump::Gt, no, yes),
        Op::Ge => (Jump::Ge, yes, no),
        Op::Lt => (Jump::Ge, no, yes),
    };
    let mut label = assembler.jump(how, lower, yes, no);
    if lower_mask != u32::MAX {
        label = assembler.and(lower_mask, label);
    }
    label = assembler.load(condition.lower(), label);
    if !condition.wide || upper_mask == 0 {
        return label;
    }
    label = assembler.jump(Jump::Eq, upper, label, no);
    if !matches!(how, Jump::Eq) {
        label = assembler.jump(Jump::Gt, upper, yes, label);
    }
    if upper_mask != u32::MAX {
        label = assembler.and(upper_mask, label);
    }
    assembler.load(condition.upper(), label)
}
