# shellcheck shell=bash
# A Copepod of a script's own: its root, state, socket, control groups and CNI network, in namespaces of its own, and
# the proof that nothing of it is left. Sourced after lib.sh, never run.
# $COPEPOD_CGROUP_DRIVER: cgroupfs, or systemd where that is the machine's init; then in the machine's own process namespace,
# which is systemd's.
: "${bins:?lib.sh comes first}"
driver=${COPEPOD_CGROUP_DRIVER:-cgroupfs}

# in_sandbox "$@": first thing in a script: runs it again as root in new mount, network and process namespaces, where
# the rest happens. The machine's network is out of reach and untouched, and what is still there at the end ends.
in_sandbox() {
  need_root
  if [[ -z ${COPEPOD_SANDBOX:-} ]]; then
    local processes=(--pid --fork --kill-child --mount-proc)
    [[ $driver != systemd ]] || processes=()
    COPEPOD_SANDBOX=1 exec unshare --mount --net "${processes[@]}" --propagation slave "$0" "$@"
  fi
  # Shared again, but not with the machine: containers' mounts propagate within the sandbox.
  mount --make-rshared /
  ip link set lo up
}

need_node_packages() {
  need_packages unshare:util-linux ip:iproute2 iptables:iptables curl:curl openssl:openssl python3:python3 ps:procps /usr/lib/cni/bridge:containernetworking-plugins
}

# node_create DIR [REGISTRY]: writes a configuration for a Copepod in DIR. REGISTRY (host:port) stands in for the public ones.
node_create() {
  node=$1
  # The same name as a control group's and as a unit's.
  node_name=$(tr -c 'a-zA-Z0-9\n' _ <<<"${node##*/}")
  endpoint=unix://$node/copepod.sock
  mkdir -p "$node"/{root,state,netns,registries.d,cni/{conf,cache,ipam}}
  mount -t tmpfs -o mode=700 tmpfs "$node/state"

  cat >"$node/config.yaml" <<CONFIG
apiVersion: copepod.dev/v1alpha1
kind: RuntimeConfiguration
root: $node/root
state: $node/state
listen: $node/copepod.sock
monitor:
  path: $bins/copepod-monitor
  cgroup: /$node_name/monitors
cgroup:
  driver: $driver
  defaultParent: /$node_name/pods
network:
  cniConfDir: $node/cni/conf
  cniBinDirs: [/usr/lib/cni, /opt/cni/bin]
  cniCacheDir: $node/cni/cache
  netnsDir: $node/netns
image:
  registriesConf: $node/registries.conf
  registriesConfDir: $node/registries.d
log:
  level: ${COPEPOD_LOG:-info}
CONFIG

  # What crictl reads.
  export CRI_CONFIG_FILE=$node/crictl.yaml
  printf 'runtime-endpoint: %s\nimage-endpoint: %s\ntimeout: 60\n' "$endpoint" "$endpoint" >"$CRI_CONFIG_FILE"

  : >"$node/registries.conf"
  local host
  for host in ${2:+registry.k8s.io k8s.gcr.io gcr.io docker.io quay.io}; do
    printf '[[registry]]\nlocation = "%s"\n[[registry.mirror]]\nlocation = "%s"\ninsecure = true\n\n' "$host" "$2"
  done >>"$node/registries.conf"

  # ipMasq stays off: there is no outside to be seen from.
  cat >"$node/cni/conf/10-test.conflist" <<CONFLIST
{
  "cniVersion": "1.0.0",
  "name": "copepod-test",
  "plugins": [
    {
      "type": "bridge", "bridge": "copepod0", "isGateway": true, "hairpinMode": true,
      "ipam": {
        "type": "host-local", "dataDir": "$node/cni/ipam",
        "ranges": [[{ "subnet": "10.85.0.0/16" }]], "routes": [{ "dst": "0.0.0.0/0" }]
      }
    },
    { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true }
  ]
}
CONFLIST
  mounts_before=$(node_mounts)
}

# node_start: starts the daemon and waits until it says that it and its network are ready.
node_start() {
  setsid "$bins/copepod" serve --config "$node/config.yaml" >>"$node/log" 2>&1 </dev/null &
  daemon=$!
  if ! wait_until 30 "copepod answers at $endpoint and is ready" node_ready_or_gone || gone "$daemon"; then
    tail -50 "$node/log" >&2
    die "copepod is not ready, see its log above"
  fi
}

node_ready_or_gone() { gone "$daemon" || [[ $(crictl info -o go-template --template '{{range .status.conditions}}{{.status}} {{end}}' 2>/dev/null) == 'true true '* ]]; }

# node_stop: stops the daemon. Pods go on: remove them before.
node_stop() {
  [[ -n ${daemon:-} ]] || return 0
  stop_pid "$daemon" copepod || say "copepod did not end by itself"
  wait "$daemon" 2>/dev/null || true
  daemon=
}

# Mount points, one a line; autofs and the like that others mount meanwhile are not under our directories.
node_mounts() { awk '{ print $5 }' /proc/self/mountinfo | sort; }

# node_left: prints what the node left behind and fails if there is anything after five seconds: a process that is told to
# end takes a moment to be gone. Call it when everything has been stopped.
node_left() {
  wait_until 5 "nothing is left behind" node_is_clean && return 0
  say "left behind:"
  node_remains >&2
  return 1
}

node_is_clean() { [[ -z $(node_remains) ]]; }

# node_remains: prints what there is of the node but its directories.
node_remains() {
  (
    cd /
    [[ $driver == systemd ]] || for process in /proc/[0-9]*; do
      pid=${process#/proc/}
      # This shell, its subshells, and what has ended.
      [[ $pid == "$$" || $pid == "$BASHPID" ]] || gone "$pid" || [[ $(readlink "$process/exe") == "$(readlink /proc/$$/exe)" ]] ||
        printf 'process %s: %s\n' "$pid" "$(tr '\0' ' ' <"$process/cmdline")"
    done 2>/dev/null
    comm -13 <(printf '%s\n' "$mounts_before") <(node_mounts) | sed 's/^/mount: /'
    find "$node/netns" -mindepth 1 -printf 'network namespace: %p\n'
    ip -o link show type veth | sed 's/^/veth: /'
    find "$node/cni/ipam" -type f ! -name lock ! -name 'last_reserved_ip.*' -printf 'IPAM file: %p\n'
    find "$node/cni/cache" -type f -printf 'CNI result: %p\n'
    find "$node"/state/{pods,containers,journal} "$node/root/containers" -mindepth 1 -maxdepth 1 -printf 'file: %p\n'
    [[ $driver != systemd ]] || node_units
    find /sys/fs/cgroup -mindepth 2 -type d -path "*/$node_name/pods/*" -printf 'control group: %p\n'
    find /sys/fs/cgroup -mindepth 2 -type d -path "*/$node_name/monitors/*" -printf 'control group: %p\n'
  )
}

# What systemd knows of pods, containers and monitors; the monitors' scope ends a moment after the daemon.
node_units() {
  wait_until 10 "the monitors' scope ends" node_monitors_ended || true
  systemctl list-units --all --plain --no-legend "$node_name-pods-*" "$node_name-monitors.scope" 'copepod-*.scope' | sed 's/^/unit: /'
}

node_monitors_ended() { ! systemctl --quiet is-active "$node_name-monitors.scope"; }

# node_remove: ends what still runs and deletes the directory and the control groups. Safe to call twice.
node_remove() {
  [[ -n ${node:-} ]] || return 0
  local process pid
  # As the first process of a process namespace this shell sees what the script started and nothing else.
  if [[ $$ -eq 1 ]]; then
    for process in /proc/[0-9]*; do
      pid=${process#/proc/}
      [[ $pid == 1 || $pid == "$BASHPID" ]] || kill -KILL "$pid" 2>/dev/null || true
    done
  fi
  if [[ $driver == systemd ]]; then
    [[ -z ${daemon:-} ]] || kill -KILL "$daemon" 2>/dev/null || true
    systemctl stop "$node_name-monitors.scope" "$node_name-pods.slice" "$node_name.slice" 2>/dev/null || true
  fi
  wait_until 10 "the control groups of $node_name are empty" node_cgroups_removed || true
  node_mounts | grep "^$node/" | sort -r | while read -r mount; do umount -l "$mount"; done || true
  rm -rf --one-file-system "$node" || true
  node=
}

node_cgroups_removed() {
  find /sys/fs/cgroup -depth -type d -path "*/$node_name*" -exec rmdir {} + 2>/dev/null
  ! find /sys/fs/cgroup -type d -path "*/$node_name*" | grep -q .
}
