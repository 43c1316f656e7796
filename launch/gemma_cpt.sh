#!/usr/bin/env bash
# The paper's CPT run of Gemma 2 9B on four A100s. On a machine with four GPUs and no Ray it starts its own; with
# RAY_API_SERVER_ADDRESS set it is submitted to that cluster instead.
#   bash launch/gemma_cpt.sh [--run-dir DIR] [--set KEY=VALUE ...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
recipe="$root/recipes/cpt_gemma2-9b_4xa100.yaml"
if [ -n "${RAY_API_SERVER_ADDRESS:-}" ]; then
    exec bash "$root/launch/submit.sh" "$recipe" "$@"
fi
exec ptl run "$recipe" "$@"
