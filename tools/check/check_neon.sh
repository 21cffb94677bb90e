#!/bin/sh
# The C core on an emulated 64-bit ARM: every operation, every level, bits equal to the scalar
# level's; and the scalar results there equal those of this machine.  About a minute.
#
# Needs aarch64-linux-gnu-gcc, qemu-aarch64-static and $PYTHON (python3) with cffi.
set -eu
cd "$(dirname "$0")/../.."
programs=$(mktemp -d)
trap 'rm -rf "$programs"' EXIT

tools/check/build_kernels_main.sh "${CROSS_CC:-aarch64-linux-gnu-gcc}" aarch64 "$programs/arm" -static
tools/check/build_kernels_main.sh "${CC:-cc}" "$(uname -m)" "$programs/here"

# Each status is tested: a pipe would hide it.
"$programs/here" >"$programs/here.txt" || { cat "$programs/here.txt"; exit 1; }
"${QEMU:-qemu-aarch64-static}" -cpu max "$programs/arm" >"$programs/arm.txt" ||
    { cat "$programs/arm.txt"; exit 1; }
cat "$programs/arm.txt"

# "operation level N cases HASH equal" -> the operation and its hash, which must be one on both.
hashes() { sed -n 's/^\(.\{21\}\) scalar .* cases  \([0-9a-f]*\)  equal$/\1 \2/p' "$1"; }
hashes "$programs/here.txt" >"$programs/here.hashes"
hashes "$programs/arm.txt" >"$programs/arm.hashes"
[ -s "$programs/arm.hashes" ] || { echo "check_neon: no results" >&2; exit 1; }
diff "$programs/here.hashes" "$programs/arm.hashes" ||
    { echo "check_neon: the scalar level differs between $(uname -m) (<) and aarch64 (>)" >&2; exit 1; }
echo "check_neon: levels equal; scalar equal to $(uname -m)'s"
