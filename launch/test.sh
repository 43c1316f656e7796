#!/usr/bin/env bash
# Install (first time only), then lint, type-check and test everything, the real stack included.
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$root/launch/setup.sh"
installed=$SECONDS
unset PYTHONDONTWRITEBYTECODE  # hundreds of processes would compile the same modules anew
export OMP_NUM_THREADS=1       # threads that wait for each other spin, and the cores are busy
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
ruff check .
ruff format --check .

types() { mypy && lint-imports --no-cache; }
# Where Ray is at work the rest has the niceness that Ray gives its workers, which would starve beside it otherwise.
units() { nice -n 15 python -m pytest -m "not stack and not canary" "$@"; }
# By the first letter of their folder. A folder that begins with neither would be run in both.
units_a_to_l() { units --ignore-glob='tests/unit/[m-z]*' --ignore=tests/e2e; }
units_m_to_z() { units --ignore-glob='tests/unit/[a-l]*'; }
demo_run() { python -m pytest tests/e2e/test_demo_run.py; }
first_light() { python -m pytest tests/e2e/test_first_light.py; }
study() { python -m pytest tests/e2e/test_study.py; }
stack() {
    python -m pytest -m "stack and not canary" --ignore=tests/e2e/test_demo_run.py --ignore=tests/e2e/test_first_light.py \
        --ignore=tests/e2e/test_study.py
}

# Side by side, as each often waits for processes to start: every lane takes the next that nobody has taken.
jobs=(units_m_to_z units_a_to_l demo_run first_light stack study types) # longest first
lane() {
    local job began
    for job in "${jobs[@]}"; do
        mkdir "$taken/$job" 2>/dev/null || continue
        began=$SECONDS
        "$job" >"$taken/$job/log" 2>&1 || touch "$taken/failed"
        printf '\n== %s, %s s\n%s\n' "$job" "$((SECONDS - began))" "$(cat "$taken/$job/log")"
    done
}
taken="$(mktemp -d)"
lanes=()
trap 'for pid in "${lanes[@]}"; do kill -- "-$pid" 2>/dev/null || true; done; rm -rf "$taken"' EXIT
set -m  # a process group for each, to end all of it
for _ in 1 2 3; do
    lane &
    lanes+=("$!")
done
set +m
for pid in "${lanes[@]}"; do wait "$pid"; done
echo "tests took $((SECONDS - installed)) s, what had to be installed $installed s"
[ ! -e "$taken/failed" ] || { echo "error: failed, see above" >&2; exit 1; }
