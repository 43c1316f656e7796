#!/usr/bin/env bash
# The paper's CPT run of Gemma 2 9B on four A100s. See run.sh.
#   bash launch/gemma_cpt.sh [--run-dir DIR] [--set KEY=VALUE ...]
set -euo pipefail
launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$launch/run.sh" "$launch/../recipes/cpt_gemma2-9b_4xa100.yaml" "$@"
