#!/usr/bin/env bash
# Runs the tests with the oldest versions of everything that pyproject.toml allows:
#
#     tools/oldest.sh [arguments for pytest]
#
# PYTHON names the interpreter (default: 3.10, which uv fetches where it is not installed), VENV a
# folder for the environment that stays there and is used again (default: one that is thrown away).
# Needs a network and 12 GB of disk; uv, where it is not installed, comes into the environment.
set -euo pipefail

cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=$(realpath -m "${VENV:-$work/venv}")

# two torch processes that spin on the same cores slow each other several times over
export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 HF_HUB_OFFLINE=1
unset PYTHONPATH MIMA_BACKEND
# whatever no kernel serves is a failure
export MIMA_STRICT="${MIMA_STRICT:-1}"

# a copy: what changes while the tests run is not tested with what is installed
mkdir "$work/src"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
  if [[ -e $file ]]; then printf '%s\0' "$file"; fi
done | xargs -0 cp --parents -t "$work/src"
cd "$work/src"

if ! command -v uv >/dev/null; then
  python3 -m venv "$work/uv"
  "$work/uv/bin/pip" install -q uv
  PATH=$work/uv/bin:$PATH
fi
# with pip, which the tests of packaging use
[[ -e $venv/bin/python ]] || uv venv --quiet --seed --python "${PYTHON:-3.10}" "$venv"
# what the environment came with, and what it was left with, is no reason to keep it
uv pip install --quiet --python "$venv/bin/python" --upgrade --reinstall-package mima \
  --resolution lowest-direct '.[test]'
uv pip check --python "$venv/bin/python"
"$venv/bin/mima" doctor
"$venv/bin/pytest" "$@"
