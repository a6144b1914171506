#!/usr/bin/env bash
# hack/bench.sh: how quick and how small the runtime is: the latency of each CRI call, and the memory with N pods.
#
#   sudo hack/bench.sh [--pods N] [--iterations N]
#       this checkout's Copepod, on its own root, state, socket and network
#   sudo hack/bench.sh --endpoint unix://SOCKET --daemon PROGRAM --per-pod PROGRAM [--cgroup-parent P] [--image I] …
#       a runtime that runs already, for comparison, with the names of its daemon and of what it runs for each pod,
#       for example: --daemon containerd --per-pod containerd-shim-runc-v2
#
# Memory is PSS: shared pages count in parts. Needs root, Rust and a Go that can build k8s.io/cri-api (see hack/tools.sh).
# Leaves only the cache; of a runtime that ran already it removes the pods it made.

set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=node.sh
. "$(dirname "$0")/node.sh"
help_if_asked "$@"

need_root
pods=20 iterations=50 foreign='' daemon_name=copepod per_pod_name=copepod-monitor image=docker.io/library/busybox:latest parent=''
all=("$@")
while [[ $# -gt 0 ]]; do
  case $1 in
    --pods) pods=$2 ;;
    --iterations) iterations=$2 ;;
    --endpoint) foreign=$2 ;;
    --daemon) daemon_name=$2 ;;
    --per-pod) per_pod_name=$2 ;;
    --image) image=$2 ;;
    --cgroup-parent) parent=$2 ;;
    *) die "no such option: $1 (see --help)" ;;
  esac
  shift 2
done

storage=$("$project/hack/test-images" --path)
bench=$cache/bench-$(cat "$project"/hack/bench/{go.mod,go.sum,main.go,stream.go} | sha256sum | cut -c1-16)
if [[ -z ${COPEPOD_SANDBOX:-} ]]; then
  need_node_packages
  need_tools
  if [[ ! -x $bench ]]; then
    command -v go >/dev/null || die "no Go here: install Go 1.21 or newer"
    (cd "$project/hack/bench" && CGO_ENABLED=0 GOTOOLCHAIN=auto go build -trimpath -o "$bench" .)
  fi
  [[ -n $foreign ]] || need_bins
  [[ -n $foreign || -d $storage ]] || need_packages mmdebstrap:mmdebstrap cc:gcc
  [[ -n $foreign ]] || "$project/hack/test-images" "$storage"
fi

# pss PROGRAM: the number of processes of that name and the KiB they take.
pss() {
  local process total=0 count=0 kib
  for process in /proc/[0-9]*; do
    [[ $({ tr '\0' '\n' <"$process/cmdline" | head -1; } 2>/dev/null) == ?(*/)"$1" ]] || continue
    kib=$(awk '$1 == "Pss:" { print $2 }' "$process/smaps_rollup" 2>/dev/null) || continue
    total=$((total + ${kib:-0})) count=$((count + 1))
  done
  echo "$count $total"
}

# mib KIB PARTS: so many KiB, divided among parts, in MiB.
mib() { awk -v kib="$1" -v parts="$2" 'BEGIN { print kib / 1024 / parts }'; }

measure() {
  local arguments=(-endpoint "$1" -image "$image" -cgroup-parent "$parent")
  "$bench" "${arguments[@]}" -iterations "$iterations"
  "$bench" "${arguments[@]}" -keep -pods "$pods"
  read -r daemons daemon_kib <<<"$(pss "$daemon_name")"
  read -r monitors monitors_kib <<<"$(pss "$per_pod_name")"
  [[ $daemons -gt 0 && $monitors -ge $pods ]] || ps -eo pid,ppid,args >&2
  printf '%-40s %10s\n' "with $pods pods, idle" 'PSS MiB'
  printf '%-40s %10.2f\n' "$daemon_name ($daemons)" "$(mib "$daemon_kib" 1)"
  printf '%-40s %10.2f\n' "per pod: $per_pod_name ($monitors)" "$(mib "$monitors_kib" "$pods")"
}

if [[ -n $foreign ]]; then
  PATH=$cache/tools:$PATH
  TMPDIR=$(mktemp -d)
  export TMPDIR
  trap 'crictl -r "$foreign" pods --namespace bench -q | xargs -r "$cache/tools/crictl" -r "$foreign" rmp -f >/dev/null; rm -rf "$TMPDIR"' EXIT
  measure "$foreign"
  exit
fi

in_sandbox "${all[@]}"
PATH=$cache/tools:$PATH
work=$(mktemp -d /var/tmp/copepod-bench.XXXXXX)
finish() {
  crictl rmp -fa >/dev/null 2>&1 || true
  node_stop
  "$project/hack/registry.sh" stop "$work/registry" || true
  node_remove
}
trap finish EXIT
trap 'exit 130' INT TERM
registry=$("$project/hack/registry.sh" start "$work/registry" --storage "$storage")
node_create "$work" "$registry"
export TMPDIR=$work
COPEPOD_LOG=warn node_start
measure "$endpoint"
crictl rmp -fa >/dev/null
node_stop
"$project/hack/registry.sh" stop "$work/registry"
node_left || die "something is left, see above"
