#!/bin/sh
# The C core and tests/kernels/kernels_main.c as one program, for any compiler and processor:
#
#     tools/check/build_kernels_main.sh COMPILER MACHINE PROGRAM [FLAG...]
#     tools/check/build_kernels_main.sh gcc x86_64 /tmp/kernels_main
#     tools/check/build_kernels_main.sh aarch64-linux-gnu-gcc aarch64 /tmp/kernels_main -static
#     tools/check/build_kernels_main.sh clang x86_64 /tmp/kernels_main -g -fsanitize=address,undefined
#
# Sources and flags are those of csrc/build.py; FLAGs come after.  $PYTHON (python3) needs cffi.
set -eu
[ $# -ge 3 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
compiler=$1 machine=$2 program=$3
shift 3
cd "$(dirname "$0")/../.."
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT

"${PYTHON:-python3}" csrc/build.py "$machine" >"$objects/list"
while read -r source flags; do
    # shellcheck disable=SC2086 # $flags is a list of words
    $compiler $flags "$@" -Icsrc -c "$source" -o "$objects/$(basename "$source" .c).o"
done <"$objects/list"
$compiler -std=c11 -O2 -Wall -Wextra "$@" -Icsrc tests/kernels/kernels_main.c "$objects"/*.o \
    -o "$program" -pthread -lm
