#!/usr/bin/env bash
# Everything that wants a GPU, in under nine minutes: builds the native kernels, runs the GPU tests
# and the benchmarks, and writes a summary.
#
#   benchmarks/gpu/run.sh OUT [--wheels DIR] [--seconds 530] [--dry-run]
#
# OUT gets summary.md, report.md, report.png, memory.txt, results.tar.gz (one JSON file per benchmark)
# and log.txt with what the stages printed. Nothing is installed outside a temporary folder, and
# nothing is fetched: packages that the machine lacks are taken from the wheels in DIR. PYTHON names
# the interpreter (default: python3; 3.11 or newer), with torch, triton, pytest, pytest-benchmark, setuptools, pybind11 and ninja.
# --dry-run goes through the same stages on a CPU, with the installed mima and few benchmarks.
set -euo pipefail

usage() { sed -n '5,5p' "$0" | cut -c5-; }
out='' wheels='' budget=530 dry=''
while (($#)); do
  case $1 in
    --wheels) wheels=$(realpath "$2") && shift ;;
    --seconds) budget=$2 && shift ;;
    --dry-run) dry=1 ;;
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
trap 'rm -rf "$work"' EXIT
mkdir "$work/site" "$work/json"

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
}

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

# shellcheck disable=SC2329
install() {
  if [[ -n $wheels ]]; then
    "$python" -m pip install --no-index --no-deps --no-compile --quiet \
      --target "$work/site" "$wheels"/*.whl
  fi
  if [[ -n $dry ]]; then return; fi
  local arch
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  # --target of a folder that has packages already would warn and leave them
  MIMA_BUILD_NATIVE=1 MIMA_BUILD_CUDA=1 MIMA_CUDA_ARCHS=$arch "$python" -m pip install \
    --no-index --no-deps --no-build-isolation --no-compile --quiet --target "$work/mima" .
  cp -r "$work"/mima/* "$work/site/"
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
  local few=(--devices cuda)
  if [[ -n $dry ]]; then few=(--concepts 1 2 --engines two-pass); fi
  env -u PYTHONSAFEPATH "$python" benchmarks/memory.py "${few[@]}" | tee "$out/memory.txt"
}

export -f describe install gpu_tests memory
export python wheels work dry out

stage install 120 bash -ec install
stage machine 60 bash -ec describe
stage tests 150 bash -ec gpu_tests
if [[ -n $dry ]]; then
  export MIMA_BENCH_DEVICE=cpu MIMA_BENCH_COMPILE=0
  benchmark merge_lora 120 -k "forward-320x768-r4 and (native or eager)"
  stage memory 120 bash -ec memory
else
  export MIMA_BENCH_DEVICE=cuda
  # the most important first
  benchmark weighted_merge 60
  benchmark projected_merge 60
  benchmark batched_lora 120
  benchmark step 120
  stage memory 120 bash -ec memory
  benchmark merge_lora 40
  benchmark sampling 60
fi

shopt -s nullglob
results=()
for file in "$work"/json/*.json; do
  # pytest-benchmark creates the file before the first result
  if [[ -s $file ]]; then results+=("$file"); fi
done
if ((${#results[@]})); then
  tar -czf "$out/results.tar.gz" -C "$work/json" .
  env -u PYTHONSAFEPATH "$python" -m benchmarks.report "${results[@]}" --output "$out" >/dev/null ||
    failed=1
else
  failed=1
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
cat "$out/summary.md"
exit "$failed"
