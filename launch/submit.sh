#!/usr/bin/env bash
# Run a recipe as a job on a Ray cluster and follow its log.
#   RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 bash launch/submit.sh RECIPE [ptl run options]
# "No available agent" means that another Ray on the head's machine, such as a run of this project's own, has the port of
# the agent that starts jobs: start the head with --dashboard-agent-listen-port=0.
# The recipe and its base are read on the head's machine, at the paths that they have here; `ptl plan RECIPE --resolved` prints
# one that needs no base.
# The cluster's nodes need this project installed; put the run folder (--run-dir) on storage that all of them share.
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: bash launch/submit.sh RECIPE [ptl run options]" >&2
    exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
recipe="$(realpath "$1")"
shift
if [ ! -f "$recipe" ]; then
    echo "error: no such recipe: $recipe" >&2
    exit 2
fi
command -v ray > /dev/null || . "$root/launch/setup.sh"
export RAY_API_SERVER_ADDRESS="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}"
# A head that finds a token at its start asks for it; the job client sends it only if told to.
if [ -z "${RAY_AUTH_MODE:-}" ] && { [ -n "${RAY_AUTH_TOKEN:-}" ] || [ -f "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; }; then
    export RAY_AUTH_MODE=token
fi
exec ray job submit --runtime-env "$root/launch/runtime_env.yaml" -- python -m ptl_rl.cli run "$recipe" "$@"
