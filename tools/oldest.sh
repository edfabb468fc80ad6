#!/usr/bin/env bash
# Runs the tests with the oldest versions of everything that pyproject.toml allows, in a throw-away
# environment: tools/oldest.sh [arguments for pytest]. Needs uv, a network and 12 GB of disk.
# PYTHON names the interpreter (default: 3.10, which uv fetches where it is not installed).
set -euo pipefail

cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# with pip, which the tests of packaging use
uv venv --quiet --seed --python "${PYTHON:-3.10}" "$work/venv"
# upgrade: what the environment came with is no reason to keep it
uv pip install --quiet --python "$work/venv/bin/python" --upgrade --resolution lowest-direct \
  '.[test]'
"$work/venv/bin/mima" doctor
"$work/venv/bin/pytest" "$@"
