"""First light on a GPU: every part that a run stands on, tried out in minutes, most valuable first.

``python benchmarks/gpu_first_light.py --minutes 13`` appends one JSON line a stage to ``runs/first-light/lines.jsonl``:

- ``imports``: versions, driver, GPU, and small checks of what verl and vLLM will ask of it (``light_probe.py``);
- ``vllm``: ``ptl score``, ``ptl slice`` and ``ptl speed`` of the demo's model, shipped and sliced;
- ``grpo``: two cycles of ``recipes/demo_restart_cpu.yaml`` in bfloat16;
- ``cpt``: a cycle of ``recipes/demo_cpt_llama_cpu.yaml``, with and without the parent's distribution (``parent_kl``);
- ``real``: with ``--model DIR --data gsm8k.jsonl``, an eighth of its channels cut twice, GRPO after each cut;
- ``distill``: a cycle of ``recipes/demo_distill_cpu.yaml``. verl gives the parent that teaches whole GPUs of its own:
  it wants two.

A stage that fails or hangs does not stop the later ones: its line holds the last lines of the log that says why, and
where it hung, a file of its processes' stacks is named. One for which too little time is left is skipped, and says so.
``--resume`` leaves out what is ok and goes on with runs that were begun. Runs go through the command line, so that what
is seen is what users get; only the tiny models' rollouts start without CUDA graphs (``enforce_eager``), while
``evaluate``, ``vllm`` and ``real`` have them. ``--device cpu --smoke`` does the same on two cores, as small as can be:
there ``grpo``, ``cpt`` and ``real`` look at one run of one cycle.

On a GPU that is rented for a quarter of an hour, in a checkout that is installed there (``docs/results/gpu.md``)::

    ptl doctor recipes/demo_grpo_cpu.yaml
    python benchmarks/gpu_first_light.py --minutes 13
    python benchmarks/gpu_first_light.py --minutes 13 --resume --model MODEL --data gsm8k_train.jsonl  # as time allows
"""

import hashlib
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import light_probe
import light_runs
import typer
import yaml
from light_runner import (
    Commands,
    Line,
    Lines,
    Sampler,
    Stage,
    StageFailed,
    StageSkipped,
    python,
    read_gpus,
    read_host,
    run_stages,
    verdict,
)

from ptl_rl.config.recipe import read_recipe
from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.driver.watchdog import interrupt

CUDA_SECONDS = {"imports": 60, "vllm": 120, "grpo": 240, "cpt": 150, "real": 300, "distill": 200}
"""About what each stage takes on a GPU, in order of value. Guesses: none has been seen yet."""


@dataclass
class FirstLight:
    """What the stages share."""

    work: Path
    device: Literal["cuda", "cpu"] = "cuda"
    smoke: bool = False
    model: str | None = None
    data: str | None = None
    test: str | None = None
    settings: list[str] = field(default_factory=list)
    """Overrides of every run, ``key=value``."""
    commands: Commands = field(default_factory=Commands)
    made: dict[Path, list[Entry]] = field(default_factory=dict)

    def stages(self) -> list[Stage]:
        """In order of value; a stage that hangs may take twice what it needs."""
        needed = CUDA_SECONDS if self.device == "cuda" else dict.fromkeys(CUDA_SECONDS, 1)
        most = 2.0 if self.device == "cuda" else float("inf")
        return [Stage(name, needs, getattr(self, name), most * needs) for name, needs in needed.items()]

    def imports(self, seconds: float) -> Line:
        """Versions, the machine, and the probe's checks."""
        out, log = self.work / "imports.json", self.work / "imports.log"
        for earlier in (out, log):
            earlier.unlink(missing_ok=True)
        problems = []
        try:
            self.commands.call(python(light_probe.__file__, out, self.device), log, seconds)
        except StageFailed as error:
            problems.append(str(error))
        report = json.loads(out.read_text()) if out.exists() else {}
        problems = [*report.get("problems", []), *problems]
        if "running" in report:
            problems.append(f"{report['running']}: did not end")
        if problems:
            raise StageFailed("; ".join(problems), log, {"report": report})
        gpu = report.get("gpu", {})
        seen = f"{gpu['name']}, driver {gpu['driver']}" if gpu else f"{report['machine']['cores']} cores"
        return {"seen": seen, "report": report}

    def ptl(self, log: str, arguments: list[str | Path], seconds: float) -> str:
        """Run the project's command line; returns what it wrote."""
        path = self.work / f"{log}.log"
        path.unlink(missing_ok=True)
        self.commands.call(python("-m", "ptl_rl.cli", *arguments), path, seconds)
        return path.read_text()

    def vllm(self, seconds: float) -> Line:
        """Score and slice the demo's model, and time both in vLLM."""
        folder, ends = self.work / "vllm", time.monotonic() + seconds
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        read = ["--data", "testbed:rl", "--set=data.rows=256", "--set=calibration.max_tokens=160"]
        read += [f"--set=calibration.sequences={16 if self.smoke else 128}", "--set=calibration.batch_size=16"]
        cut = ["score", "testbed", "--out", folder / "scores", "--remove-channels", "25%", "--alignment", "64", *read]
        self.ptl("score", cut, ends - time.monotonic())
        slicing = ["slice", "testbed", folder / "scores", folder / "sliced"]
        sliced = self.ptl("slice", slicing, ends - time.monotonic())
        load = ["--sequences", "4", "--response-tokens", "8"] if self.smoke else ["--sequences", "256"]
        speed = ["speed", "testbed", folder / "sliced", "--rounds", "2", "--out", folder / "speed.json", *load]
        self.ptl("speed", speed, ends - time.monotonic())
        figures = json.loads((folder / "speed.json").read_text())
        tokens = [{load: round(of["median"]) for load, of in f["tokens_per_second"].items()} for f in figures]
        return {
            "seen": " and ".join(str(each["saturated"]) for each in tokens) + " tokens/s, shipped and sliced",
            "logits": next(line for line in sliced.splitlines() if line.startswith("logits differ")),
            "parameters": [f["parameters"] for f in figures],
            "tokens_per_second": tokens,
        }

    def run(self, name: str, recipe: Path, settings: dict[str, Any], seconds: float) -> tuple[Path, list[Entry]]:
        """``ptl run``, or ``ptl resume`` where a run with these very settings was begun; its folder and journal.

        Raises:
            StageFailed: with what the run got done, and the log of the stage that it failed in.
        """
        options = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
        options += [f"--set={setting}" for setting in self.settings]
        told = json.dumps(read_recipe(recipe), default=str)
        digest = hashlib.sha256("\n".join([told, *options]).encode()).hexdigest()[:8]
        folder = self.work / name / f"run-{digest}"
        if folder in self.made:
            return folder, self.made[folder]
        begun = (folder / "config.json").exists()
        journal = Journal(folder / "journal.jsonl")
        try:
            self.ptl(name, ["resume", folder] if begun else ["run", recipe, "--run-dir", folder, *options], seconds)
        except StageFailed as error:
            logs = sorted((folder / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
            done = light_runs.summary(folder, journal.entries())
            raise StageFailed(_last_words(error), logs[-1] if logs else error.log, done) from None
        self.made[folder] = journal.entries()
        return folder, self.made[folder]

    def _recovered(self, name: str, run: light_runs.Run, methods: set[str], seconds: float) -> Line:
        folder, entries = self.run(name, *run, seconds)
        found = light_runs.summary(folder, entries)
        seen = [recovery for recovery in found["recoveries"] if recovery["method"] in methods]
        if not seen:
            raise StageFailed(f"{folder}: no recovery by {' or '.join(sorted(methods))} in its journal", None, found)
        accuracies = ", ".join(f"{accuracy:.1%}" for accuracy in found["accuracy"])
        return {"seen": f"accuracy {accuracies}", **found, "recoveries": seen, "run": str(folder)}

    def grpo(self, seconds: float) -> Line:
        if self.smoke:
            return self._recovered("smoke", self._real_run(), {"grpo"}, seconds)
        return self._recovered("grpo", light_runs.grpo(self.device), {"grpo"}, seconds)

    def cpt(self, seconds: float) -> Line:
        if self.smoke:
            return self._recovered("smoke", self._real_run(), {"cpt"}, seconds)
        return self._recovered("cpt", light_runs.cpt(self.device), {"cpt"}, seconds)

    def real(self, seconds: float) -> Line:
        return self._recovered("smoke" if self.smoke else "real", self._real_run(), {"grpo", "cpt"}, seconds)

    def _real_run(self) -> light_runs.Run:
        if self.model is None or self.data is None:
            raise StageSkipped("no --model DIR and --data FILE")
        train, test = light_runs.questions(self.data, self.test, self.work)
        model = Path(self.model).expanduser().absolute()
        path = self.work / "real.yaml"
        path.write_text(yaml.safe_dump(light_runs.real(model, train, test, self.device, smoke=self.smoke)))
        return path, {}

    def distill(self, seconds: float) -> Line:
        if self.smoke:
            raise StageSkipped("the smoke has one run, without a second model")
        if self.device == "cuda" and visible_gpus() < 2:
            raise StageSkipped("needs two GPUs, one of them for the parent that teaches")
        return self._recovered("distill", light_runs.distill(self.device), {"distill"}, seconds)


def visible_gpus() -> int:
    """As many as ``CUDA_VISIBLE_DEVICES`` names, else as there are device files."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([name for name in named.split(",") if name])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _last_words(error: StageFailed) -> str:
    """With what the command line itself said, where it did."""
    text = error.log.read_text(errors="replace") if error.log else ""
    _, said, words = text.rpartition("\nerror: ")
    return f"{error}: {words.strip()[:1500]}" if said else str(error)


def main(
    minutes: Annotated[float, typer.Option(help="For all stages together.")],
    out: Annotated[Path, typer.Option(help="File of JSON lines, which grows.")] = Path("runs/first-light/lines.jsonl"),
    work: Annotated[Path | None, typer.Option(help="Folder for runs and logs; default: work, beside --out.")] = None,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="What to run on.")] = "cuda",
    smoke: Annotated[bool, typer.Option("--smoke", help="As small as can be: is the script itself whole?")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what is ok in --out, and go on.")] = False,
    only: Annotated[list[str] | None, typer.Option(metavar="STAGE", help="Only these.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder of a real small model, with a chat template.")] = None,
    data: Annotated[str | None, typer.Option(help="Its problems: GSM8K's train.jsonl, or another .jsonl.")] = None,
    test: Annotated[str | None, typer.Option(help="Problems to judge it by; default: some of --data.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of every run.")] = None,
) -> None:
    """See what works on this machine within a time budget."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    out = out.absolute()
    light = FirstLight((work or out.parent / "work").absolute(), device, smoke, model, data, test, settings or [])
    light.work.mkdir(parents=True, exist_ok=True)
    stages = light.stages()
    if unknown := set(only or []) - {stage.name for stage in stages}:
        raise typer.BadParameter(f"--only: no stage {', '.join(sorted(unknown))}; there are {', '.join(CUDA_SECONDS)}")
    sampler = Sampler(read_gpus if device == "cuda" else read_host)
    sampler.start()
    chosen = [stage for stage in stages if not only or stage.name in only]
    print(f"lines: {out}\nruns and logs: {light.work}", flush=True)
    found = run_stages(chosen, Lines(out), seconds=minutes * 60, resume=resume, sampler=sampler)
    print("\n" + "\n".join(verdict(line) for line in found) + f"\nlines: {out}", flush=True)
    raise typer.Exit(1 if any(line["ok"] is False for line in found) else 0)


if __name__ == "__main__":
    typer.run(main)
