#!/bin/sh
# tests/kernels, and twice $FUZZ_SECONDS (20) of models that mean harm, against a build of the C core
# with AddressSanitizer and UndefinedBehaviorSanitizer, made in a temporary folder.  Then, where there
# is clang, kernels_main.c with clang's.  Arguments go to pytest.  Three minutes.
#
# Needs gcc and $PYTHON (python3) with numpy, cffi, setuptools, pytest and hypothesis.
set -eu
PYTHON=$(command -v "${PYTHON:-python3}")
export PYTHON
cd "$(dirname "$0")/../.."
source=$PWD
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

sanitize="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
debug="-g -fno-omit-frame-pointer"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

# setup.py writes next to itself (*.egg-info), hence a copy.
mkdir "$build/source"
cp -R setup.py pyproject.toml README.md csrc pyengine "$build/source/"
find "$build/source/pyengine" -name '_core*' -exec rm {} +
cd "$build/source"
CC=gcc CFLAGS="$sanitize $debug" LDFLAGS="$sanitize" \
    "$PYTHON" setup.py -q build --build-base "$build/base" >"$build/log" 2>&1 ||
    { cat "$build/log" >&2; exit 1; }
package=$(dirname "$(ls -d "$build"/base/lib*/pyengine)")

# From a folder without a pyengine, so that Python finds the sanitized one.
# test_expected_build_is_loaded asserts that it did.
cd "$build"
echo "gcc: tests/kernels"
LD_PRELOAD=$(gcc -print-file-name=libasan.so) PYTHONPATH=$package \
    PYENGINE_SANITIZED_BUILD=$build/base PYTHONDONTWRITEBYTECODE=1 \
    "$PYTHON" -m pytest -p no:cacheprovider -q -m "not slow" "$@" "$source/tests/kernels"

for target in model blocks; do
    echo "gcc: tools/check/fuzz_files.py $target"
    LD_PRELOAD=$(gcc -print-file-name=libasan.so) PYTHONPATH=$package \
        PYENGINE_SANITIZED_BUILD=$build/base PYTHONDONTWRITEBYTECODE=1 \
        "$PYTHON" "$source/tools/check/fuzz_files.py" "$target" --seconds "${FUZZ_SECONDS:-20}" \
        --findings "$build/findings"
done

command -v clang >/dev/null || { echo "no clang: kernels_main.c left out"; exit 0; }
echo "clang: tests/kernels/kernels_main.c"
# $sanitize and $debug are lists of words
# shellcheck disable=SC2086
"$source/tools/check/build_kernels_main.sh" clang "$(uname -m)" "$build/main" $sanitize $debug -O1
"$build/main" >"$build/main.txt" || { tail -n 20 "$build/main.txt"; exit 1; }
echo "equal on every level: $(awk '{print $1}' "$build/main.txt" | wc -l) lines"
