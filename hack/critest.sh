#!/usr/bin/env bash
# hack/critest.sh: runs Kubernetes' own conformance tests for container runtimes, critest, against this checkout's Copepod.
#
#   sudo hack/critest.sh [--twice] [--load] [ARGUMENT…]    every spec, or what critest's own arguments choose, for example:
#   sudo hack/critest.sh --ginkgo.focus='Container OOM'
#   sudo hack/critest.sh --ginkgo.focus=Streaming -websocket-exec -websocket-attach -websocket-portforward
#
#   --twice   runs it all a second time against the same daemon
#   --load    pods with a container come and go beside the run; with --twice, beside the second
#
# Prints a line for each spec and critest's summary (the whole output when a spec failed, or with VERBOSE=1), and exits
# with critest's code, or with 1 if Copepod left anything behind: processes, mounts, network namespaces, interfaces,
# addresses, control groups, files of pods.
# $COPEPOD_CGROUP_DRIVER: cgroupfs (default) or systemd, for which the machine's init has to be systemd, with cgroup v2.
# Needs root; what is missing is installed or built (packages, programs, crictl and critest, test images). Runs in
# namespaces of its own, with its own registry, network, root, state and socket. Leaves only the cache.

set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=node.sh
. "$(dirname "$0")/node.sh"
help_if_asked "$@"

need_root
storage=$("$project/hack/test-images" --path)
if [[ -z ${COPEPOD_SANDBOX:-} ]]; then
  need_node_packages
  need_bins
  need_tools
  [[ -d $storage ]] || need_packages mmdebstrap:mmdebstrap cc:gcc
  "$project/hack/test-images" "$storage"
fi
in_sandbox "$@"
PATH=$cache/tools:$PATH

twice='' load=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --twice) twice=1 ;;
    --load) load=1 ;;
    *) break ;;
  esac
  shift
done

work=$(mktemp -d /var/tmp/copepod-critest.XXXXXX)
finish() {
  node_stop
  "$project/hack/registry.sh" stop "$work/registry" || true
  node_remove
}
trap finish EXIT
trap 'exit 130' INT TERM

# The AppArmor specs load their profiles with it.
if ! command -v sudo >/dev/null; then
  mkdir "$work/bin"
  printf '#!/bin/sh\nexec "$@"\n' >"$work/bin/sudo"
  chmod 755 "$work/bin/sudo"
  PATH=$work/bin:$PATH
fi

registry=$("$project/hack/registry.sh" start "$work/registry" --storage "$storage")
node_create "$work" "$registry"
node_start

# One spec pulls an image by a digest that is fixed upstream and can't be made here: this copy of critest asks for the
# digest of our own image instead.
sed "s/9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf/$(sed 's/sha256://' "$storage/digest")/" "$cache/tools/critest" >"$work/critest"
chmod 755 "$work/critest"

# suite LOG ARGUMENT…: runs critest once and fails as it does.
suite() {
  local log=$1 critest code=0
  shift
  (cd "$work" && exec ./critest --runtime-endpoint "$endpoint" --image-endpoint "$endpoint" --ginkgo.v --ginkgo.no-color --ginkgo.timeout=60m \
    "$@" >"$log" 2>&1) &
  critest=$!
  # A line for each spec as it ends: how, and its name, which stands above.
  tail -n +1 -F --pid="$critest" "$log" 2>/dev/null |
    awk '/^\[k8s.io\]/ { spec = $0 } /^• / || /^S \[SKIPPED\]/ { print substr($0, 1, 40) "  " spec; fflush() }' >&2 || true
  wait "$critest" || code=$?
  if [[ $code -ne 0 || -n ${VERBOSE:-} ]]; then
    cat "$log"
    say "--- copepod's log (the last 200 lines)"
    tail -200 "$work/log" >&2
  else
    sed -n '/^Ran [0-9]* of/,$p' "$log"
  fi
  if [[ -n ${RESULTS:-} ]]; then cp "$log" "$work/log" "$RESULTS/"; fi
  return "$code"
}

# pods_come_and_go: until $work/load is gone. Fails with the first pod that does.
pods_come_and_go() {
  local n=0 pod container
  crictl pull registry.k8s.io/copepod/load:1 >/dev/null || return 1
  while [[ -e $work/load ]]; do
    n=$((n + 1))
    printf '{"metadata": {"name": "load-%s", "namespace": "load", "uid": "load-%s"}, "linux": {}}' "$n" "$n" >"$work/pod.json"
    printf '{"metadata": {"name": "load"}, "image": {"image": "registry.k8s.io/copepod/load:1"}, "command": ["sleep", "1000"], "linux": {}}' >"$work/container.json"
    pod=$(crictl runp "$work/pod.json") && container=$(crictl create "$pod" "$work/container.json" "$work/pod.json") &&
      crictl start "$container" && crictl exec -s "$container" true && crictl stop "$container" && crictl rmp -f "$pod" || return 1
  done >/dev/null 2>"$work/load.log"
  crictl rmi registry.k8s.io/copepod/load:1 >/dev/null
  say "load: $n pods came and went"
}

# loaded LOG ARGUMENT…: runs critest beside the load and fails if either does.
loaded() {
  local code=0 coming
  : >"$work/load"
  pods_come_and_go &
  coming=$!
  suite "$@" || code=$?
  rm "$work/load"
  if ! wait "$coming"; then
    say "load: a pod failed: $(tail -1 "$work/load.log")"
    tail -50 "$work/log" >&2
    code=1
  fi
  return "$code"
}

code=0
if [[ -n $load && -z $twice ]]; then
  loaded "$work/critest.log" "$@" || code=$?
else
  suite "$work/critest.log" "$@" || code=$?
fi
if [[ -n $twice && $code -eq 0 ]]; then
  say "again, against the same daemon${load:+, beside a load}"
  "$([[ -n $load ]] && echo loaded || echo suite)" "$work/critest-2.log" "$@" || code=$?
fi

pods=$(crictl pods -q 2>/dev/null || true)
if [[ -n $pods ]]; then
  say "pods that critest did not remove: $(echo "$pods" | tr '\n' ' ')"
  crictl rmp -fa >/dev/null 2>&1 || true
fi
node_stop
"$project/hack/registry.sh" stop "$work/registry"
node_left || [[ $code -ne 0 ]] || code=1
exit "$code"
