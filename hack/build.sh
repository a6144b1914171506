#!/usr/bin/env bash
# hack/build.sh: builds Copepod's three programs. They need different profiles, so this is the one way to build them.
#
#   hack/build.sh            copepod (release), copepod-monitor and copepod-oci (static, small)
#   hack/build.sh --debug    all three unoptimised, for a debugger
#
# Needs Rust (rustup.rs; rust-toolchain of Cargo.toml's rust-version or newer) and a C compiler. Honours CARGO_TARGET_DIR.
# Leaves copepod, copepod-monitor and copepod-oci in $OUT (default: bin/ in cargo's target directory).

set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
help_if_asked "$@"

need_cargo
cd "$project"
target_dir=${CARGO_TARGET_DIR:-target}

case ${1:-} in
  '')
    target=$(rustc -vV | sed -n 's/^host: //p')
    cargo build --locked --release --bin copepod
    # Static and not relocatable: a relocatable program pays for its relocated pages once per process, so once per pod.
    export RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=static'
    cargo build --locked --profile monitor --target "$target" --no-default-features --bin copepod-monitor
    cargo build --locked --profile monitor --target "$target" --no-default-features --features spec --bin copepod-oci
    built=("$target_dir/release/copepod" "$target_dir/$target/monitor/copepod-monitor" "$target_dir/$target/monitor/copepod-oci")
    ;;
  --debug)
    cargo build --locked --bins
    built=("$target_dir/debug/copepod" "$target_dir/debug/copepod-monitor" "$target_dir/debug/copepod-oci")
    ;;
  *) die "no such option: $1 (see --help)" ;;
esac
mkdir -p "$bins"
install "${built[@]}" "$bins/"
say "built $(cd "$bins" && du -h copepod copepod-monitor copepod-oci | awk '{ printf "%s%s (%s)", (NR > 1 ? ", " : ""), $2, $1 }') in $bins"
