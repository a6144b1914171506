#!/usr/bin/python3
"""Prints profiles and the programs that libseccomp compiles them to, as a fixture for src/seccomp's tests.

    ./libseccomp.py ../../tests/seccomp/containerd-*.txt > ../../tests/seccomp/libseccomp.txt

Needs Debian's python3-seccomp. Rules are given to libseccomp as runc does. Names that this version of it doesn't know are left
out of the rules it prints. The default action is LOG: with one that refuses, runc would put its ENOSYS answers in front, which
are no part of libseccomp. Format: that of profile.go, then the instructions of the program.
"""
import struct
import sys
import tempfile

import seccomp

ARCHES = {
    "SCMP_ARCH_X86_64": seccomp.Arch.X86_64, "SCMP_ARCH_X86": seccomp.Arch.X86, "SCMP_ARCH_X32": seccomp.Arch.X32,
    "SCMP_ARCH_AARCH64": seccomp.Arch.AARCH64, "SCMP_ARCH_ARM": seccomp.Arch.ARM,
}
OPS = {
    "SCMP_CMP_NE": seccomp.NE, "SCMP_CMP_LT": seccomp.LT, "SCMP_CMP_LE": seccomp.LE, "SCMP_CMP_EQ": seccomp.EQ,
    "SCMP_CMP_GE": seccomp.GE, "SCMP_CMP_GT": seccomp.GT, "SCMP_CMP_MASKED_EQ": seccomp.MASKED_EQ,
}


def action(text):
    name, _, errno = text.partition("=")
    return {
        "SCMP_ACT_ALLOW": seccomp.ALLOW, "SCMP_ACT_LOG": seccomp.LOG, "SCMP_ACT_KILL": seccomp.KILL, "SCMP_ACT_TRAP": seccomp.TRAP,
        "SCMP_ACT_KILL_PROCESS": seccomp.KILL_PROCESS,
        "SCMP_ACT_ERRNO": seccomp.ERRNO(int(errno or 1)), "SCMP_ACT_TRACE": seccomp.TRACE(int(errno or 1)),
    }[name]


def known(name):
    return seccomp.resolve_syscall(seccomp.Arch(seccomp.Arch.NATIVE), name) != -1


def conditions(args):
    for arg in args:
        index, op, value, value_two = arg.split(":")
        yield seccomp.Arg(int(index), OPS[op], int(value), int(value_two))


def emit(title, arches, rules, default="SCMP_ACT_LOG"):
    """Compiles and prints one profile. The first architecture is the native one; rules are (action, [args], [names])."""
    made = seccomp.SyscallFilter(action(default))
    for arch in arches:
        if arch != "SCMP_ARCH_X86_64":
            made.add_arch(ARCHES[arch])
    if "SCMP_ARCH_X86_64" not in arches:
        made.remove_arch(seccomp.Arch(seccomp.Arch.X86_64))
    kept = []
    for act, args, names in rules:
        names = [name for name in names if known(name)]
        kept.append((act, args, names))
        for name in names:
            if action(act) == action(default):
                continue
            indexes = [arg.split(":")[0] for arg in args]
            if len(set(indexes)) < len(indexes):
                for arg in args:
                    made.add_rule(action(act), name, *conditions([arg]))
            else:
                made.add_rule(action(act), name, *conditions(args))
    for number, (act, args, names) in enumerate(kept):
        print(f"rule {number} {act} [{','.join(args)}] {' '.join(names)}")
    print(f"profile {title} {default} {','.join(arches)} {' '.join(map(str, range(len(kept))))}")
    with tempfile.TemporaryFile() as file:
        made.export_bpf(file)
        file.seek(0)
        program = struct.iter_unpack("=HBBI", file.read())
    print("program", " ".join(f"{code:x},{jt:x},{jf:x},{k:x}" for code, jt, jf, k in program))


def containerd(path):
    rules = {}
    for line in open(path):
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "rule":
            number, act, args, names = rest.split(" ", 3)
            rules[number] = (act, [arg for arg in args.strip("[]").split(",") if arg], names.split(" "))
        elif word == "profile":
            capabilities, _, arches, numbers = rest.split(" ", 3)
            # The empty set, and all.
            if capabilities == "none" or capabilities.count(",") > 20:
                title = f"containerd-{'none' if capabilities == 'none' else 'all'}"
                native = ["SCMP_ARCH_AARCH64" if "aarch64" in path else "SCMP_ARCH_X86_64"]
                arches = native + [arch for arch in arches.split(",") if arch not in native]
                emit(title, arches, [rules[number] for number in numbers.split(" ")])


# Calls with different arguments for each comparison, found on every architecture.
PLAIN = ["dup", "fchdir", "fchmod", "fchown", "fsync", "ftruncate", "getpgid", "getsid", "ioctl", "kill", "lseek", "madvise", "mlock", "msync",
         "munmap", "nanosleep", "ptrace", "pwritev", "readv", "setgid", "setuid", "times", "tkill", "umask", "wait4", "write", "read", "close"]


def comparisons():
    values = [5, 0x1_0000_0005, 0xFFFF_FFFF, 0x8000_0000_0000_0000]
    pairs = [(op, value) for op in ["NE", "LT", "LE", "EQ", "GE", "GT"] for value in values]
    rules = [("SCMP_ACT_ALLOW", [f"{i % 6}:SCMP_CMP_{op}:{value}:0"], [PLAIN[i]]) for i, (op, value) in enumerate(pairs)]
    masks = [(0x22, 0x22), (0x7, 0xF), (0xF0_0000_000F, 0x10_0000_0001), (0xFF_0000_0000, 0x12_0000_0000)]
    rules += [("SCMP_ACT_ERRNO=7", [f"1:SCMP_CMP_MASKED_EQ:{mask}:{value}"], [PLAIN[24 + i]]) for i, (mask, value) in enumerate(masks)]
    return rules


COMBINED = [
    ("SCMP_ACT_ALLOW", ["2:SCMP_CMP_EQ:7:0", "3:SCMP_CMP_MASKED_EQ:34:34"], ["mmap", "mremap"]),
    ("SCMP_ACT_ALLOW", ["0:SCMP_CMP_GT:5:0", "1:SCMP_CMP_LE:4294967301:0", "5:SCMP_CMP_NE:9:0"], ["futex"]),
    # Two conditions on one argument: alternatives.
    ("SCMP_ACT_ALLOW", ["1:SCMP_CMP_GE:9:0", "1:SCMP_CMP_LE:3:0"], ["kill"]),
    # One argument, many values.
    ("SCMP_ACT_ALLOW", ["0:SCMP_CMP_EQ:1:0"], ["prctl"]),
    ("SCMP_ACT_ALLOW", ["0:SCMP_CMP_EQ:2:0"], ["prctl"]),
    ("SCMP_ACT_ALLOW", ["0:SCMP_CMP_EQ:4294967299:0"], ["prctl"]),
    ("SCMP_ACT_ERRNO=9", ["0:SCMP_CMP_EQ:4:0"], ["prctl"]),
    # With and without conditions, either way round.
    ("SCMP_ACT_ERRNO=9", ["0:SCMP_CMP_EQ:4:0"], ["read"]),
    ("SCMP_ACT_ALLOW", [], ["read"]),
    ("SCMP_ACT_ALLOW", [], ["write"]),
    ("SCMP_ACT_ERRNO=9", ["0:SCMP_CMP_EQ:4:0"], ["write"]),
    ("SCMP_ACT_TRACE=3", [], ["close"]),
    ("SCMP_ACT_KILL", [], ["dup", "no_such_call"]),
    ("SCMP_ACT_KILL_PROCESS", [], ["dup3"]),
    ("SCMP_ACT_TRAP", [], ["pipe2"]),
    # Always true, on every architecture and on those with 32 bits.
    ("SCMP_ACT_ALLOW", ["0:SCMP_CMP_MASKED_EQ:0:0"], ["sync"]),
    ("SCMP_ACT_ALLOW", ["0:SCMP_CMP_MASKED_EQ:4294967296:0"], ["fsync"]),
    # x86's doubled calls.
    ("SCMP_ACT_ALLOW", ["0:SCMP_CMP_EQ:16:0"], ["socket"]),
    ("SCMP_ACT_ALLOW", ["0:SCMP_CMP_EQ:17:0", "2:SCMP_CMP_EQ:3:0"], ["bind"]),
    ("SCMP_ACT_ERRNO=5", [], ["connect", "accept", "accept4", "send", "recvmmsg"]),
    ("SCMP_ACT_ALLOW", [], ["shmget", "msgsnd"]),
    ("SCMP_ACT_ALLOW", ["1:SCMP_CMP_LT:4:0"], ["semop", "semget"]),
]

X86 = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
ARM = ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]

print("# libseccomp's programs (Debian's 2.5.4). Made by hack/seccomp-oracle/libseccomp.py.")
for path in sys.argv[1:]:
    containerd(path)
for title, rules in [("comparisons", comparisons()), ("combined", COMBINED)]:
    emit(title, X86, rules)
    emit(title, ARM, rules)
emit("native-only", ["SCMP_ARCH_X86_64"], COMBINED)
emit("allow-by-default", X86, [("SCMP_ACT_ERRNO=1", args, names) for _, args, names in COMBINED], "SCMP_ACT_ALLOW")
