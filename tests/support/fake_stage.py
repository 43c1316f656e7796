"""Stands in for a stage's process in tests of the driver: reads its spec, leaves plausible files, or fails on demand.

Nothing but the standard library is imported, so that it starts in a moment. ``acts.json`` in the run's folder says what
is special: the key is a stage's label (``001-recover``) or one start of it (``001-recover.2``); the value is the
accuracy of an evaluation, or the name of a way to fail. Unlike the real stage it does not end with its driver.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

FILES = {
    "score": ["scores.safetensors"],
    "slice": ["plan.json", "model.safetensors"],
    "recover": ["model.safetensors"],
    "evaluate": ["eval.json", "samples.parquet"],
}
SIZES = {"intermediate_size": 800, "num_hidden_layers": 4}
COUNTS = {
    "problems": 100,
    "truncated": 7,
    "parameters": 1000,
    "flops_per_token": 2000,
    "tokens_per_second": 9.0,
    "tokens_per_answer": 5.0,
}
METRICS: dict[str, dict] = {
    "score": {},
    "slice": SIZES,
    "recover": {"method": "grpo", "steps": 2, "curve": []},
    "evaluate": {**SIZES, **COUNTS},
}
PATIENCE = 60
"""Seconds that a stalled stage lives at most."""


def _report(spec: dict, done: int) -> None:
    line = json.dumps({"time": time.time(), "done": done, "total": 2, "metrics": {"reward": done / 2}})
    with Path(spec["progress"]).open("a") as file:
        file.write(line + "\n")


def _start_another(env: dict[str, str] | None = None) -> None:
    sleep = [sys.executable, "-c", f"import time; time.sleep({PATIENCE})"]
    subprocess.Popen(sleep, start_new_session=True, env=env)


def _stall(spec: dict) -> None:
    """One step, then silence, here and in a process that is in a session of its own, as Ray's and vLLM's are."""
    _start_another()
    _report(spec, 1)
    time.sleep(PATIENCE)


def _cut_in_place(spec: dict, act: str) -> None:
    """As a recovery in place: folders of cuts, each there before the step that it follows is reported."""
    for number, channels in enumerate((384, 256), 1):
        folder = Path(spec["work"]).parent / f"cuts/{number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"after_step": number - 1, "intermediate_size": channels + ("other" in act)}
        (folder / "plan.json").write_text("{}")
        (folder / "cut.json").write_text(json.dumps(facts))
        _report(spec, number)
        if "raise" in act:
            time.sleep(0.3)  # until the driver has read it
            _raise()


def _raise() -> None:
    try:
        raise ValueError("of a worker")
    except ValueError:
        raise RuntimeError("planted: no rows left") from None


def _work(spec: dict, act: object) -> dict:
    """Fill ``out``; ``config.json`` says who made it of what."""
    out, work = Path(spec["out"]), Path(spec["work"])
    assert not list(out.iterdir()), f"{out} is not empty"
    source = json.loads((Path(spec["source"]) / "config.json").read_text())
    made = {"made_by": spec["stage_id"], "made_of": source.get("made_by", "original")}
    if spec["name"] == "recover":
        made["went_on"] = work.exists()
        work.mkdir(exist_ok=True)
        (work / "checkpoint").write_text("half of it")
    if act in ("cuts", "one cut, then raise", "one other cut, then raise"):
        _cut_in_place(spec, str(act))
    if act == "cuts and the last as it was made":
        _cut_in_place(spec, act)
        (out / "after_cut").mkdir()
        (out / "after_cut/config.json").write_text("{}")
    if act == "stall":
        _stall(spec)
    if act == "silence":
        time.sleep(PATIENCE)
    if act == "raise":
        _raise()
    if act == "daemon":  # of the run, not of this stage
        _start_another({name: value for name, value in os.environ.items() if name != "PTL_STAGE_ID"})
    if act != "no files":
        (out / "config.json").write_text(json.dumps(made))
        for name in FILES[spec["name"]]:
            (out / name).write_text("{}")
    accuracy = act if isinstance(act, float) else 0.8
    found = {"stage_seconds": 1.0, "made_by": spec["stage_id"], **METRICS[spec["name"]], "accuracy": accuracy}
    return {**found, "learns": False} if act == "dead rewards" else found


def main() -> None:
    spec_path = Path(sys.argv[1])
    spec = json.loads(spec_path.read_text())
    acts = json.loads((spec_path.parent.parent / "acts.json").read_text())
    start = spec_path.name.removesuffix(".spec.json")
    act = acts.get(start, acts.get(start.rpartition(".")[0]))
    print(f"{start} is at work", flush=True)
    metrics, result = json.dumps(_work(spec, act)), Path(spec["result"])
    if act == "cut short":
        result.write_text(metrics[:-9])
    elif act != "no result":
        result.write_text(metrics)
    _report(spec, 1)
    _report(spec, 2)
    if act == "status 3":
        sys.exit(3)


if __name__ == "__main__":
    main()
