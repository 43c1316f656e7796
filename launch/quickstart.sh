#!/usr/bin/env bash
# Install (first time only) and run the demo: GRPO with cuts in it, evaluated and gated, on this machine's CPU cores.
#   bash launch/quickstart.sh [RECIPE] [ptl run options]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$root/launch/setup.sh"
recipe="${1:-recipes/demo_grpo_cpu.yaml}"
shift || true
exec ptl run "$recipe" "$@"
