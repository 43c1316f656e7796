#!/usr/bin/env bash
# The paper's RL run of Qwen2.5-7B on eight H200s. On a machine with eight GPUs and no Ray it starts its own; with
# RAY_API_SERVER_ADDRESS set it is submitted to that cluster instead.
#   bash launch/qwen_rl.sh [--run-dir DIR] [--set KEY=VALUE ...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
recipe="$root/recipes/grpo_qwen2.5-7b_8xh200.yaml"
if [ -n "${RAY_API_SERVER_ADDRESS:-}" ]; then
    exec bash "$root/launch/submit.sh" "$recipe" "$@"
fi
exec ptl run "$recipe" "$@"
