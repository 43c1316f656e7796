"""What cuts within one training cost beside cycles that start anew, and whether a run of them outlives being killed.

``python benchmarks/cuts_in_place.py times --out DIR``: the same cuts and GRPO steps of the demo's model once in place
and once cycle by cycle; what a cut takes beside scoring and compensation, and scoring on a step's own rollouts beside a
step. ``python benchmarks/cuts_in_place.py kills --out DIR``: in-place runs of four cuts, each killed with all of its
processes at an instant drawn by seed, and resumed. Finished runs in DIR are not made again.
"""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.driver.processes import tagged_processes
from ptl_rl.families import read_shape
from ptl_rl.pruning.plan import PruningPlan

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
RECIPE, IN_PLACE = "demo_restart_cpu", {"schedule.mode": "in_place"}
GRPO = {"prompts_per_step": 32, "rollouts_per_prompt": 8, "learning_rate": 5e-5, "kl_loss": 0.0}
GRPO |= {"micro_batch_sequences": 64, "gradient_checkpointing": False, "validate_before": False}
TAG = "PTL_BENCHMARK_RUN"
MOST_AFTER_CUT = 12.0
"""Seconds, about a step of the small runs that are killed, with the cut after it."""
app = typer.Typer(help=__doc__, no_args_is_help=True)


def settings_of(cuts: int, channels: int, **grpo: Any) -> dict[str, Any]:
    """One GRPO step after every cut; few problems, as accuracy is not what is asked for."""
    return {
        "schedule.channels_per_cycle": [channels] * cuts,
        "data.train.rows": 64 * cuts,
        "data.validation.rows": 8,
        "data.test.rows": 40,
        "calibration.sequences": 64,
        "evaluation.after_cut": False,
        "gate.min_accuracy_ratio": 0.0,
        "recovery": [{"grpo": {**GRPO, "steps": [1] * cuts, **grpo}}],
        "watchdog.startup_seconds": 900,
    }


def command(run_dir: Path, recipe: str, settings: dict[str, Any]) -> list[str]:
    """That makes a run, or goes on with it."""
    ptl = [sys.executable, "-m", "ptl_rl.cli"]
    if (run_dir / "config.json").exists():
        return [*ptl, "resume", str(run_dir)]
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return [*ptl, "run", str(RECIPES / f"{recipe}.yaml"), "--run-dir", str(run_dir), *options]


def entries_of(run_dir: Path) -> list[Entry]:
    path = run_dir / "journal.jsonl"
    return Journal(path).entries() if path.exists() else []


def finished(run_dir: Path, cycles: int) -> bool:
    return sum(entry.stage == "gate" for entry in entries_of(run_dir)) == cycles


def make(run_dir: Path, recipe: str, settings: dict[str, Any], cycles: int) -> list[Entry]:
    """Make a run unless it is there; gives its journal."""
    if not finished(run_dir, cycles):
        subprocess.run(command(run_dir, recipe, settings), check=True)
    return entries_of(run_dir)


@app.command()
def times(
    out: Annotated[Path, typer.Option(help="Folder of the two runs.")],
    cuts: Annotated[int, typer.Option(help="Cuts of 16 channels, one GRPO step after each.")] = 16,
) -> None:
    """Time the same cuts and steps in place and in cycles, one after the other; run it alone."""
    sources = {"calibration.source": "rollouts"}
    in_place = make(out / "in-place", RECIPE, settings_of(cuts, 16) | IN_PLACE | sources, cycles=1)
    restarts = make(out / "restarts", RECIPE, settings_of(cuts, 16) | sources, cycles=cuts)
    first, second = (
        sum(entry.seconds for entry in entries if entry.stage not in ("evaluate", "cut"))
        for entries in (in_place, restarts)
    )
    print(f"{cuts} cuts with a step after each, without evaluations: {first:.0f} s in place, {second:.0f} s in cycles")
    print(f"ratio {first / second:.3f}")
    facts = [entry.metrics for entry in in_place if entry.stage == "cut"]
    beside = [fact["cut_seconds"] - fact["score_seconds"] - fact["compensate_seconds"] for fact in facts]
    logged = [json.loads(line)["data"] for line in next(out.glob("in-place/cycles/*/*/verl_metrics.jsonl")).open()]
    saved = [row["timing_s/save_cut"] for row in logged if "timing_s/save_cut" in row]
    steps = [row["timing_s/step"] - row.get("timing_s/cut", 0.0) - row.get("timing_s/save_cut", 0.0) for row in logged]
    print(f"a cut beside scoring and compensation: median {statistics.median(beside):.2f} s, most {max(beside):.2f} s")
    print(f"its checkpoint: median {statistics.median(saved):.2f} s, most {max(saved):.2f} s")
    scoring = statistics.median(fact["score_seconds"] for fact in facts[1:])
    step = statistics.median(steps)
    print(f"scoring on 64 of the step's rollouts: {scoring:.2f} s, {scoring / step:.1%} of a step ({step:.1f} s)")


def check(run_dir: Path, cuts: int) -> str | None:
    """What is wrong with a finished run of cuts in place; None: nothing."""
    entries = entries_of(run_dir)
    stages = [entry.stage for entry in entries]
    if stages != ["evaluate", *["cut"] * cuts, "recover", "evaluate", "gate"]:
        return f"the journal has {stages}"
    plans = [PruningPlan.load(run_dir / f"cycles/001/cuts/{number:03d}/plan.json") for number in range(1, cuts + 1)]
    kept = plans[0].keep_channels
    for before, after in pairwise(plans):
        if after.source_intermediate_size != before.intermediate_size:
            return "a cut's plan is not of what the one before has left"
        kept = [[own[place] for place in block] for own, block in zip(kept, after.keep_channels, strict=True)]
    if PruningPlan.load(run_dir / "best/plan.json").keep_channels != kept:
        return "the finished model does not have the journaled cuts"
    sizes = [read_shape(run_dir / f"best{folder}").intermediate_size for folder in ("", "/after_cut")]
    if sizes != [plans[-1].intermediate_size] * 2 or "after_cut" not in entries[-2].metrics:
        return f"the model, and that right after its last cut, have {sizes} channels, evaluated {entries[-2].metrics}"
    recover = next(entry.metrics for entry in entries if entry.stage == "recover")
    if recover["logit_difference"] > 1e-4:
        return f"what was cut is not zero: logits differ by {recover['logit_difference']:g}"
    if [row["step"] for row in recover["curve"] if row["step"]] != list(range(1, cuts + 1)):
        return f"steps {[row['step'] for row in recover['curve']]}"
    return None


def kill(tag: str) -> int:
    """End all processes of a run at once, as a machine that loses power would; gives how many."""
    count = 0
    while found := tagged_processes(TAG, tag):
        for process in found:
            try:
                process.send_signal(signal.SIGKILL)
                count += 1
            except psutil.Error:
                continue
        psutil.wait_procs(found, timeout=10)
    return count


@app.command()
def kills(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")],
    count: Annotated[int, typer.Option(help="Runs, each killed once.")] = 20,
    sliced: Annotated[bool, typer.Option(help="Have training go on with the sliced model after every cut.")] = False,
    within: Annotated[bool, typer.Option(help="Only between the first cut and the end of training.")] = False,
    seed: Annotated[int, typer.Option(help="Of the instants.")] = 0,
) -> None:
    """Kill runs at instants spread over what a whole run takes, resume them, and check what they end with."""
    cuts, small = 4, {"prompts_per_step": 8, "rollouts_per_prompt": 4, "micro_batch_sequences": 32}
    settings, recipe = settings_of(cuts, 96, **small) | IN_PLACE, RECIPE
    settings |= {"calibration.sequences": 32, "evaluation.after_cut": True}
    settings |= {"schedule.rematerialise": "after_every_cut" if sliced else "never"}
    out = out / "sliced" if sliced else out  # other instants, other runs
    out.mkdir(parents=True, exist_ok=True)
    whole = out / "whole.json"
    if not whole.exists():
        began = time.monotonic()
        make(out / "whole", recipe, settings, cycles=1)
        if wrong := check(out / "whole", cuts):
            raise SystemExit(f"error: the run that nobody killed: {wrong}")
        whole.write_text(json.dumps({"seconds": time.monotonic() - began}))
    length, killed, failed = json.loads(whole.read_text())["seconds"], 0, 0
    draw = random.Random(seed)
    for number in range(count):
        instant = draw.uniform(number, number + 1) / count * length
        # How far a run is after so many seconds changes with the machine's hour; so many cuts later it is in training.
        made, later = (draw.randint(1, cuts), draw.uniform(0, MOST_AFTER_CUT)) if within else (0, instant)
        run_dir, said = out / f"run-{number:02d}", out / f"run-{number:02d}.json"
        if not said.exists():
            said.write_text(json.dumps(_kill_and_resume(run_dir, recipe, settings, later, made)))
        found = json.loads(said.read_text())
        wrong = check(run_dir, cuts) if finished(run_dir, 1) else "it did not finish; see its log"
        killed += found["processes"] > 0
        failed += wrong is not None
        print(
            f"run {number:2d}, after {made} cuts and {later:5.1f} of {length:.0f} s: {found['processes']} processes "
            f"killed, journal {found['journal']}: {wrong or 'whole in the end'}",
            flush=True,
        )
    print(f"{count - failed} of {count} runs are whole in the end; {killed} were killed, the others had ended before")
    raise SystemExit(bool(failed))


def _kill_and_resume(run_dir: Path, recipe: str, settings: dict[str, Any], seconds: float, cuts: int) -> dict[str, Any]:
    """Make a run, kill it so many seconds after that many cuts, and go on with it; tells what was there then."""
    shutil.rmtree(run_dir, ignore_errors=True)
    environment, found = {**os.environ, TAG: str(run_dir)}, {"processes": 0, "journal": []}
    with run_dir.with_suffix(".log").open("w") as output:
        options: dict[str, Any] = {"stdout": output, "stderr": output, "env": environment}
        process = subprocess.Popen(command(run_dir, recipe, settings), **options)
        while process.poll() is None and sum(entry.stage == "cut" for entry in entries_of(run_dir)) < cuts:
            time.sleep(0.1)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            found = {"processes": kill(str(run_dir)), "journal": [entry.stage for entry in entries_of(run_dir)]}
        process.wait()
        if not finished(run_dir, 1):
            subprocess.run(command(run_dir, recipe, settings), check=False, **options)
    return found


if __name__ == "__main__":
    app()
