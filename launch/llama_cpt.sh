#!/usr/bin/env bash
# The paper's CPT run of Llama 3 8B on four A100s. See run.sh.
#   bash launch/llama_cpt.sh [--run-dir DIR] [--set KEY=VALUE ...]
set -euo pipefail
launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$launch/run.sh" "$launch/../recipes/cpt_llama3-8b_4xa100.yaml" "$@"
