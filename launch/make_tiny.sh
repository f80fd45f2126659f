#!/usr/bin/env bash
# Makes the tiny model that ships with the package, stage by stage, and measures it.   bash launch/make_tiny.sh [--install]
# Stages and results are in runs/tiny, the model in runs/tiny/sft/model. An interrupted script goes on where it stopped. With --install
# the model replaces the one in xomni_jax/assets/tiny_sft, which git tracks. About an hour on two idle cores.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  "" | --install) ;;
  -h | --help) sed -n '2,4s/^# //p' "$0"; exit 0 ;;
  *) echo "$1: unknown option; bash launch/make_tiny.sh --help lists what there is" >&2; exit 2 ;;
esac
. launch/environment.sh
environment rewards
keep_memory
python -m launch.card check runs/tiny
for stage in tokenizer decoder pretrain_1 pretrain_2 pretrain_3 sft; do
  [ -d "runs/tiny/$stage/model" ] || xomni train --config="configs/tiny/$stage.py"
done
model=runs/tiny/sft/model
xomni eval rendered --model "$model" --out runs/tiny/rendered
python -m launch.card write runs/tiny "$model"
if [ "${1:-}" = --install ]; then
  sed -i "s|$PWD/||" "$model"/*/commit_success.txt # Orbax writes where it wrote
  rm -rf xomni_jax/assets/tiny_sft
  cp -r "$model" xomni_jax/assets/tiny_sft
  model=xomni_jax/assets/tiny_sft
fi
echo "the tiny model: $model ($(du -sh "$model" | cut -f1)), its card: $model/CARD.md"
