// Command seccomp-oracle prints the facts that src/seccomp is built from and tested against.
//
//	go run . profile > ../../tests/seccomp/containerd-x86_64.txt
//	GOARCH=arm64 go build -o /tmp/oracle . && qemu-aarch64-static /tmp/oracle profile > ../../tests/seccomp/containerd-aarch64.txt
//	go run . table "$(go list -m -f '{{.Dir}}' golang.org/x/sys)/unix" /usr/include/x86_64-linux-gnu/asm/unistd_x32.h > ../../src/seccomp/table.rs
//
// It is not part of any build. libseccomp.py beside it makes the other fixtures.
package main

import (
	"fmt"
	"os"
)

func main() {
	err := fmt.Errorf("usage: seccomp-oracle profile | table X-SYS-UNIX-DIRECTORY UNISTD-X32-HEADER")
	switch {
	case len(os.Args) == 2 && os.Args[1] == "profile":
		err = profile()
	case len(os.Args) == 4 && os.Args[1] == "table":
		err = table(os.Args[2], os.Args[3])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
