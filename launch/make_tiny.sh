#!/usr/bin/env bash
# Makes the tiny model that ships with the package again, stage by stage, and installs it.   bash launch/make_tiny.sh
# Every stage resumes when the script is started again.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
environment rewards
keep_memory
for stage in tokenizer decoder pretrain_1 pretrain_2 pretrain_3 sft; do
  [ -d "runs/tiny/$stage/model" ] || xomni train --config="configs/tiny/$stage.py"
done
rm -rf xomni_jax/assets/tiny_sft
cp -r runs/tiny/sft/model xomni_jax/assets/tiny_sft
sed -i "s|$PWD/||" xomni_jax/assets/tiny_sft/*/commit_success.txt  # Orbax writes where it wrote
python -m launch.card runs/tiny xomni_jax/assets/tiny_sft
echo "installed: xomni_jax/assets/tiny_sft ($(du -sh xomni_jax/assets/tiny_sft | cut -f1))"
