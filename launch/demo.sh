#!/usr/bin/env bash
# The whole of X-Omni at small size on this machine: first picture, reward services, GRPO, report.   bash launch/demo.sh [OUT]
# About ten minutes on two cores. OUT (default runs/demo) gets report.html, report.json and the trained model.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" != -h ] && [ "${1:-}" != --help ] || { sed -n '2,3s/^# //p' "$0"; exit 0; }
out=${1:-runs/demo}
. launch/environment.sh
environment rewards
export OMP_THREAD_LIMIT=1
mkdir -p "$out"
began=$(date +%s.%N)

echo "== 1/4  a first picture, from the tiny SFT model that ships with the package"
xomni generate 'a red sign that says "HELLO"' 'a blue sign that says "ZEBRA"' 'two green circles on white' --out "$out/first"
first_image_seconds=$(python -c "print(round($(date +%s.%N) - $began, 1))")
echo "first picture after $first_image_seconds s"

echo "== 2/4  reward services"
services=()
trap 'kill "${services[@]}" 2>/dev/null || true' EXIT
# start NAME [options]: sets the variable url_NAME once the service answers
start() {
  local log="$out/service_$1.log" url=""
  : > "$log"
  xomni serve-reward "$@" --port 0 > "$log" 2>&1 &
  services+=($!)
  while [ -z "$url" ]; do
    kill -0 "${services[-1]}" 2>/dev/null || { cat "$log" >&2; return 1; }
    sleep 0.2
    url=$(sed -n 's/.*ready on \(http:[^;]*\);.*/\1/p' "$log")
  done
  echo "$1: $url (log: $log)"
  printf -v "url_$1" %s "$url"
}
start ocr --workers 2
start shapes --workers 1
# The second reader is only for the report: an independent look at what the policy was rewarded for.
second=()
launch/tesseract_data.sh || true
if start tesseract --workers 1; then
  second=(--second "$url_tesseract")
else
  echo "no second reader: the report leaves second_reader_accuracy empty"
  unset 'services[-1]'
fi

echo "== 3/4  GRPO"
xomni train --config=configs/tiny/demo.py --config.run_dir="$out/grpo" \
  --config.rewards.ocr.urls="('$url_ocr',)" --config.rewards.shapes.urls="('$url_shapes',)"

echo "== 4/4  held-out prompts: SFT, best-of-N, RL"
xomni eval effect --sft xomni_jax/assets/tiny_sft --rl "$out/grpo/model" --rl-run "$out/grpo" --ocr "$url_ocr" --shapes "$url_shapes" \
  "${second[@]}" --first-image-seconds "$first_image_seconds" --began "${began%.*}" --out "$out"
