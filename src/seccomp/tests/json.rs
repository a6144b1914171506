//! Profiles as text.

use super::super::{Action, Arch, Arg, Flags, Host, Op, Profile, Rule, from_json};
use crate::errchain::Chain;

const HOST: Host = Host { capabilities: 1 << 21, arch: Arch::X86_64, kernel: (6, 1) };

#[test]
fn an_oci_profile() {
    let text = br#"{
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_S390X"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"],
        "listenerPath": "",
        "syscalls": [
            {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["clone"], "action": "SCMP_ACT_TRACE", "errnoRet": 4, "args": [
                {"index": 0, "value": 2114060288, "valueTwo": 1, "op": "SCMP_CMP_MASKED_EQ"},
                {"index": 5, "value": 18446744073709551615, "op": "SCMP_CMP_NE"}]},
            {"names": ["mount"], "action": "SCMP_ACT_KILL"}
        ]}"#;
    let rule = |names: &[&str], action, args| Rule { names: names.iter().map(|&name| name.to_owned()).collect(), action, args };
    let expected = Profile {
        default_action: Action::Errno(13),
        architectures: vec![Arch::X86_64, Arch::X86],
        rules: vec![
            rule(&["read", "write"], Action::Allow, vec![]),
            rule(
                &["clone"],
                Action::Trace(4),
                vec![
                    Arg { index: 0, op: Op::MaskedEq, value: 0x7e02_0000, value_two: 1 },
                    Arg { index: 5, op: Op::Ne, value: u64::MAX, value_two: 0 },
                ],
            ),
            rule(&["mount"], Action::KillThread, vec![]),
        ],
        flags: Flags { log: true, spec_allow: false },
    };
    assert_eq!(from_json(text, &HOST).unwrap(), expected);
    let least = from_json(br#"{"defaultAction": "SCMP_ACT_ERRNO"}"#, &HOST).unwrap();
    assert_eq!(least, Profile { default_action: Action::Errno(1), architectures: vec![], rules: vec![], flags: Flags::default() });
}

#[test]
fn conditions_on_the_host() {
    let applies = |conditions: &str| {
        let text = format!(r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{{"name": "bpf", "action": "SCMP_ACT_ALLOW", {conditions}}}]}}"#);
        from_json(text.as_bytes(), &HOST).unwrap().rules.len() == 1
    };
    for (conditions, expected) in [
        (r#""args": null, "comment": "", "includes": {}, "excludes": {}"#, true),
        (r#""includes": {"caps": ["CAP_SYS_ADMIN"]}"#, true),
        (r#""includes": {"caps": ["CAP_SYS_ADMIN", "CAP_BPF"]}"#, false),
        (r#""includes": {"caps": ["CAP_OF_NEXT_YEAR"]}"#, false),
        (r#""includes": {"arches": ["amd64", "x32"]}"#, true),
        (r#""includes": {"arches": ["arm64"]}"#, false),
        (r#""includes": {"minKernel": "4.8"}"#, true),
        (r#""includes": {"minKernel": "6.10"}"#, false),
        (r#""includes": {"minKernel": "soon"}"#, false),
        (r#""excludes": {"caps": ["CAP_SYS_ADMIN", "CAP_BPF"]}"#, false),
        (r#""excludes": {"caps": ["CAP_BPF"]}"#, true),
        (r#""excludes": {"arches": ["s390", "s390x"]}"#, true),
        (r#""excludes": {"arches": ["amd64"]}"#, false),
        (r#""excludes": {"minKernel": "5.0"}"#, false),
        (r#""includes": {"caps": ["CAP_SYS_ADMIN"]}, "excludes": {"arches": ["amd64"]}"#, false),
    ] {
        assert_eq!(applies(conditions), expected, "{conditions}");
    }
}

#[test]
fn an_arch_map_gives_the_native_entry() {
    let text = br#"{"defaultAction": "SCMP_ACT_ALLOW", "defaultErrno": "ENOSYS", "archMap": [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
        {"architecture": "SCMP_ARCH_S390X", "subArchitectures": ["SCMP_ARCH_S390"]}]}"#;
    assert_eq!(from_json(text, &HOST).unwrap().architectures, [Arch::X86_64, Arch::X86, Arch::X32]);
    assert_eq!(from_json(text, &Host { arch: Arch::Aarch64, ..HOST }).unwrap().architectures, [Arch::Aarch64, Arch::Arm]);
}

#[test]
fn wrong_values_are_named() {
    let check = |text: &str, expected: &str| assert_eq!(Chain(&from_json(text.as_bytes(), &HOST).unwrap_err()).to_string(), expected);
    let call =
        |call: &str| format!(r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{{"names": ["read"], "action": "SCMP_ACT_LOG"}}, {call}]}}"#);
    check("{}", "cannot parse seccomp profile: missing field `defaultAction` at line 1 column 2");
    check(r#"{"defaultAction": "SCMP_ACT_DENY"}"#, r#"seccomp profile: defaultAction: invalid value "SCMP_ACT_DENY""#);
    check(r#"{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 70000}"#, r#"seccomp profile: defaultErrnoRet: invalid value "70000""#);
    check(r#"{"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["x86"]}"#, r#"seccomp profile: architectures[0]: invalid value "x86""#);
    check(
        r#"{"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86"], "archMap": [{"architecture": "SCMP_ARCH_ARM"}]}"#,
        "seccomp profile: architectures and archMap exclude each other",
    );
    check(
        r#"{"defaultAction": "SCMP_ACT_ERRNO", "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}"#,
        r#"seccomp profile: flags[0]: invalid value "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV""#,
    );
    check(&call(r#"{"names": ["a"], "action": ""}"#), r#"seccomp profile: syscalls[1].action: invalid value """#);
    check(
        &call(r#"{"names": ["a"], "name": "a", "action": "SCMP_ACT_LOG"}"#),
        "seccomp profile: syscalls[1].name and syscalls[1].names exclude each other",
    );
    check(&call(r#"{"names": [""], "action": "SCMP_ACT_LOG"}"#), r#"seccomp profile: syscalls[1].names: invalid value """#);
    check(
        &call(r#"{"names": ["a"], "action": "SCMP_ACT_ERRNO", "errno": "EWHAT"}"#),
        r#"seccomp profile: syscalls[1].errnoRet: invalid value "EWHAT""#,
    );
    check(
        &call(r#"{"names": ["a"], "action": "SCMP_ACT_LOG", "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}"#),
        r#"seccomp profile: syscalls[1].args[0].index: invalid value "6""#,
    );
    check(
        &call(r#"{"names": ["a"], "action": "SCMP_ACT_LOG", "args": [{"index": 5, "value": 1, "op": "=="}]}"#),
        r#"seccomp profile: syscalls[1].args[0].op: invalid value "==""#,
    );
}
