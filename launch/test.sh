#!/usr/bin/env bash
# Install (first time only), then lint, type-check and test everything, the real stack included.
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$root/launch/setup.sh"
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
ruff check .
ruff format --check .
mypy
lint-imports --no-cache
# Side by side: the tests that start the stack, which mostly wait for processes to start, and all others. These have the
# niceness that Ray gives its workers, which would starve beside them otherwise.
others="$(mktemp)"
trap 'kill "${pid:-}" 2>/dev/null || true; rm -f "$others"' EXIT
OMP_NUM_THREADS=1 nice -n 15 python -m pytest -m "not stack and not canary" >"$others" 2>&1 &
pid=$!
failed=0
python -m pytest -m "stack and not canary" || failed=1
wait "$pid" || failed=1
cat "$others"
exit "$failed"
