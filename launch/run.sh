#!/usr/bin/env bash
# Run a recipe on this machine, on a Ray of its own; with RAY_API_SERVER_ADDRESS set, submit it to that cluster instead.
#   bash launch/run.sh RECIPE [--run-dir DIR] [--set KEY=VALUE ...]
set -euo pipefail
launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ -n "${RAY_API_SERVER_ADDRESS:-}" ]; then
    exec bash "$launch/submit.sh" "$@"
fi
exec ptl run "$@"
