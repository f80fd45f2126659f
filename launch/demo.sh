#!/usr/bin/env bash
# All of X-Omni at small size on this machine: a first image, reward services, GRPO, report.   bash launch/demo.sh [OUT]
# OUT (default runs/demo) gets report.html, report.json and the trained model.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" != -h ] && [ "${1:-}" != --help ] || { sed -n '2,3s/^# //p' "$0"; exit 0; }
out=${1:-runs/demo}
began=$(date +%s)
. launch/environment.sh
environment rewards
keep_memory
. launch/services.sh
sft=xomni_jax/assets/tiny_sft
mkdir -p "$out"

echo "== 1/4  a first image, from the tiny SFT model that ships with the package"
installed=$(date +%s)
xomni generate 'a red sign that says "HELLO"' 'a blue sign that says "ZEBRA"' 'two green circles on white' --out "$out/first"
[ -f "$out/first/seconds" ] || echo $(($(date +%s) - installed)) > "$out/first/seconds"
echo "first image after $(cat "$out/first/seconds") s"

echo "== 2/4  reward services"
start_services "$out"

echo "== 3/4  GRPO"
[ -d "$out/grpo/model" ] || xomni train --config=configs/tiny/demo.py --config.run_dir="$out/grpo" \
  --config.rewards.ocr.urls="('$url_ocr',)" --config.rewards.shapes.urls="('$url_shapes',)"

xomni report "$out/grpo" --out "$out/training.html"

echo "== 4/4  held-out prompts: SFT, best-of-N, RL"
xomni eval effect --sft "$sft" --rl "$out/grpo/model" --ocr "$url_ocr" --shapes "$url_shapes" "${second[@]}" \
  --seed 1 --rl-samples 4 --sweep-samples 1 --first-image "$out/first/seconds" --started "$began" --out "$out"
echo "both models side by side, on a page: xomni serve --model sft=$sft --model rl=$out/grpo/model --reward ocr=$url_ocr (while the services run)"
