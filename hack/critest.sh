#!/usr/bin/env bash
# hack/critest.sh: runs Kubernetes' own conformance tests for container runtimes, critest, against this checkout's Copepod.
#
#   sudo hack/critest.sh --today [ARGUMENT…]    the specs that hack/critest-focus.txt lists
#   sudo hack/critest.sh [ARGUMENT…]            every spec, or what critest's own arguments choose, for example:
#   sudo hack/critest.sh --ginkgo.focus='Container OOM'
#
# Prints a line for each spec and critest's summary (the whole output when a spec failed, or with VERBOSE=1), and exits
# with critest's code, or with 1 if Copepod left anything behind: processes, mounts, network namespaces, interfaces,
# addresses, control groups.
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

arguments=()
for argument in "$@"; do
  [[ $argument == --today ]] || {
    arguments+=("$argument")
    continue
  }
  while IFS= read -r line; do
    case $line in
      '' | '#'*) ;;
      '!'*) arguments+=("--ginkgo.skip=${line#!}") ;;
      *) arguments+=("--ginkgo.focus=$line") ;;
    esac
  done <"$project/hack/critest-focus.txt"
done

work=$(mktemp -d /var/tmp/copepod-critest.XXXXXX)
finish() {
  node_stop
  "$project/hack/registry.sh" stop "$work/registry" || true
  node_remove
}
trap finish EXIT
trap 'exit 130' INT TERM

registry=$("$project/hack/registry.sh" start "$work/registry" --storage "$storage")
node_create "$work" "$registry"
node_start

# One spec pulls an image by a digest that is fixed upstream and can't be made here: this copy of critest asks for the
# digest of our own image instead.
sed "s/9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf/$(sed 's/sha256://' "$storage/digest")/" "$cache/tools/critest" >"$work/critest"
chmod 755 "$work/critest"

code=0
(cd "$work" && ./critest --runtime-endpoint "$endpoint" --image-endpoint "$endpoint" --ginkgo.v --ginkgo.no-color --ginkgo.timeout=60m \
  ${arguments[@]+"${arguments[@]}"} >"$work/critest.log" 2>&1) &
critest=$!
# A line for each spec as it ends: how, and its name, which stands above.
tail -n +1 -F --pid="$critest" "$work/critest.log" 2>/dev/null |
  awk '/^\[k8s.io\]/ { spec = $0 } /^• / || /^S \[SKIPPED\]/ { print substr($0, 1, 40) "  " spec; fflush() }' >&2 || true
wait "$critest" || code=$?

if [[ $code -ne 0 || -n ${VERBOSE:-} ]]; then
  cat "$work/critest.log"
  say "--- copepod's log (the last 200 lines)"
  tail -200 "$work/log" >&2
else
  sed -n '/^Ran [0-9]* of/,$p' "$work/critest.log"
fi
if [[ -n ${RESULTS:-} ]]; then cp "$work/critest.log" "$work/log" "$RESULTS/"; fi

pods=$(crictl pods -q 2>/dev/null || true)
if [[ -n $pods ]]; then
  say "pods that critest did not remove: $(echo "$pods" | tr '\n' ' ')"
  crictl rmp -fa >/dev/null 2>&1 || true
fi
node_stop
"$project/hack/registry.sh" stop "$work/registry"
node_left || [[ $code -ne 0 ]] || code=1
exit "$code"
