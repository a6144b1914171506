//! The compiler against libseccomp's own programs.

use std::collections::HashSet;

use super::super::syscalls::{X32_BIT, number};
use super::super::{Action, Arch, Arg, Op, Profile, Rule, SeccompError, compile, runtime_default};
use super::machine::{Call, decode, run};
use super::oracle::{Fixture, fixtures};
use crate::sys::seccomp::MAX_INSTRUCTIONS;

const LIBSECCOMP: &str = include_str!("../../../tests/seccomp/libseccomp.txt");

/// Numbers that a little generator makes: the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize
    }
}

/// Argument values at which a profile's conditions change their mind.
fn telling(profile: &Profile) -> Vec<u64> {
    let mut values: Vec<u64> = (0..25).chain([u64::MAX, 1 << 32, u64::from(u32::MAX)]).collect();
    for arg in profile.rules.iter().flat_map(|rule| &rule.args) {
        for value in [arg.value, arg.value_two, arg.value & arg.value_two] {
            values.extend([value, value.wrapping_sub(1), value.wrapping_add(1), value ^ 1 << 32, value ^ 1 << 63, value & 0xffff_ffff]);
        }
    }
    values.sort();
    values.dedup();
    values
}

#[test]
fn verdicts_are_libseccomps() {
    let fixtures = fixtures(LIBSECCOMP);
    assert_eq!(fixtures.len(), 10);
    for Fixture { title, profile, program } in fixtures {
        let native = profile.architectures[0];
        let instruction = |text: &str| {
            let fields: Vec<u32> = text.split(',').map(|field| u32::from_str_radix(field, 16).unwrap()).collect();
            [&(fields[0] as u16).to_ne_bytes()[..], &[fields[1] as u8, fields[2] as u8], &fields[3].to_ne_bytes()].concat()
        };
        let theirs = decode(&program.split(' ').flat_map(instruction).collect::<Vec<u8>>());
        let ours = decode(&compile(&profile, native).unwrap());
        if title.starts_with("containerd") {
            assert!(ours.len() < theirs.len(), "{title}: {} instructions for {}", ours.len(), theirs.len());
        }

        let values = telling(&profile);
        let mut random = Numbers(1);
        let numbers =
            (0..600).chain(0xf_0000..0xf_0010).chain([0x3fff_ffff, 0x7fff_ffff, 0x8000_0000, 0xbfff_ffff, 0xc000_0000, 0xffff_fffe, u32::MAX]);
        let numbers: Vec<u32> = numbers.chain((0..600).map(|number| number | X32_BIT)).collect();
        // Calls with conditions anywhere, and x86's multiplexers.
        let conditional = profile.rules.iter().filter(|rule| !rule.args.is_empty()).flat_map(|rule| &rule.names);
        let conditional = conditional.flat_map(|name| Arch::ALL.map(|(_, arch)| number(name, arch))).flatten();
        let conditional: HashSet<u32> = conditional.chain([102, 117]).collect();
        for audit in [Arch::X86_64, Arch::X86, Arch::Aarch64, Arch::Arm].map(Arch::audit).into_iter().chain([0, 0xdead_beef]) {
            for &number in &numbers {
                for _ in 0..if conditional.contains(&number) { 1000 } else { 3 } {
                    let args = [0; 6].map(|_: u64| values[random.next() % values.len()]);
                    let call = Call { number, audit, args };
                    assert_eq!(run(&ours, &call), run(&theirs, &call), "{title}: {native:?} {call:x?}");
                }
            }
        }
    }
}

fn profile(default_action: Action, rules: Vec<Rule>) -> Profile {
    Profile { default_action, architectures: vec![], rules, flags: Default::default() }
}

fn rule(name: &str, action: Action, args: Vec<Arg>) -> Rule {
    Rule { names: vec![name.to_owned()], action, args }
}

#[test]
fn calls_newer_than_the_profile_do_not_exist() {
    let verdict = |default: Action, architectures: Vec<Arch>, number: u32| {
        let mut profile = profile(default, vec![rule("clone3", Action::Allow, vec![]), rule("openat2", default, vec![])]);
        profile.architectures = architectures;
        let call = Call { number, audit: Arch::X86_64.audit(), args: [0; 6] };
        run(&decode(&compile(&profile, Arch::X86_64).unwrap()), &call)
    };
    let (eperm, enosys, killed) = (Action::Errno(1), Action::Errno(38), Action::KillThread);
    // openat2 is 437: named, though the rule does nothing.
    for (default, number, plain, with_x32) in [
        (eperm, 435, Action::Allow, Action::Allow),
        (eperm, 437, eperm, eperm),
        (eperm, 438, enosys, enosys),
        (eperm, X32_BIT | 435, killed, Action::Allow),
        (eperm, X32_BIT | 436, killed, eperm),
        (eperm, X32_BIT | 438, killed, enosys),
        (eperm, 0x8000_0000, enosys, enosys),
        (eperm, 0xc000_0000, killed, enosys),
        (eperm, u32::MAX, eperm, enosys),
        (Action::Log, 438, Action::Log, Action::Log),
        (Action::Log, 0x8000_0000, killed, Action::Log),
        (Action::Log, u32::MAX, Action::Log, Action::Log),
        (Action::KillProcess, 438, enosys, enosys),
    ] {
        assert_eq!(verdict(default, vec![], number), plain.code(), "{default:?} {number:#x}");
        assert_eq!(verdict(default, vec![Arch::X32], number), with_x32.code(), "{default:?} {number:#x} with x32");
    }
}

#[test]
fn large_filters_jump_far_or_are_refused() {
    // Each alternative takes five instructions or more, so that returns and other architectures are far away.
    let alternatives = |count: u64| {
        let one = |value| {
            rule("ioctl", Action::Errno(value as u16 % 7), vec![Arg { index: 1, op: Op::MaskedEq, value: u64::MAX << 1, value_two: value << 4 }])
        };
        let mut profile = runtime_default(0, Arch::X86_64, (6, 1));
        profile.rules[0].names.retain(|name| name != "ioctl");
        profile.rules.extend((1..=count).map(one));
        profile
    };
    let large = alternatives(200);
    let program = decode(&compile(&large, Arch::X86_64).unwrap());
    assert!(program.len() > 2000);
    for (audit, number) in [(Arch::X86_64, 16), (Arch::X86, 54), (Arch::X32, X32_BIT | 514)] {
        for value in 0..=201u64 {
            for (arg, matches) in [(value << 4, true), (value << 4 | 1, true), (value << 4 | 2, false), (value << 4 | 1 << 40, audit != Arch::X86_64)]
            {
                let expected = if matches && (1..=200).contains(&value) { Action::Errno(value as u16 % 7) } else { Action::Errno(1) };
                let call = Call { number, audit: audit.audit(), args: [0, arg, 0, 0, 0, 0] };
                assert_eq!(run(&program, &call), expected.code(), "{audit:?} {arg:#x}");
            }
        }
    }
    let error = compile(&alternatives(2000), Arch::X86_64).unwrap_err();
    assert!(matches!(error, SeccompError::TooLong { instructions } if instructions > MAX_INSTRUCTIONS), "{error}");
}

#[test]
fn what_no_filter_can_do_is_refused() {
    let arg = |index| Arg { index, op: Op::Eq, value: 0, value_two: 0 };
    let check = |profile: Profile, text: &str| assert_eq!(compile(&profile, Arch::X86_64).unwrap_err().to_string(), text);
    check(profile(Action::Notify, vec![]), "seccomp profile: SCMP_ACT_NOTIFY is not supported");
    check(profile(Action::Allow, vec![rule("mount", Action::Notify, vec![])]), "seccomp profile: SCMP_ACT_NOTIFY is not supported");
    check(profile(Action::Allow, vec![rule("mount", Action::Log, vec![arg(5), arg(6)])]), "seccomp profile: rule for mount: no argument 6");
}
