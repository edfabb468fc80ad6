#!/usr/bin/env bash
# Runs the tests of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a
# throw-away copy of the package: csrc/sanitize.sh [arguments for pytest].
# PYTHON names the interpreter (default: python), which needs torch, pytest, pybind11 and ninja.
# SANITIZED names a folder for the module that stays there; one that is there already is used, and
# --build alone makes it, for which no torch is needed.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
compiler=${CXX:-g++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$root"
export CXX=$compiler MIMA_BUILD_NATIVE=1 MIMA_BUILD_CUDA=0
# -O1 keeps the stack traces; a finding ends the process, and a warning the build
flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1 -Werror"
lib=${SANITIZED:-$work/lib}
if [[ ! -e $lib ]]; then
  CXXFLAGS=$flags LDFLAGS=$flags "$python" setup.py -q build_ext -b "$lib" -t "$work/temp"
fi
if [[ ${1:-} == --build ]]; then exit; fi

# the package as it is, with the module of the sanitizers in place of the installed one
cp -r mima "$work/package-mima"
rm -f "$work"/package-mima/_native*.so "$work/package-mima/_build_info.json"
mkdir "$work/site"
mv "$work/package-mima" "$work/site/mima"
cp "$lib"/mima/* "$work/site/mima/"
cp -r kernels/triton "$work/site/mima/kernels"

# The interpreter is not instrumented: the runtime must be there first, torch's and Python's own
# leaks are not ours, and the pool's threads outlive the process on purpose.
asan=$("$compiler" -print-file-name=libasan.so)
ubsan=$("$compiler" -print-file-name=libubsan.so)
export LD_PRELOAD="$asan $ubsan"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$work/site" PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
if [ $# -eq 0 ]; then
  set -- tests/native/test_cpu_values.py tests/native/test_cpu_threads.py tests/native/test_dispatch.py
fi
"$python" - <<'CHECK'
import mima, mima._native, os
assert mima._native.__file__.startswith(os.environ["PYTHONPATH"]), mima._native.__file__
CHECK
# in one process, whose end is seen
"$python" -m pytest -q -p no:xdist -p no:cacheprovider "$@"
