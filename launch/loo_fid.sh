#!/usr/bin/env bash
# Instance- and distribution-level rewards on digits, against the instance-level one alone.   bash launch/loo_fid.sh [OUT] [SEEDS] [DATA]
# OUT (default runs/loo_fid) gets the runs; SEEDS (default "0 1 2"); DATA (default data/mnist28) is made where it is not there. Every part resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" != -h ] && [ "${1:-}" != --help ] || { sed -n '2,3s/^# //p' "$0"; exit 0; }
out=${1:-runs/loo_fid} seeds=${2:-0 1 2} data=${3:-data/mnist28}
. launch/environment.sh
environment rewards
keep_memory
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
. launch/services.sh
mkdir -p "$out"
[ -d "$data" ] || xomni data make mnist --size 28 --out "$data"

train() {  # NAME CONFIG [options]
  local name=$1 config=$2
  shift 2
  [ -d "$out/$name/model" ] || xomni train --config="configs/methods/$config.py" --config.run_dir="$out/$name" "$@"
}
train vq llamagen_vq --config.data.path="$data/train" --config.validation.data.path="$data/heldout"
train c2i llamagen_c2i --config.init_from="$out/vq/model" --config.data.path="$data/train"
for half in first second; do
  [ -f "$out/$half.npz" ] || python -m launch.digits "$data" "$half" "$out/$half.npz"
done

url_DigitScorer="" url_loo_fid=""
start "$out" launch/digits.py:DigitScorer --model "$out/first.npz" --workers 1
start "$out" loo_fid --features launch/digits.py:features --model "$out/first.npz" --statistics "$out/first.statistics.npz" --workers 1
grpo() {  # NAME SEED WEIGHT [options]
  local name=$1 seed=$2 weight=$3
  shift 3
  train "${name}_$seed" loo_fid --config.seed="$seed" --config.init_from="$out/c2i/model" --config.rewards.loo_fid.weight="$weight" \
    --config.rewards.digit.urls="('$url_DigitScorer',)" --config.rewards.loo_fid.urls="('$url_loo_fid',)" "$@"
}
for seed in $seeds; do
  { grpo instance "$seed" 0.0 && grpo early "$seed" 0.0 --config.steps=18; } &
  services+=($!)
  grpo both "$seed" 2.0
  wait "${services[-1]}"
done
python -m launch.loo_fid "$out" "$data" configs/methods/loo_fid.json
