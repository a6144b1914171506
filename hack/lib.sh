# shellcheck shell=bash
# What the scripts of hack/ share: messages, packages, the cache, waiting. Sourced, never run.
# After sourcing: $project (the checkout), $cache (kept outside of it), $bins (where hack/build.sh puts the programs).

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${COPEPOD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/copepod}
bins=${OUT:-${CARGO_TARGET_DIR:-$project/target}/bin}
# What a script calls through another one has to agree with it.
export COPEPOD_CACHE=$cache OUT=$bins
# A user's shell may lack the directories where Debian keeps root's programs.
PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*" >&2; }

# title TEXT: the heading of a step.
title() { printf '\n== %s\n' "$*" >&2; }

die() {
  say "${0##*/}: $*"
  exit 1
}

# help_if_asked "$@": prints the script's own header and ends when the first argument asks for it.
help_if_asked() {
  case ${1:-} in
    -h | --help | help)
      sed -n '2,${/^$/q;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
  esac
}

need_root() { [[ $EUID -eq 0 ]] || die "this needs root: sudo $0"; }

# need_packages WHAT:PACKAGE…: installs the Debian package of each WHAT (a command, or a path) that is missing.
need_packages() {
  local pair absent=()
  for pair in "$@"; do
    [[ ${pair%%:*} == /* ]] && [[ -e ${pair%%:*} ]] && continue
    command -v "${pair%%:*}" >/dev/null || absent+=("${pair#*:}")
  done
  [[ ${#absent[@]} -gt 0 ]] || return 0
  command -v apt-get >/dev/null ||
    die "missing: what Debian calls ${absent[*]}. This machine has no apt-get: install them with its own package manager and run this again"
  [[ $EUID -eq 0 ]] || die "missing: run 'sudo apt-get install ${absent[*]}' first, or run this with sudo"
  say "installing ${absent[*]}"
  apt_get install -y --no-install-recommends "${absent[@]}"
}

# apt_get ARGUMENTS…: quiet unless it fails. Package lists that are absent or too old are fetched, and it is tried again.
apt_get() {
  local log
  log=$(mktemp)
  export DEBIAN_FRONTEND=noninteractive
  if ! apt-get "$@" >"$log" 2>&1 && ! { apt-get update && apt-get "$@"; } >"$log" 2>&1; then
    cat "$log" >&2
    rm -f "$log"
    die "apt-get $1 failed, see above"
  fi
  rm -f "$log"
}

# unpacked PACKAGE: prints a directory with the files of a Debian package that is not to be installed, because it would
# start a service or because only one of its files is wanted.
unpacked() {
  local into=$cache/packages/$1
  if [[ ! -d $into ]]; then
    command -v apt-get >/dev/null || die "no apt-get here to download Debian's $1 with: install it by other means"
    mkdir -p "$into.new"
    (cd "$into.new" && apt_get download "$1" && dpkg -x ./*.deb . && rm -- *.deb)
    mv "$into.new" "$into"
  fi
  printf '%s\n' "$into"
}

# wait_until SECONDS WHAT COMMAND…: polls; after SECONDS it fails and says what it waited for.
wait_until() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    [[ $SECONDS -lt $end ]] || {
      say "waited in vain: $what"
      return 1
    }
    sleep 0.05
  done
}

# gone PID: whether that process has ended (a zombie has).
gone() { [[ ! -e /proc/$1/stat ]] || grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null; }

# stop_pid PID WHAT: SIGTERM, ten seconds, then SIGKILL and a failure.
stop_pid() {
  kill -TERM "$1" 2>/dev/null || return 0
  wait_until 10 "$2 ($1) ends after SIGTERM" gone "$1" && return 0
  kill -KILL "$1" 2>/dev/null || true
  return 1
}

# need_cargo: puts cargo on PATH, from which sudo drops ~/.cargo/bin: the caller's, then root's.
need_cargo() {
  local home
  for home in "$(getent passwd "${SUDO_USER:-root}" | cut -d: -f6)" "$HOME"; do PATH=$PATH:$home/.cargo/bin; done
  command -v cargo >/dev/null || die "no cargo here: install Rust from https://rustup.rs and run this again"
  need_packages cc:gcc
}

# need_bins: builds the three programs unless they are there. hack/build.sh builds them anew.
need_bins() {
  [[ -x $bins/copepod && -x $bins/copepod-monitor && -x $bins/copepod-oci ]] || "$project/hack/build.sh" || die "the build failed"
}

# need_tools: makes crictl and critest and puts them first on PATH.
need_tools() {
  "$project/hack/tools.sh" "$cache/tools" || die "no crictl and critest"
  PATH=$cache/tools:$PATH
}
