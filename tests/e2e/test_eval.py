"""``ptl eval`` on the demo model, through real lm-eval and vLLM."""

import json
import os
import subprocess
import sys

import pyarrow.parquet
import pytest

from ptl_rl.config import SourceConfig
from ptl_rl.data.corpora import load_corpus
from ptl_rl.testbed import CHECKPOINT_DIR

pytestmark = pytest.mark.stack
COUNT = 10


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Of the test bed, in GSM8K's own columns."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    records = load_corpus(SourceConfig(path="testbed:test", rows=COUNT), seed=0)
    rows = [{"question": r.question, "answer": f"{r.solution}\n#### {r.answer}"} for r in records]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ptl_eval(*arguments):
    command = [sys.executable, "-m", "ptl_rl.cli", "eval", "testbed", *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def test_two_tasks_offline_and_again_for_nothing(questions, tmp_path):
    from pretrain_testbed import greedy_accuracy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = ["--tasks", "gsm8k_boxed,gsm8k", "--limit", COUNT, "--out", tmp_path / "out", "--max-tokens", 96]
    arguments += ["--data", f"gsm8k_boxed={questions}", "--data", f"gsm8k={questions}"]
    first = ptl_eval(*arguments)
    found = json.loads((tmp_path / "out/results.json").read_text())["tasks"]

    zero_shot, few_shot = found["gsm8k_boxed"], found["gsm8k"]
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT_DIR, dtype="float32")
    expected = greedy_accuracy(model, AutoTokenizer.from_pretrained(CHECKPOINT_DIR), "test", COUNT)
    assert zero_shot["accuracy"] == pytest.approx(expected)
    assert zero_shot["low"] <= zero_shot["accuracy"] <= zero_shot["high"]
    assert zero_shot["prompts_cut"] == zero_shot["truncated"] == 0
    # Eight examples are more than this model can read.
    assert few_shot["prompts_cut"] == few_shot["problems"] == COUNT
    assert set(few_shot["lm_eval"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}

    rows = pyarrow.parquet.read_table(tmp_path / "out/gsm8k_boxed.parquet").to_pylist()
    assert len(rows) == COUNT
    assert sum(row["correct"] for row in rows) / COUNT == pytest.approx(zero_shot["accuracy"])
    assert sum(row["tokens"] for row in rows) / COUNT == pytest.approx(zero_shot["tokens_per_answer"])
    assert "leaked" not in first.stderr

    again = ptl_eval(*arguments)
    assert "loading the model" in first.stdout and "loading the model" not in again.stdout
    assert json.loads((tmp_path / "out/results.json").read_text())["tasks"] == found
