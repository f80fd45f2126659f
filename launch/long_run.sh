#!/usr/bin/env bash
# The long documented run: signs of 12 to 16 characters, three training seeds, three sampling seeds, 256 held-out prompts, and a control that
# spends the same time on more supervised fine-tuning.   bash launch/long_run.sh [OUT]     About an hour and a half on two cores; every part resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" != -h ] && [ "${1:-}" != --help ] || { sed -n '2,3s/^# //p' "$0"; exit 0; }
out=${1:-runs/long}
. launch/environment.sh
environment rewards
keep_memory
. launch/services.sh
sft=xomni_jax/assets/tiny_sft
mkdir -p "$out"
start_services "$out"

grpo() {  # SEED
  [ -d "$out/grpo_$1/model" ] || xomni train --config=configs/tiny/grpo.py --config.init_from="$sft" --config.seed="$1" \
    --config.run_dir="$out/grpo_$1" --config.rewards.ocr.urls="('$url_ocr',)" --config.rewards.shapes.urls="('$url_shapes',)"
}
grpo 0

# The control: as many seconds of fine-tuning as the first GRPO run took, at the speed its own first steps show.
if [ ! -d "$out/control/model" ]; then
  xomni train --config=configs/tiny/control.py --config.init_from="$sft" --config.run_dir="$out/control_speed" --config.steps=30
  steps=$(python -m launch.long_run steps "$out/grpo_0" "$out/control_speed")
  xomni train --config=configs/tiny/control.py --config.init_from="$sft" --config.run_dir="$out/control" --config.steps="$steps"
fi
grpo 1
grpo 2

effect() {  # RL_MODEL RUN NAME SEED
  # SFT's images depend on the sampling seed alone: drawn for the first policy, taken over for the others.
  [ -d "$out/$3/cells" ] || [ ! -d "$out/effect_0_$4/cells" ] || { mkdir -p "$out/$3" && cp -r "$out/effect_0_$4/cells" "$out/$3/"; }
  [ -f "$out/$3/report.json" ] || xomni eval effect --sft "$sft" --rl "$1" --rl-run "$2" --size 32x128 --lengths 12-16 --prompts 256 --seed "$4" \
    --rl-samples 2 --sweep-samples 1 --ocr "$url_ocr" --shapes "$url_shapes" "${second[@]}" --out "$out/$3"
}
for sampling in 0 1 2; do
  for seed in 0 1 2; do effect "$out/grpo_$seed/model" "$out/grpo_$seed" "effect_${seed}_${sampling}" "$sampling"; done
  [ "$sampling" != 0 ] || effect "$out/control/model" "$out/control" effect_control 0
done
python -m launch.long_run collect "$out" configs/tiny/results_grpo.json
