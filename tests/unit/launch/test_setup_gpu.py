"""``launch/setup_gpu.sh`` installs the lock once, without a resolver, and says what is wrong.

Python and uv are stand-ins: what is installed is checked in test_gpu_lock.py.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Stands in for Python: notes how it was called, makes "environments" that hold itself, fails where it is told to.
PYTHON = """#!/bin/bash
echo "python $*" >> "$CALLS"
case "$*" in
    *"$FAILS_ON"*) echo "reason from below" >&2; exit 1 ;;
    --version) echo "Python 3.12.1" ;;
    "-m venv --clear "*)
        rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; echo 'ENTERED=yes' > "$4/bin/activate" ;;
    -) case "$(cat)" in *"$FAILS_IN"*) echo "reason from below" >&2; exit 1 ;; esac ;;
esac
"""
# All else that the script may find on its path.
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "grep", "mkdir", "mktemp", "rm")
INSTALL = "install --quiet --disable-pip-version-check"


class Machine:
    """A checkout and a machine without Python packages, on which to source the script."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.root, self.bin, self.calls_file = folder / "checkout", folder / "bin", folder / "calls"
        for path in ("launch/setup_gpu.sh", "pyproject.toml", "requirements/gpu.lock"):
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / path, self.root / path)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.tool("python3.12", PYTHON)
        self.environment = {
            "PATH": str(self.bin),
            "CALLS": str(self.calls_file),
            "FAILS_ON": "nothing",
            "FAILS_IN": "nothing",
            "PTL_DRIVER_FILE": str(folder / "version"),
        }

    def tool(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text, encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def source(self, **environment: str) -> subprocess.CompletedProcess:
        command = f"set -euo pipefail; . {self.root}/launch/setup_gpu.sh; echo entered=$ENTERED"
        given = self.environment | environment
        return subprocess.run(["bash", "-c", command], env=given, capture_output=True, text=True, cwd="/", timeout=60)

    def calls(self) -> list[str]:
        """What was called since the last time, of installing."""
        said = self.calls_file.read_text(encoding="utf-8").splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [line for line in said if "install" in line or "venv" in line]


@pytest.fixture
def machine(tmp_path, repository) -> Machine:
    return Machine(tmp_path, repository)


def test_installs_the_lock_once_and_enters(machine):
    root = machine.root
    done = machine.source()
    assert (done.returncode, done.stderr) == (0, "") and "entered=yes" in done.stdout
    assert machine.calls() == [
        f"python -m venv --clear {root}/.venv-gpu",
        f"python -m pip {INSTALL} --no-deps --requirement {root}/requirements/gpu.lock",
        f"python -m pip {INSTALL} --no-deps --no-build-isolation --editable {root}",
    ]
    again = machine.source()
    assert (again.stdout, machine.calls()) == ("entered=yes\n", [])
    with (root / "requirements" / "gpu.lock").open("a", encoding="utf-8") as lock:
        lock.write("more==1\n")
    assert machine.source().returncode == 0 and len(machine.calls()) == 3


def test_uv_installs_where_there_is_one_and_flash_attention_is_added(machine):
    machine.tool("uv", '#!/bin/bash\necho "uv $*" >> "$CALLS"\n')
    venv = str(machine.root.parent / "elsewhere")
    done = machine.source(PTL_VENV=venv, PTL_FLASH_ATTN="/wheels/flash_attn-2.8.3.whl")
    assert done.returncode == 0, done.stderr
    uv = f"uv pip install --quiet --python {venv}/bin/python --no-deps"
    assert machine.calls()[1:] == [
        f"{uv} --requirement {machine.root}/requirements/gpu.lock",
        f"{uv} --no-build-isolation --editable {machine.root}",
        f"{uv} --no-build-isolation /wheels/flash_attn-2.8.3.whl",
    ]


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ({"FAILS_ON": "-m venv"}, "install Python's venv module"),
        ({"FAILS_ON": "gpu.lock"}, "error: installing failed"),
        ({"FAILS_ON": "--editable"}, "error: installing failed"),
        ({"FAILS_IN": "import vllm"}, "error: what was installed cannot be imported"),
        ({"FAILS_IN": "platform.machine()"}, "reason from below"),
    ],
)
def test_what_fails_is_told_and_done_again(machine, fails, message):
    done = machine.source(**fails)
    assert done.returncode == 1 and "entered" not in done.stdout
    assert message in done.stderr and "reason from below" in done.stderr
    machine.calls()
    assert machine.source().returncode == 0 and len(machine.calls()) == 3


def test_without_a_fitting_python(machine):
    for name in ("python3.12", "python3.11", "python3"):
        machine.tool(name, "#!/bin/bash\nexit 1\n")
    done = machine.source()
    assert done.returncode == 1 and "error: no Python 3.11 or 3.12 found" in done.stderr


OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build\nGCC version:  gcc version 13.3.0\n"


@pytest.mark.parametrize(
    ("tool", "file", "old"),
    [
        ("570.124.06\n" * 20_000, None, "570.124.06"),
        (None, OPEN.format("550.90.07"), "550.90.07"),
        ("NVIDIA-SMI has failed", OPEN.format("550.90.07"), "550.90.07"),
        ("580.65.06", OPEN.format("550.90.07"), None),
        (None, OPEN.format("595.10"), None),
        (None, None, None),
    ],
)
def test_a_driver_that_is_too_old_is_named_with_the_remedy(machine, tool, file, old):
    if tool:
        (machine.root.parent / "said").write_text(f"{tool}\n", encoding="utf-8")
        machine.tool("nvidia-smi", f"#!/bin/bash\ncat {machine.root.parent}/said\n")
    if file:
        Path(machine.environment["PTL_DRIVER_FILE"]).write_text(file, encoding="utf-8")
    for _ in range(2):  # also when everything is installed: this may be another node
        done = machine.source()
        assert done.returncode == 0 and "entered=yes" in done.stdout
        if old is None:
            assert done.stderr == ""
        else:
            assert f"driver is {old}" in done.stderr and "580 or newer" in done.stderr and "cuda-compat" in done.stderr


def test_it_refuses_a_python_that_the_lock_is_not_for(machine):
    pretend = f"{sys.executable} -c 'import sys; sys.version_info = (3, 10, 1); exec(sys.stdin.read())'"
    machine.tool("old", f'#!/bin/bash\n[ "$1" = - ] && exec {pretend}\nexec {machine.bin}/python3.12 "$@"\n')
    done = machine.source(PYTHON=str(machine.bin / "old"))
    assert done.returncode == 1 and "is for 3.11 and 3.12: set PYTHON" in done.stderr
    assert machine.calls() == [] and not (machine.root / ".venv-gpu").exists()
