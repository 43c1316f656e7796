# Sourced by the launch scripts: makes .venv with the locked CPU stack if it is missing or out of date, and enters it.
# PTL_VENV names another folder; PYTHON another interpreter (3.10 to 3.12).

ptl_setup() {
    local root venv python stamp wanted
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    cd "$root" || return 1
    venv="${PTL_VENV:-$root/.venv}"
    stamp="$venv/.ptl-installed"
    wanted="$(cat pyproject.toml requirements/cpu.lock requirements/cpu-nodeps.txt | cksum) $root"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        python="${PYTHON:-$(_ptl_python)}" || return 1
        echo "setting up $venv with $("$python" --version) (a few minutes, once)"
        # A folder without its stamp is a set-up that was cut short: make it again.
        "$python" -m venv --clear "$venv" || { echo "error: $python -m venv failed; install Python's venv module" >&2; return 1; }
        _ptl_install "$venv/bin/pip" || { echo "error: installing failed; see above, then run this again" >&2; return 1; }
        echo "$wanted" > "$stamp"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}

_ptl_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.10 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10, 3.11 or 3.12 found; install one, or name it: PYTHON=/path/to/python3.11" >&2
    return 1
}

_ptl_install() {
    local pip="$1" lock=requirements/cpu.lock
    # pip compiles on one core; what is installed is compiled below, on all.
    local quiet=(--quiet --disable-pip-version-check --no-compile)
    "$pip" install "${quiet[@]}" --upgrade 'pip>=25' 'setuptools==77.0.3' wheel || return 1
    if "$(dirname "$pip")/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
        # torch first and with its dependencies: outside the lock they differ between CPU and CUDA builds.
        "$pip" install "${quiet[@]}" --constraint "$lock" "$(grep '^torch==' "$lock")" || return 1
        "$pip" install "${quiet[@]}" --no-deps --requirement "$lock" || return 1
    else
        echo "the lock file is for Python 3.11; resolving requirements/cpu.in instead"
        "$pip" install "${quiet[@]}" --requirement requirements/cpu.in || return 1
        "$pip" install "${quiet[@]}" --no-deps --requirement requirements/cpu-nodeps.txt || return 1
    fi
    "$pip" install "${quiet[@]}" --no-deps --no-build-isolation --editable . || return 1
    # Not what hardly anything imports, three tenths of all. Some packages hold templates that are no Python of this
    # version: pip says nothing of them either.
    local models='transformers/models/(?!__|auto/|llama/|mistral/|qwen|gemma)'
    local rare="/site-packages/((.*/)?tests?/|$models|ray/(rllib|serve|tune)/|(pip|nltk|wandb|fontTools)/)"
    "$(dirname "$pip")/python" -m compileall -q -j 0 -x "$rare" "${pip%/bin/pip}/lib" >/dev/null 2>&1 || true
}

ptl_setup
