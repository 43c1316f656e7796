#!/usr/bin/env bash
# Install (first time only), then lint, type-check and test everything, the real stack included.
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$root/launch/setup.sh"
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
    # Side by side: one process runs the tests that start the stack, the other the rest (tests/conftest.py).
    set -- -n 2 --dist loadgroup
fi
exec python -m pytest "$@"
