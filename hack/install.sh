#!/usr/bin/env bash
# hack/install.sh: installs Copepod on this machine, or removes it again.
#
#   sudo hack/install.sh [OPTIONS]               programs, systemd unit, configuration, CNI network, completions, man page
#   sudo hack/install.sh --uninstall [OPTIONS]   removes every pod and what was installed; configuration and images stay
#   sudo hack/install.sh --purge [OPTIONS]       those too
#
#   --prefix DIR    programs, unit and documentation go there (default /usr/local)
#   --destdir DIR   everything goes below DIR, for packages; nothing is started
#   --no-start      the unit is enabled but not started
#
# A configuration file that is there is kept, changed or not; a CNI network is added only where there is none. Needs root,
# systemd and the built programs (builds them when they are missing). kubelet finds Copepod at
# unix:///run/copepod/copepod.sock, crictl by /etc/crictl.yaml.

set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
help_if_asked "$@"

prefix=/usr/local destdir='' action=install start=1
while [[ $# -gt 0 ]]; do
  case $1 in
    --prefix) prefix=$2 && shift 2 ;;
    --destdir) destdir=$2 && shift 2 ;;
    --no-start) start='' && shift ;;
    --uninstall) action=uninstall && shift ;;
    --purge) action=purge && shift ;;
    *) die "no such option: $1 (see --help)" ;;
  esac
done
[[ $prefix == /* ]] || die "--prefix must be an absolute path: $prefix"
[[ -n $destdir ]] || need_root

programs=(copepod copepod-monitor copepod-oci)
# Beside the programs, each with its place.
unit=$prefix/lib/systemd/system/copepod.service
man=$prefix/share/man/man8/copepod.8
bash_completion=$prefix/share/bash-completion/completions/copepod
zsh_completion=$prefix/share/zsh/site-functions/_copepod
fish_completion=$prefix/share/fish/vendor_completions.d/copepod.fish
config=/etc/copepod/copepod.yaml
conflist=/etc/cni/net.d/10-copepod.conflist
crictl=/etc/crictl.yaml

# put MODE TARGET: standard input becomes the file.
put() {
  mkdir -p "$destdir$(dirname "$2")"
  cat >"$destdir$2.new"
  chmod "$1" "$destdir$2.new"
  # In one step: a program that runs is not written to.
  mv "$destdir$2.new" "$destdir$2"
}

systemd() { [[ -z $destdir && -d /run/systemd/system ]]; }

install_all() {
  local program
  need_bins
  for program in "${programs[@]}"; do put 755 "$prefix/bin/$program" <"$bins/$program"; done
  sed "s|^ExecStart=/usr/local/|ExecStart=$prefix/|" "$project/config/copepod.service" | put 644 "$unit"
  "$bins/copepod" completions bash | put 644 "$bash_completion"
  "$bins/copepod" completions zsh | put 644 "$zsh_completion"
  "$bins/copepod" completions fish | put 644 "$fish_completion"
  "$bins/copepod" manual | put 644 "$man"
  [[ -e $destdir$config ]] || put 644 "$config" <"$project/config/copepod.yaml"
  compgen -G "$destdir/etc/cni/net.d/*" >/dev/null || put 644 "$conflist" <"$project/config/10-copepod.conflist"
  [[ -e $destdir$crictl ]] ||
    printf 'runtime-endpoint: unix:///run/copepod/copepod.sock\nimage-endpoint: unix:///run/copepod/copepod.sock\ntimeout: 60\n' | put 644 "$crictl"
  [[ -n $destdir ]] || "$prefix/bin/copepod" config check
  compgen -G "$destdir/opt/cni/bin/bridge" >/dev/null || compgen -G "$destdir/usr/lib/cni/bridge" >/dev/null ||
    say "no CNI plugins in /opt/cni/bin or /usr/lib/cni: install them (Debian: containernetworking-plugins)"
  if systemd; then
    systemctl daemon-reload
    systemctl enable copepod.service
    # Pods go on meanwhile.
    [[ -z $start ]] || systemctl restart copepod.service
  elif [[ -z $destdir ]]; then
    say "systemd does not run here: start '$prefix/bin/copepod serve' by other means"
  fi
}

uninstall_all() {
  if [[ -z $destdir && -S /run/copepod/copepod.sock && -x $prefix/bin/copepod ]]; then
    "$prefix/bin/copepod" drain || die "pods are left: remove them (crictl rmp -fa) and run this again"
  fi
  if systemd; then
    systemctl disable --now copepod.service 2>/dev/null || true
    systemctl stop copepod-monitors.scope copepod.slice 2>/dev/null || true
  fi
  rm -f "$destdir$unit" "$destdir$man" "$destdir$bash_completion" "$destdir$zsh_completion" "$destdir$fish_completion"
  rm -f "${programs[@]/#/$destdir$prefix/bin/}"
  ! systemd || systemctl daemon-reload
  [[ $action == purge ]] || return 0
  if [[ -z $destdir ]]; then
    rm -rf --one-file-system /run/copepod /var/lib/copepod
  fi
  rm -rf "$destdir/etc/copepod"
  for file in "$crictl" "$conflist"; do
    # Only what is ours: another runtime may have come since.
    ! grep -qs copepod "$destdir$file" || rm -f "$destdir$file"
  done
}

case $action in
  install) install_all ;;
  *) uninstall_all ;;
esac
