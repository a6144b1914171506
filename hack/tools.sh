#!/usr/bin/env bash
# hack/tools.sh: puts crictl and critest, the Kubernetes tools that Copepod is driven and tested with, into a directory.
#
#   hack/tools.sh [DIR]      DIR: $COPEPOD_CACHE/tools by default
#
# Takes each from PATH if it is of a version that fits (1.36 or 1.37); else builds both from hack/tools/go.mod, which
# pins the version; else, where no Go of at least 1.21 can be had, downloads the project's release. Fails, and says why,
# if none of the three works. Prints the two versions.
# Needs Go or the network, and root only to install Debian's Go. Leaves two programs in DIR.

set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
help_if_asked "$@"

into=${1:-$cache/tools}
pinned=$(sed -n 's/^require sigs.k8s.io\/cri-tools v//p' "$project/hack/tools/go.mod")
fits='1\.3[67]\.'

# version_of PROGRAM: the bare version it reports.
version_of() {
  case ${1##*/} in
    crictl) "$1" --version 2>/dev/null ;;
    critest) "$1" -version 2>/dev/null ;;
  esac | sed -n 's/^\(crictl version\|critest version:\) v\{0,1\}\([0-9.]*\).*/\2/p'
}

# have_go: whether there is a Go that can fetch the toolchain that go.mod asks for, by itself (since 1.21).
have_go() {
  local version
  version=$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null) || return 1
  [[ $(printf '%s\n' go1.21 "$version" | sort -V | head -1) == go1.21 ]]
}

need_go() {
  have_go && return 0
  command -v apt-get >/dev/null && [[ $EUID -eq 0 ]] || return 1
  local candidate
  candidate=$(apt-cache policy golang-go | sed -n 's/^  Candidate: 2:\([0-9.]*\).*/\1/p')
  [[ -n $candidate && $(printf '%s\n' 1.21 "$candidate" | sort -V | head -1) == 1.21 ]] || return 1
  need_packages go:golang-go && have_go
}

build() {
  say "building crictl and critest $pinned (some minutes, once)"
  local flags="-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=$pinned" toolchain
  toolchain=$(go env GOTOOLCHAIN)
  # A distribution's Go may be told never to fetch a newer toolchain; this build may.
  [[ $toolchain != local ]] || toolchain=auto
  (
    cd "$project/hack/tools"
    export CGO_ENABLED=0 GOTOOLCHAIN=$toolchain GOFLAGS='-trimpath -mod=readonly'
    go build -ldflags "$flags" -o "$into/crictl" sigs.k8s.io/cri-tools/cmd/crictl &&
      go test -c -ldflags "$flags" -o "$into/critest" sigs.k8s.io/cri-tools/cmd/critest
  )
}

download() {
  local arch program
  case $(uname -m) in
    x86_64) arch=amd64 ;;
    aarch64) arch=arm64 ;;
    *) return 1 ;;
  esac
  command -v curl >/dev/null || return 1
  for program in crictl critest; do
    curl -fsSL --retry 3 "https://github.com/kubernetes-sigs/cri-tools/releases/download/v$pinned/$program-v$pinned-linux-$arch.tar.gz" |
      tar -C "$into" -xzf - "$program" || return 1
  done
}

mkdir -p "$into"
wanted=
for program in crictl critest; do
  [[ $(version_of "$into/$program") =~ ^$fits ]] && continue
  found=$(type -P "$program" || true)
  if [[ -n $found && $(version_of "$found") =~ ^$fits ]]; then
    ln -sf "$found" "$into/$program"
  else
    wanted=1
  fi
done
if [[ -n $wanted ]]; then
  if need_go; then
    build || die "crictl and critest $pinned don't build, see above"
  else
    say "no Go of 1.21 or newer here: downloading the release of crictl and critest $pinned"
    download || die "neither built nor downloaded: install Go 1.21 or newer, or put crictl and critest $pinned on PATH"
  fi
fi
for program in crictl critest; do
  version=$(version_of "$into/$program")
  [[ $version =~ ^$fits ]] || die "$into/$program says it is version '$version', which does not fit"
  say "$program $version in $into"
done
