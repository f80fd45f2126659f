#!/usr/bin/env bash
# This code on one NVIDIA GPU: parity with PyTorch, speed beside it, and shares of the GPU's own peaks.   bash launch/gpu_check.sh [OUT]
# At most 8 minutes after installing; OUT (default runs/gpu) gets the log and the numbers as JSON. Where there is no GPU it says so and ends.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" != -h ] && [ "${1:-}" != --help ] || { sed -n '2,3s/^# //p' "$0"; exit 0; }
out=${1:-runs/gpu}
if ! nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
  echo "there is no NVIDIA GPU here (nvidia-smi lists none): nothing was checked"
  exit 0
fi
. launch/environment.sh
environment parity
environment cuda
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
# Both sides compute in full float32; the CPU stays beside the GPU, for what tests compute there.
export JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest XLA_PYTHON_CLIENT_MEM_FRACTION=0.6

failed=()
part() {  # NAME SECONDS COMMAND...: a part that fails or takes longer does not keep the others from running
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log" || failed+=("$name")
}
part parity 150 python -m pytest -c .pytest.ini -o addopts= -q tests/parity/test_live_{transformer,mmdit,siglip_vq,autoencoder,text_encoders,flow}.py
part decode 75 xomni bench decode --size small --seconds 20 --json "$out/decode.json"
part train 75 xomni bench train --size small --seconds 20 --json "$out/train.json"
part mmdit 75 xomni bench mmdit --size small --seconds 20 --json "$out/mmdit.json"
unset JAX_DEFAULT_MATMUL_PRECISION
XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 part device 105 xomni bench device --size 1b --seconds 30 --json "$out/device.json"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed or not finished in time: ${failed[*]}; logs in $out" >&2
  exit 1
fi
echo "all parts ran; logs and numbers in $out"
