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
# Side by side, as each often waits for processes to start: the stack's tests, and all others with one of the stack's behind
# them, which makes both as long. These have the niceness that Ray gives its workers, which would starve beside them otherwise.
later=tests/e2e/test_first_light.py
others="$(mktemp)"
trap '[ -z "${pid:-}" ] || kill -- "-$pid" 2>/dev/null || true; rm -f "$others"' EXIT
set -m  # a process group of its own, to end all of it
(
    failed=0
    OMP_NUM_THREADS=1 nice -n 15 python -m pytest -m "not stack and not canary" || failed=1
    nice -n 15 python -m pytest -m "stack and not canary" "$later" || failed=1
    exit "$failed"
) >"$others" 2>&1 &
pid=$!
set +m
failed=0
python -m pytest -m "stack and not canary" --ignore="$later" || failed=1
wait "$pid" || failed=1
cat "$others"
exit "$failed"
