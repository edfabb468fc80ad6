#!/usr/bin/env bash
# Everything that wants a GPU, in under nine minutes: builds the native kernels, runs the GPU tests
# and the benchmarks, and writes a summary.
#
#   benchmarks/gpu/run.sh OUT [--wheels DIR] [--seconds 530] [--dry-run]
#   benchmarks/gpu/run.sh --list-wheels
#
# OUT gets summary.md, report.md, report.png, memory.txt, results.tar.gz (one JSON file per benchmark)
# and log.txt with what the stages printed, all of it anew after each stage: whatever ends the run,
# what was measured until then is there. A stage that fails, or is cut off, costs only itself.
#
# Nothing is installed outside a temporary folder, and nothing is fetched: packages that the machine
# lacks are taken from the wheels in DIR, each by itself: one that does not fit is named in the
# summary. --list-wheels, where mima runs, prints those to carry: mima's dependencies, but for torch,
# triton and what comes with them. Where the GPU machine has another Python, say which, as in
#
#   benchmarks/gpu/run.sh --list-wheels | xargs pip download --no-deps -d DIR \
#     --only-binary :all: --python-version 3.12
#
# PYTHON names the interpreter (default: python3; 3.11 or newer), with torch and triton. Without
# setuptools, pybind11 or ninja there is no native code, without nvcc none for the GPU. Without a C
# compiler or Python's headers Triton can launch nothing either: `mima doctor`, in log.txt, says so,
# and the stages fail.
#
# --dry-run goes through the same stages on a CPU, with the installed mima and few benchmarks.
set -euo pipefail

usage() { sed -n '5,6p' "$0" | cut -c5-; }

# the installed dependencies of mima and of its tests, and theirs
list_wheels() {
  "${PYTHON:-python3}" - <<'PYTHON'
import re
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

# a machine for torch has these, and no browser is needed
THERE = re.compile(
    r"mima|torch|torchvision|triton|nvidia-.*|cuda-.*|numpy|sympy|mpmath|networkx|jinja2|markupsafe"
    r"|playwright|greenlet"
)
todo, found = [("mima", extra) for extra in ("", "test", "bench")], {}
while todo:
    name, extra = todo.pop()
    try:
        package = distribution(name)
    except PackageNotFoundError:  # of an extra that is not installed here
        continue
    for line in package.requires or ():
        need = Requirement(line)
        key = re.sub(r"[-_.]+", "-", need.name).lower()
        if need.marker and not need.marker.evaluate({"extra": extra}) or THERE.fullmatch(key):
            continue
        if key not in found:
            found[key] = None
            todo += [(key, ""), *((key, more) for more in need.extras)]
for name in sorted(found):
    try:
        print(f"{name}=={distribution(name).version}")
    except PackageNotFoundError:
        continue
PYTHON
}
out='' wheels='' budget=530 dry=''
while (($#)); do
  case $1 in
    --wheels) wheels=$(realpath "$2") && shift ;;
    --seconds) budget=$2 && shift ;;
    --dry-run) dry=1 ;;
    --list-wheels) list_wheels && exit ;;
    -*) usage >&2 && exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
[[ -n $out ]] || { usage >&2 && exit 2; }

mkdir -p "$out"
out=$(realpath "$out")
: >"$out/log.txt"
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
work=$(mktemp -d)
mkdir "$work/site" "$work/json"
touch "$work/stages"
shopt -s nullglob

export PYTHONPATH="$work/site" PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 MIMA_STRICT=1
export TRITON_CACHE_DIR="$work/triton" TORCHINDUCTOR_CACHE_DIR="$work/inductor"
failed=0

# stage NAME SECONDS COMMAND...: at most so long, and no longer than what is left of the budget
stage() {
  local name=$1 limit=$2 status=0 started=$SECONDS
  shift 2
  ((limit <= budget - SECONDS)) || limit=$((budget - SECONDS))
  if ((limit < 5)); then
    echo "| $name | not started, no time was left | |" >>"$work/stages"
    failed=1
    summarise
    return
  fi
  printf '\n=== %s\n' "$name" >>"$out/log.txt"
  # an interrupt lets pytest-benchmark write what it has measured so far
  timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$out/log.txt" 2>&1 || status=$?
  local verdict=ok
  case $status in
    0) ;;
    124 | 137) verdict="cut off after $limit s" && failed=1 ;;
    *) verdict="failed with $status" && failed=1 ;;
  esac
  echo "| $name | $verdict | $((SECONDS - started)) |" | tee -a "$work/stages"
  summarise
}

# everything that there is so far, in OUT
summarise() {
  local file results=()
  for file in "$work"/json/*.json; do
    # pytest-benchmark creates the file before the first result
    if [[ -s $file ]]; then results+=("$file"); fi
  done
  if ((${#results[@]})); then
    tar -czf "$out/results.tar.gz" -C "$work/json" .
    env -u PYTHONSAFEPATH "$python" -m benchmarks.report "${results[@]}" --output "$out" \
      >/dev/null 2>>"$out/log.txt" || echo "no report" >>"$out/log.txt"
  fi
  {
    echo "# GPU run"
    echo
    date -u +"%Y-%m-%d %H:%M UTC, $SECONDS s in all"
    echo
    echo "| stage | result | seconds |"
    echo "| --- | --- | --- |"
    cat "$work/stages"
    echo
    if [[ -s $work/installed ]]; then cat "$work/installed" && echo; fi
    if [[ -s $work/left_out ]]; then sed 's/^/- /' "$work/left_out" && echo; fi
    grep -E '^(FAILED|ERROR)|[0-9]+ (passed|failed|errors?|tests collected)' "$out/log.txt" |
      sed 's/^/    /' || true # nothing to say where nothing has run
    echo
    if [[ -s $out/memory.txt ]]; then
      echo "Peak memory of an outer step:"
      echo
      sed 's/^/    /' "$out/memory.txt"
      echo
    fi
    if [[ -f $out/report.md ]]; then sed -n '/^Targets/,/^|/{/^|/!p}' "$out/report.md"; fi
  } >"$out/summary.md"
}

# shellcheck disable=SC2329
finish() {
  summarise
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 1' INT TERM

# shellcheck disable=SC2329
describe() {
  nvidia-smi 2>/dev/null || echo "no nvidia-smi"
  "$python" - <<'PYTHON'
import platform
import torch, triton, diffusers, transformers, peft

print("python", platform.python_version())
for module in (torch, triton, diffusers, transformers, peft):
    print(module.__name__, module.__version__)
print("cuda", torch.version.cuda, torch.cuda.get_device_name() if torch.cuda.is_available() else "")
PYTHON
  "$python" -m mima doctor
}

# What cannot be installed costs only itself, and what takes too long what comes after it: mima is
# copied first, as setup.py would lay it out, without what another machine may have built; then come
# the wheels, and its native code, if it can be built.
# shellcheck disable=SC2329
install() {
  if [[ -z $dry ]]; then
    mkdir "$work/copy"
    cp -r mima "$work/copy/mima" && cp -r kernels/triton "$work/copy/mima/kernels"
    rm -f "$work/copy/mima"/{_native*,_build_info.json}
    cp -r "$work/copy/mima" "$work/site/"
    echo "mima was copied, not installed: see log.txt. It has no native code." >"$work/installed"
  fi
  if [[ -n $wheels ]]; then
    # all at once where all fit, which takes a few seconds
    unpack "$wheels"/*.whl || for wheel in "$wheels"/*.whl; do
      unpack "$wheel" ||
        echo "$(basename "$wheel") could not be installed: see log.txt." >>"$work/left_out"
    done
  fi
  if [[ -n $dry ]]; then return; fi
  local arch
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  # each half by itself, the CPU's where there is no nvcc
  if MIMA_BUILD_NATIVE=auto MIMA_BUILD_CUDA=auto MIMA_CUDA_ARCHS=$arch build; then
    cp -r "$work"/mima/* "$work/site/"
    echo "mima was installed." >"$work/installed"
    local module
    for module in _native _native_cuda; do
      compgen -G "$work/mima/mima/$module.*" >/dev/null ||
        echo "- mima.$module could not be built: see log.txt." >>"$work/installed"
    done
  fi
}

# shellcheck disable=SC2329
unpack() {
  rm -rf "$work/unpacked"
  "$python" -m pip install --no-index --no-deps --no-compile --quiet \
    --target "$work/unpacked" "$@" && cp -r "$work/unpacked/." "$work/site/"
}

# --target of a folder that has packages already would warn and leave them; without --verbose pip
# would keep to itself what a compiler says that fails
# shellcheck disable=SC2329
build() {
  rm -rf "$work/mima"
  "$python" -m pip install --no-index --no-deps --no-build-isolation --no-compile --verbose \
    --target "$work/mima" . >&2
}

# workers compile Triton kernels side by side
# shellcheck disable=SC2329
gpu_tests() {
  local workers=()
  if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
  local selected=(-m "cuda and not slow")
  if [[ -n $dry ]]; then selected=(-m cuda --collect-only); fi
  "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" "${selected[@]}" \
    --durations=10 tests/ops tests/native
}

# benchmark NAME SECONDS [-k EXPRESSION]: leaves a JSON file, if only of those that were finished
benchmark() {
  local name=$1 limit=$2
  shift 2
  stage "benchmark_$name" "$limit" "$python" -m pytest -q -p no:cacheprovider --tb=short \
    "benchmarks/test_$name.py" --benchmark-json="$work/json/$name.json" "$@"
}

# peak memory for 1 to 16 concepts, each in a fresh process
# shellcheck disable=SC2329
memory() {
  set -o pipefail # of this shell, too: tee does not fail where memory.py does
  local few=(--devices cuda)
  if [[ -n $dry ]]; then few=(--concepts 1 2 --engines two-pass); fi
  env -u PYTHONSAFEPATH "$python" benchmarks/memory.py "${few[@]}" | tee "$out/memory.txt"
}

export -f describe install unpack build gpu_tests memory
export python wheels work dry out

stage install 120 bash -ec install
stage machine 40 bash -ec describe
# the most important first: values, a whole step, then operators
stage tests 200 bash -ec gpu_tests
if [[ -n $dry ]]; then
  export MIMA_BENCH_DEVICE=cpu MIMA_BENCH_COMPILE=0
  benchmark merge_lora 120 -k "forward-320x768-r4 and (native or eager)"
  stage memory 120 bash -ec memory
else
  export MIMA_BENCH_DEVICE=cuda
  benchmark step 120
  benchmark batched_lora 100
  benchmark adam_step 40
  benchmark weighted_merge 45
  benchmark projected_merge 45
  benchmark merge_lora 40
  stage memory 100 bash -ec memory
  benchmark sampling 60
fi

if [[ ! -s $out/report.md ]]; then failed=1; fi
summarise
cat "$out/summary.md"
exit "$failed"
