#!/usr/bin/env bash
# Digits drawn in the order of spanning trees against row by row, in plain generation and in-painting.   bash launch/star.sh [OUT] [DATA]
# OUT (default runs/star) gets the runs; DATA (default data/mnist28) is made where it is not there. Every part resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" != -h ] && [ "${1:-}" != --help ] || { sed -n '2,3s/^# //p' "$0"; exit 0; }
out=${1:-runs/star} data=${2:-data/mnist28}
. launch/environment.sh
environment rewards
keep_memory
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
. launch/services.sh
mkdir -p "$out"
[ -d "$data" ] || xomni data make mnist --size 28 --out "$data"
[ -d "$out/vq/model" ] || xomni train --config=configs/methods/llamagen_vq.py --config.run_dir="$out/vq" \
  --config.data.path="$data/train" --config.validation.data.path="$data/heldout"
for part in train heldout; do  # a folder that is complete is left as it is
  xomni data tokenize --config=configs/methods/star.py --out="$out/codes/$part" --config.init_from="$out/vq/model" --config.data.path="$data/$part"
done
for order in spanning_tree raster; do
  [ -d "$out/$order/model" ] || xomni train --config=configs/methods/star.py --config.run_dir="$out/$order" --config.transformer.order=$order \
    --config.init_from="$out/vq/model" --config.data.source=codes --config.data.path="$out/codes/train" \
    --config.validation.data.path="$out/codes/heldout"
done
python -m launch.star "$out" "$data" configs/methods/star.json
