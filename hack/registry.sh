#!/usr/bin/env bash
# hack/registry.sh: an image registry of one's own on loopback, Debian's docker-registry.
#
#   hack/registry.sh start DIR [--storage DIR] [--port N]   prints its address once it answers
#   hack/registry.sh stop DIR                               stops it; the storage stays
#
# DIR gets its configuration, log and pid file; the images are kept in --storage (default: DIR/storage). Without --port
# a free one is taken. Where docker-registry isn't installed, its program is taken out of Debian's package, which is not
# installed: that would start a service. Needs curl.

set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
help_if_asked "$@"

# serve PORT: starts the registry and waits for its answer; fails if it ends, as it does when the port is taken.
serve() {
  local pid address=127.0.0.1:$1
  cat >"$dir/config.yml" <<CONFIG
version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: "$storage"}, delete: {enabled: true}}
http: {addr: "$address"}
CONFIG
  setsid "$program" serve "$dir/config.yml" >"$dir/log" 2>&1 </dev/null &
  pid=$!
  answers() { gone "$pid" || curl -fsS "http://$address/v2/"; }
  wait_until 20 "the registry answers at $address" answers || return 1
  ! gone "$pid" || return 1
  echo "$pid" >"$dir/pid"
  echo "$address"
}

command=${1:-} dir=${2:-} port='' storage=''
[[ -n $dir ]] || die "which directory? (see --help)"
shift 2
while [[ $# -gt 0 ]]; do
  case $1 in
    --storage) storage=$2 ;;
    --port) port=$2 ;;
    *) die "no such option: $1 (see --help)" ;;
  esac
  shift 2
done

case $command in
  start)
    need_packages curl:curl
    mkdir -p "$dir"
    dir=$(cd "$dir" && pwd)
    storage=${storage:-$dir/storage}
    mkdir -p "$storage"
    program=$(type -P docker-registry) || program=$(unpacked docker-registry)/usr/bin/docker-registry
    if [[ -n $port ]]; then
      serve "$port" || die "no registry on port $port: $(tail -1 "$dir/log")"
    else
      for _ in 1 2 3 4 5; do
        serve $((20000 + RANDOM % 12000)) && exit 0
      done
      die "no registry: $(tail -1 "$dir/log")"
    fi
    ;;
  stop)
    [[ -e $dir/pid ]] || exit 0
    stop_pid "$(cat "$dir/pid")" docker-registry || die "docker-registry had to be killed"
    rm "$dir/pid"
    ;;
  *) die "start or stop? (see --help)" ;;
esac
