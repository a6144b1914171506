#!/usr/bin/env bash
# hack/vm.sh: runs a command as root in a virtual machine like the nodes that users have: Debian's cloud kernel, systemd,
# cgroup v2 only, AppArmor.
#
#   sudo hack/vm.sh [OPTIONS] [--] COMMAND [ARGUMENT…]   in a copy of this checkout, at the same path
#   sudo hack/vm.sh [OPTIONS] --tests [NAME…]            the test executables of `cargo test`: all, or `copepod`
#                                                        (the units) and files of tests/
#
#   --timeout SECONDS   ends the machine after this long (default 2400)
#   --memory MIB        default 4096
#   --cpus N            default: the host's
#   --results DIR       copies what the command leaves in $RESULTS there
#   --reboots N         the command may reboot the machine so often (systemctl reboot): it runs again after each boot,
#                       with the number of boots before this one in $COPEPOD_VM_BOOT, until it exits
#   --no-systemd        a shell script is the first process instead of systemd
#
# For example: hack/vm.sh uname -r; hack/vm.sh hack/critest.sh; hack/vm.sh --tests. Standard output and error
# come as one stream; the exit code is the command's. Of the outside the guest has copies: the checkout without
# ignored files, the programs in $OUT, and of the cache the tools and the test images. It has no network but loopback.
#
# Needs a Debian host (the guest is of the same release, so that programs built here run there), root, qemu and
# mmdebstrap (installed when missing). Without a working /dev/kvm it emulates: some ten times slower, but it works.
# Leaves the guest's root file system and kernel in the cache ($COPEPOD_CACHE/vm), nothing else.

set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
help_if_asked "$@"

# What the guest has beside Debian's minimal base.
packages=busybox-static,containernetworking-plugins,curl,docker-registry,iproute2,iptables,kmod,nftables,openssl,procps,psmisc,python3,attr,strace
packages+=,systemd,systemd-sysv,dbus,apparmor

timeout=2400 memory=4096 cpus=$(nproc) results='' tests='' reboots=0 systemd=1
while [[ $# -gt 0 ]]; do
  case $1 in
    --timeout) timeout=$2 && shift 2 ;;
    --memory) memory=$2 && shift 2 ;;
    --cpus) cpus=$2 && shift 2 ;;
    --results) results=$2 && shift 2 ;;
    --tests) tests=1 && shift ;;
    --reboots) reboots=$2 && shift 2 ;;
    --no-systemd) systemd='' && shift ;;
    --) shift && break ;;
    -*) die "no such option: $1 (see --help)" ;;
    *) break ;;
  esac
done
[[ -n $tests || $# -gt 0 ]] || die "what shall it run? (see --help)"
need_root
. /etc/os-release
[[ $ID == debian ]] || die "this needs a Debian host: the guest is made from its release"
arch=$(dpkg --print-architecture)
case $arch in
  amd64) qemu=qemu-system-x86_64 qemu_package=qemu-system-x86 machine=q35 console=ttyS0 ;;
  arm64) qemu=qemu-system-aarch64 qemu_package=qemu-system-arm machine=virt console=ttyAMA0 ;;
  *) die "no guest is defined for $arch" ;;
esac
need_packages "$qemu:$qemu_package" mmdebstrap:mmdebstrap mke2fs:e2fsprogs cpio:cpio python3:python3

key=$(printf '%s\n' "$VERSION_CODENAME" "$arch" "$packages" "$(sed -n '/^make_guest()/,/^}/p' "$0")" | sha256sum | cut -c1-16)
guest=$cache/vm/$key
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# make_guest DIR: the root file system with the kernel's modules, the kernel, and an initial RAM disk that loads the disk
# driver and goes on to the payload's init.
make_guest() {
  local root=$work/root initrd=$work/initrd kernel module i=0
  # The metapackage names the newest kernel; its package is unpacked, not installed: no boot loader, no hooks.
  # shellcheck disable=SC2016
  mmdebstrap --quiet --variant=minbase --include="$packages" --aptopt='Acquire::Retries "3"' \
    --customize-hook='chroot "$1" sh -ec "cd /var/tmp; apt-get -qq download \$(apt-cache depends linux-image-cloud-'"$arch"' | sed -n \"s/.*Depends: \(linux-image-[0-9].*\)/\1/p\")"' \
    "$VERSION_CODENAME" "$root" || die "the guest's root file system could not be made"
  dpkg-deb --fsys-tarfile "$root"/var/tmp/linux-image-*.deb | tar -C "$root" --keep-directory-symlink -xf -
  rm "$root"/var/tmp/*.deb
  kernel=$(ls "$root/lib/modules")
  chroot "$root" depmod "$kernel"
  # Without one, every boot would be the first, which sets things up.
  sha256sum <<<"$key" | cut -c1-32 >"$root/etc/machine-id"
  mkdir -p "$initrd"/{bin,dev,proc,new,modules} "$root/payload"
  cp "$root/bin/busybox" "$initrd/bin/"
  for module in $(chroot "$root" modprobe -S "$kernel" --show-depends virtio_pci | awk '$1 == "insmod" { print $2 }') \
    $(chroot "$root" modprobe -S "$kernel" --show-depends virtio_blk | awk '$1 == "insmod" { print $2 }'); do
    compgen -G "$initrd/modules/*-${module##*/}" >/dev/null && continue
    i=$((i + 1))
    cp "$root$module" "$initrd/modules/$(printf %02d $i)-${module##*/}"
  done
  cat >"$initrd/init" <<'INIT'
#!/bin/busybox sh
busybox=/bin/busybox
$busybox mount -t devtmpfs dev /dev
for module in /modules/*; do $busybox insmod $module; done
$busybox mount -t ext4 -o noatime /dev/vda /new && $busybox mount -t ext4 -o noatime /dev/vdb /new/payload && $busybox mount --move /dev /new/dev &&
  exec $busybox switch_root /new /payload/init
INIT
  chmod 755 "$initrd/init"
  mkdir -p "$1.new"
  (cd "$initrd" && find . | cpio -o -H newc --quiet) | gzip -1 >"$1.new/initrd"
  cp "$root/boot/vmlinuz-$kernel" "$1.new/kernel"
  mke2fs -q -F -t ext4 -O '^has_journal' -d "$root" "$1.new/root.ext4" 8G >/dev/null 2>&1
  rm -rf "$root"
  mv "$1.new" "$1"
}

if [[ ! -d $guest ]]; then
  say "making the guest's root file system (once)"
  make_guest "$guest"
fi

# An accelerator that shows itself by booting the kernel up to the panic for want of a root file system: /dev/kvm can
# be there and not work.
accelerator() {
  local known
  known=$guest/accel-$(uname -r)-$(stat -c %t:%T /dev/kvm 2>/dev/null || echo none)
  if [[ ! -e $known ]]; then
    rm -f "$guest"/accel-*
    if [[ -w /dev/kvm ]] && timeout --foreground 20 "$qemu" -M "$machine" -accel kvm -cpu host -m 512 -nodefaults -display none -no-reboot \
      -kernel "$guest/kernel" -append 'panic=-1' >/dev/null 2>&1 </dev/null; then
      echo 'kvm' >"$known"
    else
      echo 'tcg,thread=multi,tb-size=512' >"$known"
    fi
  fi
  cat "$known"
}
accel=$(accelerator)
cpu=host
# Without five-level page tables, which cost an emulator dearly.
[[ $accel == kvm ]] || cpu=max$([[ $arch != amd64 ]] || echo ,la57=off)

# The payload: a disk whose files/ holds what the guest sees at the same paths as the host.
payload=$work/payload
mkdir -p "$payload"/{files,results}
# carry PATH: a file or directory for the guest.
carry() {
  mkdir -p "$payload/files$(dirname "$1")"
  cp -a --reflink=auto "$1" "$payload/files$(dirname "$1")/"
}
mkdir -p "$payload/files$project"
(cd "$project" && git -c safe.directory="$project" ls-files -z -co --exclude-standard | while IFS= read -rd '' file; do
  [[ ! -e $file ]] || printf '%s\0' "$file"
done | tar --null -T - -cf -) | tar -C "$payload/files$project" -xf -
[[ ! -d $bins ]] || carry "$bins"
for directory in "$cache/tools" "$cache"/registry-*; do
  [[ ! -d $directory ]] || carry "$directory"
done

if [[ -n $tests ]]; then
  need_cargo
  say "building the tests"
  # The library's unit tests bear the package's name.
  targets=() extra=()
  # What needs systemd is for nowhere else, and only built when it is named.
  [[ $# -gt 0 || -z $systemd ]] || extra=(--tests --lib --test systemd)
  for name in "$@"; do
    if [[ $name == copepod ]]; then targets+=(--lib); else targets+=(--test "$name"); fi
  done
  (cd "$project" && cargo test --locked --no-run --message-format=json "${extra[@]}" "${targets[@]}") >"$work/cargo.json" || die "the tests don't build"
  # One line for each executable: the target's name ("-" for a program that tests start), a tab, the path.
  python3 - "$work/cargo.json" >"$work/executables" <<'PY'
import json, sys
for line in open(sys.argv[1]):
    message = json.loads(line)
    if message.get("reason") == "compiler-artifact" and message.get("executable"):
        print(message["target"]["name"] if message["profile"]["test"] else "-", message["executable"], sep="\t")
PY
  printf '#!/bin/bash\nexport COPEPOD_TEST_ROOT=1\nfailed=()\n' >"$payload/tests"
  while IFS=$'\t' read -r name executable; do
    # What tests the source tree needs cargo, and has run on the host.
    [[ $name != layering ]] || continue
    carry "$executable"
    strip --strip-debug "$payload/files$executable"
    [[ $name != - ]] || continue
    skip=
    # Half a million verdicts of pure functions: minutes in an emulator, and no kernel has a say in them.
    [[ $name != copepod ]] || skip='--skip seccomp::tests::oracle'
    printf 'echo "     Running %s"; %q %s || failed+=(%q)\n' "$name" "$executable" "$skip" "$name" >>"$payload/tests"
  done <"$work/executables"
  # shellcheck disable=SC2016
  printf '%s\n' '[ ${#failed[@]} = 0 ] || { echo "failed in the virtual machine: ${failed[*]}"; exit 1; }' >>"$payload/tests"
  set -- bash /payload/tests
fi

# What the guest has on its disk for the command: how it runs, and what comes after.
cat >"$payload/run" <<RUN
#!/bin/bash
exec </dev/null >/dev/console 2>&1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LANG=C.UTF-8 RESULTS=/payload/results
$(printf 'export COPEPOD_CACHE=%q OUT=%q COPEPOD_VM=1' "$cache" "$bins")
boots=\$(cat /payload/boots 2>/dev/null || echo 0)
echo \$((boots + 1)) >/payload/boots
export COPEPOD_VM_BOOT=\$boots
$(printf 'cd %q' "$project")
$(printf '%q ' "$@")
code=\$?
# A command that has asked for a reboot is not over, and has one left if it was granted.
if [[ \$(systemctl is-system-running 2>/dev/null) == stopping && \$boots -lt $reboots ]]; then exit; fi
echo \$code >/payload/exit-code
cd /
sync
/bin/busybox poweroff -f
sleep 60
RUN
cat >"$payload/command.service" <<'UNIT'
[Unit]
Description=The command of hack/vm.sh
After=multi-user.target dbus.service apparmor.service
Wants=dbus.service
[Service]
ExecStart=/payload/run
# Not what a service gets: what a login has.
Delegate=yes
KillMode=process
LimitNOFILE=524288
TasksMax=infinity
OOMPolicy=continue
TimeoutStopSec=5
UNIT

# The guest's first process: puts things where the host has them, and goes on to systemd, or runs the command itself.
{
  cat <<'INIT'
#!/bin/bash
exec <>/dev/console 1>&0 2>&1
stty -onlcr </dev/console
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t securityfs securityfs /sys/kernel/security
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev tmpfs /dev/shm
mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs /run
# /tmp stays on the disk: the tmpfs of old kernels has no user extended attributes.
# Whose device node is there only when it is loaded.
modprobe fuse
mount --make-rshared /
mkdir -p /run/lock /run/netns /etc/cni/net.d
ln -sf /proc/self/fd /dev/fd
echo guest >/proc/sys/kernel/hostname
INIT
  # Each carried tree is bound at its own path: the shallowest directories that the guest's own tree lacks.
  (cd "$payload/files" && find . -mindepth 1 -type d -print | sed 's/^.//' | sort) | while read -r directory; do
    [[ -z ${bound:-} || $directory != "$bound"/* ]] || continue
    case $directory in
      "$project" | "$bins" | "$cache"/*) ;;
      *) compgen -G "$payload/files$directory/*" >/dev/null && ! find "$payload/files$directory" -maxdepth 1 -type f | grep -q . && continue ;;
    esac
    bound=$directory
    printf 'mkdir -p %q && mount --bind %q %q\n' "$directory" "/payload/files$directory" "$directory"
  done
  if [[ -n $systemd ]]; then
    cat <<'INIT'
units=/run/systemd/system
mkdir -p $units/default.target.wants
ln -s /lib/systemd/system/multi-user.target $units/default.target
cp /payload/command.service $units/
ln -s ../command.service $units/default.target.wants/
# Nobody logs in, the console is the command's, and what tidies a disk now and then has no time to.
for unit in getty.target serial-getty@.service console-getty.service systemd-logind.service e2scrub_reap.service \
  systemd-update-utmp.service systemd-random-seed.service tmp.mount \
  apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer systemd-tmpfiles-clean.timer; do
  ln -sf /dev/null $units/$unit
done
exec /lib/systemd/systemd
INIT
  else
    cat <<'INIT'
mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
# As systemd does: the controllers that a node delegates.
echo "+cpu +cpuset +io +memory +pids" >/sys/fs/cgroup/cgroup.subtree_control
ip link set lo up
/payload/run
INIT
  fi
} >"$payload/init"
chmod 755 "$payload/init" "$payload/run"
mke2fs -q -F -t ext4 -O '^has_journal' -d "$payload" "$work/payload.ext4" $(($(du -sm "$payload" | cut -f1) + 4096))M >/dev/null 2>&1
rm -rf "$payload"

say "booting $(uname -m) with ${accel%%,*}, $cpus cpus, $memory MiB"
# An emulator on a busy host fails the kernel's check of its timer: no_timer_check.
code=0
once=(-no-reboot)
[[ $reboots -eq 0 ]] || once=()
# mke2fs made sparse files; snapshot=on keeps the guest's writes to the cached root in an unlinked temporary file.
TMPDIR=$work timeout --foreground --kill-after=10 "$timeout" "$qemu" -M "$machine" -accel "$accel" -cpu "$cpu" -smp "$cpus" -m "$memory" \
  -nodefaults -display none -serial stdio "${once[@]}" \
  -kernel "$guest/kernel" -initrd "$guest/initrd" \
  -append "console=$console quiet loglevel=3 panic=-1 mitigations=off no_timer_check random.trust_cpu=on cgroup_no_v1=all systemd.show_status=false" \
  -drive "file=$guest/root.ext4,if=virtio,format=raw,snapshot=on,cache=unsafe" \
  -drive "file=$work/payload.ext4,if=virtio,format=raw,cache=unsafe" </dev/null || code=$?
[[ $code -ne 124 && $code -ne 137 ]] || die "ended after $timeout s: the command had not finished"
[[ $code -eq 0 ]] || die "qemu failed with $code"

# debugfs reads the file system without mounting it.
if [[ -n $results ]]; then
  mkdir -p "$results"
  debugfs -R "rdump /results $work" "$work/payload.ext4" >/dev/null 2>&1
  cp -r "$work/results/." "$results/"
fi
code=$(debugfs -R 'cat /exit-code' "$work/payload.ext4" 2>/dev/null)
[[ $code =~ ^[0-9]+$ ]] || die "the guest ended before the command did"
exit "$code"
