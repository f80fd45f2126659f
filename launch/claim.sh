#!/usr/bin/env bash
# The paper's claim at small size: few images, many prompts. Fine-tuning on 2,000 images to its best, then reinforcement learning on prompts
# alone, or more fine-tuning on the same images, or the best of N; three seeds, 256 held-out signs of each length.   bash launch/claim.sh [OUT]
# About an hour and a half on two cores; every part resumes. Result: OUT/claim.json and a report of each evaluation in OUT/effect_*.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" != -h ] && [ "${1:-}" != --help ] || { sed -n '2,4s/^# //p' "$0"; exit 0; }
out=${1:-runs/claim}
. launch/environment.sh
environment rewards
keep_memory
. launch/services.sh
mkdir -p "$out"
start_services "$out"

for seed in 0 1 2; do
  sft="$out/sft_$seed" more="$out/more_$seed" grpo="$out/grpo_$seed"
  [ -d "$sft/model" ] || xomni train --config=configs/tiny/finite.py --config.seed="$seed" --config.run_dir="$sft"
  [ -d "$grpo/model" ] || xomni train --config=configs/tiny/finite_grpo.py --config.seed="$seed" --config.run_dir="$grpo" \
    --config.init_from="$sft/best" --config.rewards.ocr.urls="('$url_ocr',)" --config.rewards.shapes.urls="('$url_shapes',)"
  [ -d "$more/model" ] || xomni train --config=configs/tiny/finite.py --config.seed="$seed" --config.run_dir="$more" --config.init_from="$sft/best"
  for kind in "short 32x64 3-6" "long 32x128 12-16"; do
    read -r name size lengths <<< "$kind"
    for method in grpo more; do
      model="$out/${method}_$seed/model" run="$out/effect_${method}_${name}_$seed"
      [ "$method" = grpo ] || model="$out/more_$seed/best"
      # The start's images are drawn once and serve both comparisons.
      [ "$method" = grpo ] || [ -d "$run/cells" ] || { mkdir -p "$run" && cp -r "$out/effect_grpo_${name}_$seed/cells" "$run/"; }
      [ -f "$run/report.json" ] || xomni eval effect --sft "$sft/best" --rl "$model" --rl-run "$grpo" --size "$size" --lengths "$lengths" \
        --prompts 256 --seed "$seed" --rl-samples 4 --sweep-samples 1 --temperatures 1,0 --guidance 1 \
        --ocr "$url_ocr" --shapes "$url_shapes" "${second[@]}" --out "$run"
    done
  done
done
python -m launch.claim "$out"
