#!/usr/bin/env bash
# The paper's RL run of Qwen2.5-7B on eight H200s. See run.sh.
#   bash launch/qwen_rl.sh [--run-dir DIR] [--set KEY=VALUE ...]
set -euo pipefail
launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$launch/run.sh" "$launch/../recipes/grpo_qwen2.5-7b_8xh200.yaml" "$@"
