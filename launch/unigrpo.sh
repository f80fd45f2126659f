#!/usr/bin/env bash
# UniGRPO on short signs against either of its parts alone, at equal steps and prompts.   bash launch/unigrpo.sh [OUT] [SEEDS]
# OUT (default runs/unigrpo) gets the runs; SEEDS (default "0 1 2"). About a quarter of an hour on two idle cores; every part resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" != -h ] && [ "${1:-}" != --help ] || { sed -n '2,3s/^# //p' "$0"; exit 0; }
out=${1:-runs/unigrpo} seeds=${2:-0 1 2}
. launch/environment.sh
environment rewards
keep_memory
. launch/services.sh
mkdir -p "$out"
start_services "$out"

run() {  # SEED NAME LEARN
  [ -d "$out/$2_$1/model" ] || xomni train --config=configs/methods/unigrpo.py --config.seed="$1" --config.learn="$3" \
    --config.run_dir="$out/$2_$1" --config.rewards.ocr.urls="('$url_ocr',)" --config.rewards.shapes.urls="('$url_shapes',)"
}
for seed in $seeds; do
  run "$seed" both "('transformer', 'mmdit')"
  run "$seed" transformer "('transformer',)"
  run "$seed" mmdit "('mmdit',)"
done
python -m launch.unigrpo "$out" configs/methods/unigrpo.json
