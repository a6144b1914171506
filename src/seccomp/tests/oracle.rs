//! RuntimeDefault against containerd's: every call × capability set × telling arguments.

use std::collections::HashMap;

use super::super::syscalls::{NONE, X32_BIT};
use super::super::table::TABLE;
use super::super::{Action, Arch, Arg, Op, Profile, Rule, compile, json, runtime_default};
use super::machine::{Call, decode, run};

const X86_64: &str = include_str!("../../../tests/seccomp/containerd-x86_64.txt");
const AARCH64: &str = include_str!("../../../tests/seccomp/containerd-aarch64.txt");

/// One `profile` line of a fixture with its rules, and the words of a `program` line after it.
pub(super) struct Fixture {
    pub(super) title: String,
    pub(super) profile: Profile,
    pub(super) program: String,
}

/// Reads what hack/seccomp-oracle writes.
pub(super) fn fixtures(text: &str) -> Vec<Fixture> {
    let mut rules = HashMap::new();
    let mut fixtures = Vec::<Fixture>::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["rule", number, action, args, ref names @ ..] => {
                let args = args.trim_matches(['[', ']']).split(',').filter(|arg| !arg.is_empty()).map(arg).collect();
                let names = names.iter().filter(|name| !name.is_empty()).map(|name| (*name).to_owned()).collect();
                rules.insert(number, Rule { names, action: self::action(action), args });
            }
            ["profile", title, default, arches, ref numbers @ ..] => {
                let arch = |name: &str| Arch::ALL.iter().find(|(other, _)| *other == name).unwrap().1;
                let profile = Profile {
                    default_action: action(default),
                    architectures: arches.split(',').map(arch).collect(),
                    rules: numbers.iter().map(|number| rules[number].clone()).collect(),
                    flags: Default::default(),
                };
                fixtures.push(Fixture { title: title.to_owned(), profile, program: String::new() });
            }
            ["program", ..] => fixtures.last_mut().unwrap().program = line["program ".len()..].to_owned(),
            _ => panic!("{line}"),
        }
    }
    fixtures
}

fn action(text: &str) -> Action {
    let (name, errno) = text.split_once('=').unwrap_or((text, "1"));
    json::action("fixture", name, errno.parse().unwrap()).unwrap()
}

fn arg(text: &str) -> Arg {
    let words: Vec<&str> = text.split(':').collect();
    let op = match words[1] {
        "SCMP_CMP_NE" => Op::Ne,
        "SCMP_CMP_LT" => Op::Lt,
        "SCMP_CMP_LE" => Op::Le,
        "SCMP_CMP_EQ" => Op::Eq,
        "SCMP_CMP_GE" => Op::Ge,
        "SCMP_CMP_GT" => Op::Gt,
        "SCMP_CMP_MASKED_EQ" => Op::MaskedEq,
        other => panic!("{other}"),
    };
    Arg { index: words[0].parse().unwrap(), op, value: words[2].parse().unwrap(), value_two: words[3].parse().unwrap() }
}

fn mask(title: &str) -> u64 {
    let bit = |name: &str| 1 << crate::plan::capability::NAMES.iter().position(|&other| other == name).unwrap();
    if title == "none" { 0 } else { title.split(',').map(bit).sum() }
}

/// The verdict on one call, by reading the rules: no ranges, no numbers but the call's own. Enough for containerd's profile,
/// which allows x86's multiplexers whole and has one condition per rule.
struct Reader<'a> {
    profile: &'a Profile,
    arch: Arch,
    names: HashMap<u32, Vec<&'static str>>,
    newest: u32,
}

impl<'a> Reader<'a> {
    fn new(profile: &'a Profile, arch: Arch) -> Self {
        let mut names: HashMap<u32, Vec<&'static str>> = HashMap::new();
        let mut newest = 0;
        for (name, numbers) in TABLE.iter().filter(|(_, numbers)| numbers[arch as usize] != NONE) {
            let number = numbers[arch as usize];
            names.entry(number).or_default().push(name);
            if profile.rules.iter().any(|rule| rule.names.iter().any(|other| other == name)) {
                newest = newest.max(number);
            }
        }
        Reader { profile, arch, names, newest }
    }

    fn verdict(&self, number: u32, args: &[u64; 6]) -> Action {
        let names = self.names.get(&number).map_or(&[][..], |names| names);
        let rules = || self.profile.rules.iter().filter(|rule| rule.names.iter().any(|name| names.contains(&name.as_str())));
        if let Some(rule) = rules().find(|rule| rule.args.is_empty()).or_else(|| rules().find(|rule| self.holds(rule, args))) {
            return rule.action;
        }
        if number > self.newest { Action::Errno(38) } else { self.profile.default_action }
    }

    fn holds(&self, rule: &Rule, args: &[u64; 6]) -> bool {
        assert_eq!(rule.args.len(), 1);
        let Arg { index, op, value, value_two } = rule.args[0];
        let cut = |value: u64| if matches!(self.arch, Arch::X86_64 | Arch::Aarch64) { value } else { value & 0xffff_ffff };
        let (arg, value, value_two) = (cut(args[usize::from(index)]), cut(value), cut(value_two));
        match op {
            Op::Lt => arg < value,
            Op::Eq => arg == value,
            Op::MaskedEq => arg & value == value_two,
            other => panic!("{other:?} in containerd's profile"),
        }
    }

    /// Arguments that tell its rules apart, for calls that have conditions.
    fn arguments(&self, number: u32) -> Vec<[u64; 6]> {
        let names = self.names.get(&number).map_or(&[][..], |names| names);
        let conditional = self.profile.rules.iter().any(|rule| !rule.args.is_empty() && rule.names.iter().any(|name| names.contains(&name.as_str())));
        let mut first = vec![0, u64::MAX];
        if conditional {
            first.extend(0..64);
            first.extend((0..64).map(|bit| 1 << bit));
            first.extend((0..64).map(|bit| 17 | 1 << bit));
            first.extend([
                0x2_0008,
                0x2_0009,
                0xffff_fffe,
                0xffff_ffff,
                0x1_ffff_ffff,
                0x1_0002_0008,
                0xffff_ffff_0000_0000,
                0x003d_0f00,
                0x7e02_0000,
            ]);
        }
        first.into_iter().map(|first| [first, 3, 0, u64::MAX, 1, 5]).collect()
    }
}

fn check(text: &str, native: Arch) {
    let fixtures = fixtures(text);
    assert_eq!(fixtures.len(), 3 + crate::plan::capability::NAMES.len());
    for Fixture { title, profile, .. } in fixtures {
        let ours = runtime_default(mask(&title), native, (4, 8));
        assert_eq!(sorted(&ours), sorted(&profile), "{title}");
        let program = decode(&compile(&ours, native).unwrap());
        let verdict = |arch: Arch, number: u32, args: &[u64; 6]| run(&program, &Call { number, audit: arch.audit(), args: *args });
        for &arch in &profile.architectures {
            let reader = Reader::new(&profile, arch);
            let bit = if arch == Arch::X32 { X32_BIT } else { 0 };
            let private = if arch == Arch::Arm { 0xf_0000..0xf_0010 } else { 0..0 };
            for number in (0..1024).chain(private).chain([0x3fff_ffff]) {
                for args in reader.arguments(number) {
                    let expected = reader.verdict(number, &args).code();
                    assert_eq!(verdict(arch, number | bit, &args), expected, "{title}: {arch:?} {number} {args:x?}");
                }
            }
        }
        for number in [0x8000_0000, 0xbfff_ffff, 0xc000_0000, u32::MAX] {
            assert_eq!(verdict(native, number, &[0; 6]), Action::Errno(38).code(), "{title}: {number:#x}");
        }
        for audit in [0, native.audit() ^ 1, if native == Arch::X86_64 { Arch::Aarch64.audit() } else { Arch::X86_64.audit() }] {
            assert_eq!(run(&program, &Call { number: 0, audit, args: [0; 6] }), Action::KillThread.code(), "{title}: {audit:#x}");
        }
        // Short enough to be quick, and to leave room for a second filter.
        assert!(program.len() < 512, "{title}: {} instructions", program.len());
    }
}

/// The rules without their order, which containerd takes from the order of the capabilities.
fn sorted(profile: &Profile) -> (Action, Vec<Arch>, Vec<String>) {
    let mut architectures = profile.architectures.clone();
    architectures.sort();
    let rule = |rule: &Rule| {
        let mut names = rule.names.clone();
        names.sort();
        format!("{:?} {:?} {names:?}", rule.action, rule.args)
    };
    let mut rules: Vec<String> = profile.rules.iter().map(rule).collect();
    rules.sort();
    (profile.default_action, architectures, rules)
}

#[test]
fn verdicts_are_containerds_on_x86_64() {
    check(X86_64, Arch::X86_64);
}

#[test]
fn verdicts_are_containerds_on_aarch64() {
    check(AARCH64, Arch::Aarch64);
}

#[test]
fn tracing_waits_for_a_kernel_that_filters_again() {
    let traces = |kernel| runtime_default(0, Arch::X86_64, kernel).rules.iter().any(|rule| rule.names.iter().any(|name| name == "ptrace"));
    assert!(!traces((4, 7)));
    assert!(traces((4, 8)) && traces((5, 0)));
}
