"""However many rows there are, few of them are in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_rows import row, run_config, write

from ptl_rl.config.recipe import save_config

ROWS = 100_000
MOST_MIB = 50

PROGRAM = """
import json, sys, threading, time
from pathlib import Path
from ptl_rl.data.partition import partition, subset_hash
from ptl_rl.data.prepare import run_data, training_data
from ptl_rl.config.recipe import read_saved_config

def anonymous_mib():  # pages of the mapped file are the system's to take back
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

config = read_saved_config(Path(sys.argv[1]))
run_data(read_saved_config(Path(sys.argv[2])), 1)  # imports everything
before = peak = anonymous_mib()

def watch():
    global peak
    while True:
        peak = max(peak, anonymous_mib())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
corpus = training_data(config)
characters = sum(len(record.question) + len(record.solution) for record in corpus)
hashes = {subset_hash(part) for part in partition(corpus, 10)}
objects = sum(sys.getsizeof(v) for record in corpus[:1000] for v in vars(record).values()) * len(corpus) / 1000 / 2**20
print(json.dumps({"rows": len(corpus), "peak": peak - before, "objects": objects, "hashes": len(hashes)}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_a_hundred_thousand_rows(tmp_path):
    text = "a number of words that are not the evaluation's and of which there are quite a few " * 5
    with (tmp_path / "train.jsonl").open("w") as file:
        for i in range(ROWS):
            file.write(f'{{"question": "What is {i} and 1?", "solution": "{i} {text}", "answer": "{i + 1}"}}\n')
    sources = {name: write(tmp_path / f"{name}.jsonl", [row(0, question=f"The {name}'s?")]) for name in ("a", "b")}
    train = sources["a"].model_copy(update={"path": str(tmp_path / "train.jsonl")})
    files = []
    for name, rows in (("large", train), ("small", write(tmp_path / "c.jsonl", [row(1)]))):
        files.append(str(tmp_path / f"{name}.json"))
        save_config(run_config(tmp_path, rows, sources["a"], sources["b"]), Path(files[-1]))
    command = [sys.executable, "-c", PROGRAM, *files]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)

    assert found["rows"] == ROWS and found["hashes"] == 10
    assert found["peak"] < MOST_MIB < found["objects"]
