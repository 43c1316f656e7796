# Source it (`. launch/setup_gpu.sh`) on a machine with NVIDIA GPUs: makes .venv-gpu with the locked GPU stack if it is missing or
# out of date, and enters it. Nothing is resolved, so nothing backtracks: requirements/gpu.lock is installed as it stands.
# PTL_VENV names another folder; PYTHON another interpreter (3.11 or 3.12); PTL_FLASH_ATTN what to install as flash-attn, a wheel
# or `flash-attn==VERSION`, which is then compiled (docs/install.md).

# The oldest NVIDIA driver that runs the CUDA of the lock's torch: its cuda-toolkit, 13.x.
PTL_DRIVER_NEEDED=580

ptl_setup_gpu() {
    local root venv python stamp wanted
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    venv="${PTL_VENV:-$root/.venv-gpu}"
    stamp="$venv/.ptl-installed"
    wanted="$(cat "$root/pyproject.toml" "$root/requirements/gpu.lock" | cksum) $root ${PTL_FLASH_ATTN:-}"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        python="${PYTHON:-$(_ptl_gpu_python)}" || return 1
        _ptl_gpu_fits "$python" || return 1
        echo "setting up $venv with $("$python" --version) (about 10 GB; minutes, once)"
        # A folder without its stamp is a set-up that was cut short: make it again.
        "$python" -m venv --clear "$venv" || { echo "error: $python -m venv failed; install Python's venv module" >&2; return 1; }
        _ptl_gpu_install "$root" "$venv/bin/python" || { echo "error: installing failed; see above, then run this again" >&2; return 1; }
        _ptl_gpu_check "$venv/bin/python" || return 1
        echo "$wanted" > "$stamp"
    fi
    _ptl_gpu_driver
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}

_ptl_gpu_python() {
    local candidate
    for candidate in python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or 3.12 found; install one, or name it: PYTHON=/path/to/python3.12" >&2
    return 1
}

_ptl_gpu_fits() {
    "$1" - <<'PYTHON'
import platform
import sys

if sys.version_info[:2] not in ((3, 11), (3, 12)):
    sys.exit(f"error: {sys.executable} is Python {platform.python_version()}; requirements/gpu.lock is for 3.11 and 3.12: set PYTHON")
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    sys.exit(f"error: requirements/gpu.lock is for Linux on x86_64, and this is {platform.system()} on {platform.machine()}")
PYTHON
}

_ptl_gpu_install() {
    local root="$1" python="$2" lock="$1/requirements/gpu.lock"
    local install=("$python" -m pip install --quiet --disable-pip-version-check)
    if command -v uv >/dev/null; then
        install=(uv pip install --quiet --python "$python")
    fi
    "${install[@]}" --no-deps --requirement "$lock" || return 1
    "${install[@]}" --no-deps --no-build-isolation --editable "$root" || return 1
    if [ -n "${PTL_FLASH_ATTN:-}" ]; then
        "${install[@]}" --no-deps --no-build-isolation "$PTL_FLASH_ATTN"
    fi
}

# Imports what the runs start, and says what the GPUs will meet.
_ptl_gpu_check() {
    local log
    log="$(mktemp)"
    # From another folder, so that it is the installed project that is imported.
    if ! (cd / && "$1" - 2>"$log" <<'PYTHON'
from importlib.metadata import version
from importlib.util import find_spec

import ray
import torch
import verl
import vllm

import ptl_rl

print(f"installed: verl {version('verl')}, vllm {version('vllm')}, ray {version('ray')}, torch {torch.__version__} for CUDA {torch.version.cuda}")
if find_spec("flash_attn") is None:
    print("flash-attn is not installed, so training pads its rows; docs/install.md says how to add it")
if not torch.cuda.is_available():
    print("torch sees no GPU here")
PYTHON
    ); then
        cat "$log" >&2
        rm -f "$log"
        echo "error: what was installed cannot be imported; see above" >&2
        return 1
    fi
    rm -f "$log"
}

# Never an error: a login node or an image in the making has no driver, or another one than the machines with the GPUs.
_ptl_gpu_driver() {
    local said driver pattern='[0-9]{3,}(\.[0-9]+)+'
    said="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null)" || said=""
    [[ "$said" =~ $pattern ]] || said="$(cat "${PTL_DRIVER_FILE:-/proc/driver/nvidia/version}" 2>/dev/null)" || said=""
    [[ "$said" =~ $pattern ]] || return 0
    driver="${BASH_REMATCH[0]}"
    if [ "${driver%%.*}" -lt "$PTL_DRIVER_NEEDED" ]; then
        echo "warning: this machine's NVIDIA driver is $driver, and the locked torch (CUDA 13.0) needs $PTL_DRIVER_NEEDED or newer: install a newer" \
            "driver, or on data-centre GPUs NVIDIA's package cuda-compat-13-0 with its folder first in LD_LIBRARY_PATH" >&2
    fi
}

ptl_setup_gpu
