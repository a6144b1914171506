package main

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Every capability, in the order of its bit.
var capabilities = strings.Fields(`
	CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
	NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
	SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
	MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE`)

// What containerd gives a container that asks for nothing.
var usual = strings.Fields(`
	CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE`)

// profile prints containerd's default profile of the architecture this program is built for, as rules and, for each set of
// capabilities, the numbers of the rules that make it up.
//
//	rule N ACTION[=ERRNO] [INDEX:OPERATOR:VALUE:VALUETWO,...] NAME...
//	profile CAPABILITY[,CAPABILITY...]|none DEFAULT[=ERRNO] ARCHITECTURE,... N...
func profile() error {
	version := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, module := range info.Deps {
			if module.Path == "github.com/containerd/containerd/v2" {
				version = module.Version
			}
		}
	}
	fmt.Printf("# DefaultProfile of containerd %s, contrib/seccomp, linux/%s, kernel 4.8 or newer. Made by hack/seccomp-oracle.\n", version, runtime.GOARCH)

	sets := [][]string{{}, usual, capabilities}
	for _, capability := range capabilities {
		sets = append(sets, []string{capability})
	}
	var rules, profiles []string
	for _, set := range sets {
		spec := &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{}}}
		for _, name := range set {
			spec.Process.Capabilities.Bounding = append(spec.Process.Capabilities.Bounding, "CAP_"+name)
		}
		made := seccomp.DefaultProfile(spec)
		var numbers, arches []string
		for _, call := range made.Syscalls {
			text := rule(call)
			number := slices.Index(rules, text)
			if number < 0 {
				number = len(rules)
				rules = append(rules, text)
			}
			numbers = append(numbers, fmt.Sprint(number))
		}
		for _, arch := range made.Architectures {
			arches = append(arches, string(arch))
		}
		name := strings.Join(set, ",")
		if name == "" {
			name = "none"
		}
		profiles = append(profiles, fmt.Sprintf("profile %s %s %s %s", name, action(made.DefaultAction, made.DefaultErrnoRet),
			strings.Join(arches, ","), strings.Join(numbers, " ")))
	}
	for number, text := range rules {
		fmt.Printf("rule %d %s\n", number, text)
	}
	for _, text := range profiles {
		fmt.Println(text)
	}
	return nil
}

func action(action specs.LinuxSeccompAction, errno *uint) string {
	if errno != nil {
		return fmt.Sprintf("%s=%d", action, *errno)
	}
	return string(action)
}

func rule(call specs.LinuxSyscall) string {
	var args []string
	for _, arg := range call.Args {
		args = append(args, fmt.Sprintf("%d:%s:%d:%d", arg.Index, arg.Op, arg.Value, arg.ValueTwo))
	}
	return fmt.Sprintf("%s [%s] %s", action(call.Action, call.ErrnoRet), strings.Join(args, ","), strings.Join(call.Names, " "))
}
