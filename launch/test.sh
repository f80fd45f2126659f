#!/usr/bin/env bash
# Sets up what the tests need and runs them.   bash launch/test.sh [--fast] [--parity] [--python PYTHON] [pytest arguments]
#   --fast     leaves out what is marked slow (whole runs, compilations for slices, services): two minutes on two cores
#   --parity   also compares live with torch, transformers and diffusers (installs them)
#   --python   use another interpreter, such as python3.12
set -euo pipefail
cd "$(dirname "$0")/.."
extra=test python="" fast=""
while [ $# -gt 0 ]; do
  case $1 in
    --fast) fast=yes; shift ;;
    --parity) extra=parity; shift ;;
    --python) python=$2; shift 2 ;;
    -h|--help) sed -n '2,5s/^# //p' "$0"; exit 0 ;;
    *) break ;;
  esac
done
. launch/environment.sh
environment "$extra" "$python"
marker="not parity"
[ "$extra" = parity ] && marker=""
[ -z "$fast" ] || marker="${marker:+$marker and }not slow"
bash launch/tesseract_data.sh || echo "the tests of the second reader are left out"
export OMP_NUM_THREADS=1 JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.pytest_cache/xla} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
exec python -m pytest -c .pytest.ini -n 2 --dist loadfile --no-loadscope-reorder -m "$marker" "$@"
