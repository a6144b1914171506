#!/usr/bin/env bash
# hack/test.sh: sets up and runs every test.
#
#   sudo hack/test.sh [STEP…]      all steps, or these:
#     lint      formatting, clippy, shellcheck
#     cargo     units, layering and the tests that start the real programs, with every feature and with few
#     critest   Kubernetes' conformance tests, on this host
#     vm        the tests and the conformance tests again, in a virtual machine with cgroup v2 (see hack/vm.sh)
#
# Every step runs, though one fails before it; the last line says how it went. No test is skipped for want of root
# (COPEPOD_TEST_ROOT=1). Needs root and Rust; installs the packages and builds the tools that are missing. Leaves the
# build and the cache ($COPEPOD_CACHE). A first run takes about half an hour on two cores.

set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=node.sh
. "$(dirname "$0")/node.sh"
help_if_asked "$@"
need_root
need_cargo
export COPEPOD_TEST_ROOT=1
cd "$project"

lint() {
  need_packages shellcheck:shellcheck
  cargo fmt --check &&
    cargo clippy --locked --all-targets -- -D warnings &&
    cargo clippy --locked --test systemd -- -D warnings &&
    cargo clippy --locked --all-targets --no-default-features -- -D warnings &&
    shellcheck hack/*.sh .ci/run
}

cargo_tests() {
  local code=0 busybox
  # Neither is installed: the one would start a service, and the tests need no more than a program of either.
  PATH=$(unpacked docker-registry)/usr/bin:$PATH
  busybox=$(unpacked busybox-static)
  COPEPOD_TEST_BUSYBOX=$(find "$busybox" -type f -name busybox -perm -u+x | head -1)
  [[ -n $COPEPOD_TEST_BUSYBOX ]] || die "no busybox in $busybox"
  export COPEPOD_TEST_BUSYBOX
  cargo test --locked --no-fail-fast || code=$?
  cargo test --locked --no-fail-fast --no-default-features || code=$?
  cargo test --locked --no-default-features --features spec --lib || code=$?
  return "$code"
}

critest() {
  local code=0
  hack/critest.sh --twice --load || code=$?
  hack/critest.sh --ginkgo.focus=Streaming -websocket-exec -websocket-attach -websocket-portforward || code=$?
  return "$code"
}

vm() {
  local code=0
  # What another kernel and cgroup v2 have a say in: the rest has run on this host.
  hack/vm.sh --no-systemd --timeout 1500 --tests cgroup cri monitor oci_runtime options recovery || code=$?
  hack/vm.sh --no-systemd --timeout 900 hack/critest.sh \
    --ginkgo.focus='AppArmor|Runtime info|PodSandbox|Container runtime|Container OOM|Idempotence|Networking|Multiple Containers|Image|UserNamespaces' || code=$?
  # The same node as its users have it: systemd is the first process, and makes the control groups.
  hack/vm.sh --timeout 900 -- env COPEPOD_CGROUP_DRIVER=systemd hack/critest.sh \
    --ginkgo.focus='Container runtime should support basic operations|Container OOM|Runtime info' || code=$?
  return "$code"
}

[[ $# -gt 0 ]] || set -- lint cargo critest vm
need_node_packages
passed=0 failed=()
for step in "$@"; do
  title "$step"
  case $step in
    lint) run=lint ;;
    cargo) run=cargo_tests ;;
    critest) run=critest ;;
    vm) run=vm ;;
    *) die "no such step: $step (see --help)" ;;
  esac
  if [[ $step != lint && -z ${images:-} ]]; then
    need_packages mmdebstrap:mmdebstrap cc:gcc
    images=$(hack/test-images --path)
    hack/test-images "$images"
  fi
  if [[ $step == critest || $step == vm ]] && [[ -z ${built:-} ]]; then
    hack/build.sh || die "the programs don't build"
    hack/tools.sh
    built=1
  fi
  # In a subshell, where `die` ends the step and not the run.
  code=0
  started=$SECONDS
  ("$run") || code=$?
  if [[ $code -eq 0 ]]; then passed=$((passed + 1)); else failed+=("$step"); fi
  say "$step: $([[ $code -eq 0 ]] && echo passed || echo failed) after $((SECONDS - started)) s"
done
title "steps: $passed passed, ${#failed[@]} failed${failed[*]:+ (${failed[*]})}"
[[ ${#failed[@]} -eq 0 ]]
