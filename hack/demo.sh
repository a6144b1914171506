#!/usr/bin/env bash
# hack/demo.sh: shows what Copepod does, in two minutes: real pods from a real image on a real CNI network, driven with
# crictl, through a kill -9 of the daemon, down to the proof that nothing is left.
#
#   sudo hack/demo.sh
#
# Needs root and Rust. Installs the Debian packages that are missing, builds Copepod and crictl (several minutes, once),
# makes a busybox image and serves it from a registry on loopback: from then on it runs offline. Copepod
# gets its own root, state directory and socket, and namespaces of its own: nothing of the machine's containers or
# network is touched. Leaves only the cache.

set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=node.sh
. "$(dirname "$0")/node.sh"
help_if_asked "$@"

need_root
storage=$("$project/hack/test-images" --path)
if [[ -z ${COPEPOD_SANDBOX:-} ]]; then
  title "Setting up: packages, programs, crictl, an image"
  need_node_packages
  need_bins
  need_tools
  [[ -d $storage ]] || need_packages mmdebstrap:mmdebstrap cc:gcc
  "$project/hack/test-images" "$storage"
fi
in_sandbox "$@"
PATH=$cache/tools:$PATH

work=$(mktemp -d /var/tmp/copepod-demo.XXXXXX)
finish() {
  node_stop
  "$project/hack/registry.sh" stop "$work/registry" || true
  node_remove
}
trap finish EXIT
trap 'exit 130' INT TERM

# show COMMAND…: the command as one would type it, then what it does.
show() {
  printf '$ %s\n' "$*"
  "$@"
}

# pod NAME: runs a pod sandbox and prints its id. As with kubelet each container has its own process namespace ("pid": 1).
pod() {
  mkdir -p "$work/logs/$1"
  cat >"$work/$1.json" <<JSON
{
  "metadata": { "name": "$1", "namespace": "demo", "uid": "$1-uid", "attempt": 0 },
  "hostname": "$1", "log_directory": "$work/logs/$1", "linux": { "cgroup_parent": "/$node_name/pods", "security_context": { "namespace_options": { "pid": 1 } } }
}
JSON
  crictl runp "$work/$1.json"
}

# container POD-ID POD NAME COMMAND: creates and starts a container of busybox and prints its id. $work/shared is /shared in it.
container() {
  cat >"$work/$2-$3.json" <<JSON
{
  "metadata": { "name": "$3", "attempt": 0 },
  "image": { "image": "$image" },
  "command": ["sh", "-c", "$4"],
  "log_path": "$3.log",
  "labels": { "io.kubernetes.pod.name": "$2", "io.kubernetes.pod.namespace": "demo" },
  "mounts": [{ "container_path": "/shared", "host_path": "$work/shared" }],
  "linux": { "resources": { "memory_limit_in_bytes": 67108864 }, "security_context": { "namespace_options": { "pid": 1 } } }
}
JSON
  local id
  id=$(crictl create "$1" "$work/$2-$3.json" "$work/$2.json")
  crictl start "$id" >/dev/null
  printf '%s\n' "$id"
}

lines() { wc -l <"$work/logs/web/ticker.log"; }
more_lines_than() { [[ $(lines) -gt $1 ]]; }

registry=$("$project/hack/registry.sh" start "$work/registry" --storage "$storage")
node_create "$work" "$registry"
mkdir -p "$work/shared"
image=docker.io/library/busybox:latest

title "Copepod starts: its own root, state and socket beneath $work"
node_start
show crictl version

title "An image, from a registry on loopback that stands in for docker.io"
show crictl pull "$image"
show crictl images

title "A pod with two containers: a web server, and a clock that talks to it over localhost"
web=$(pod web)
container "$web" web server 'mkdir -p /tmp/www; echo hello from the pod web >/tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www' >/dev/null
# shellcheck disable=SC2016
ticker=$(container "$web" web ticker 'n=0; while :; do n=$((n+1)); echo tick $n; sleep 0.2; done')
job=$(container "$web" web job 'until [ -e /shared/finish ]; do sleep 0.1; done; echo the job ends; exit 42')
show crictl pods
show crictl ps
fetch() { crictl exec --sync "$1" wget -qO- "http://$2:8080/"; }
wait_until 10 "the web server answers" fetch "$ticker" 127.0.0.1
show crictl exec --sync "$ticker" wget -qO- http://127.0.0.1:8080/

title "A second pod reaches the first by its address on the CNI network"
client=$(pod client)
shell=$(container "$client" client shell 'while :; do sleep 1; done')
address=$(crictl inspectp -o go-template --template '{{.status.network.ip}}' "$web")
show crictl exec --sync "$shell" wget -qO- "http://$address:8080/"

title "Logs, commands in a container, statistics"
show crictl logs --tail 3 "$ticker"
show crictl exec --sync "$shell" hostname
# Without the sequences that clear a terminal.
show crictl stats | sed 's/\x1b\[[0-9;]*[A-Za-z]//g'

title "kill -9 of the daemon"
pids=$(pgrep -d, -f 'httpd -f -p|echo tick')
job_pid=$(pgrep -f 'echo the job ends')
show kill -9 "$daemon"
wait "$daemon" 2>/dev/null || true
if crictl version >/dev/null 2>&1; then die "something still answers"; fi
echo "The containers run on:"
show ps -o pid,etime,args -p "$pids"
before=$(lines)
wait_until 10 "new lines arrive in the log" more_lines_than "$((before + 4))"
echo "The clock's log had $before lines and has $(lines) now: no daemon, no line lost."
touch "$work/shared/finish"
wait_until 10 "the job ends" gone "$job_pid"
echo "And the job has ended, while nobody was there to see it."

title "The daemon starts again"
node_start
show crictl pods
show crictl ps -a
code=$(crictl inspect -o go-template --template '{{.status.exitCode}}' "$job")
echo "The exit code of the job that ended meanwhile: $code"
[[ $code -eq 42 ]] || die "it was 42"
missing=$(awk '{ if ($NF != NR) { print NR; exit } }' "$work/logs/web/ticker.log")
[[ -z $missing ]] || die "the clock's log lacks line $missing"
show crictl logs "$job"
show crictl exec --sync "$shell" wget -qO- "http://$address:8080/"

title "Everything is taken down"
show crictl stopp "$web" "$client"
show crictl rmp "$web" "$client"
show crictl pods
node_stop
"$project/hack/registry.sh" stop "$work/registry"
node_left || die "something is left, see above"
echo "Left behind: no process, mount, network namespace, interface, address or control group."
