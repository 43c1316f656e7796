"""Programs that import verl anew: forked from a process that has imported what verl imports, which takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

SERVER = """
import json, os, sys, traceback
import datasets, ray, tensordict, torch, torch.distributed.fsdp, transformers
from transformers import AutoTokenizer

for line in sys.stdin:
    code, environment, output, errors = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    assert "verl" not in sys.modules
    for path, number in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.environ.update(environment)
    try:
        exec(code, {"__name__": "__main__"})
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
os._exit(0)
"""


class BeforeVerl:
    """Runs programs as ``python -c`` does, without variables for verl other than those that are given."""

    def __init__(self, folder: Path) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
        self._output, self._errors = str(folder / "output"), str(folder / "errors")
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=clean, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code: str, **environment: str) -> subprocess.CompletedProcess:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps([code, environment, self._output, self._errors]) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        said = [Path(path).read_text() for path in (self._output, self._errors)]
        return subprocess.CompletedProcess(code, status, *said)

    def close(self) -> None:
        self._server.communicate()
