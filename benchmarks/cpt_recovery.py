"""What continued pre-training gives back to a real small model: gradual, at once, and on the unpruned model.

``python benchmarks/cpt_recovery.py --data gsm8k_train.jsonl --test gsm8k_test.jsonl --out DIR`` cuts SmolLM2-135M by an
eighth of its channels twice, each cut recovered on half of the tokens, and by a quarter once, recovered on all of them;
with and without compensation; the unpruned model is trained on the same tokens. Perplexity on the solutions of other
problems. Cuts are those of ``benchmarks/criteria.py``, training is a run's own stage ``recover``. What is in DIR
already is not made again.
"""

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer
from criteria import BATCH, load, table
from real_models import folder_of
from rich.console import Console
from transformers import AutoTokenizer

from ptl_rl.config import CriterionConfig, RunConfig, SourceConfig
from ptl_rl.config.recipe import parse_config, save_config
from ptl_rl.cpu.checks import cpu_env_vars
from ptl_rl.data.corpora import load_corpus
from ptl_rl.data.encoding import encode_sequences
from ptl_rl.data.frozen import freeze
from ptl_rl.driver.processes import start_stage
from ptl_rl.driver.ray_session import RaySession
from ptl_rl.families import read_shape
from ptl_rl.pruning import engine
from ptl_rl.pruning.choose.choice import make_plan
from ptl_rl.pruning.score.calibration import batches_for_rank
from ptl_rl.pruning.score.streaming import mean_loss
from ptl_rl.pruning.slice.slicing import slice_checkpoint
from ptl_rl.stage import StageSpec

console = Console(stderr=True)
MAX_TOKENS = 512
CALIBRATION_SEQUENCES = 96


@dataclass(frozen=True)
class Arm:
    """One way to spend the tokens."""

    name: str
    shares: tuple[float, ...]
    """Of the original's channels, cut before each part of the training; none for the unpruned model."""
    criterion: CriterionConfig | None = None


def arms() -> list[Arm]:
    """The unpruned model, and every criterion gradually and at once."""
    found = [Arm("unpruned", ())]
    for channels, compensate in (
        ("obs", "least_squares"),
        ("rms_contribution", "least_squares"),
        ("rms_contribution", "none"),
    ):
        criterion = CriterionConfig(channels=channels, compensate=compensate)
        name = channels + (" + least squares" if compensate != "none" else "")
        found += [
            Arm(f"{name}, 12.5 % twice", (0.125, 0.125), criterion),
            Arm(f"{name}, 25 % once", (0.25,), criterion),
        ]
    return found


class Work:
    """A model, its data, and a folder in which every checkpoint made stands under its arm's number."""

    def __init__(self, model: Path, config: RunConfig, test: str, tokens: int, out: Path) -> None:
        self.model, self.config, self.tokens, self.out = model, config, tokens, out
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.records = load_corpus(config.data.train_sources[0], config.seed, 0.01)
        self.held_out = self._encoded(list(load_corpus(SourceConfig(path=test), 0, 0.01)))
        self.address = ""

    def _encoded(self, records: list) -> list:
        return encode_sequences(
            self.tokenizer, [r.question for r in records], [r.solution for r in records], MAX_TOKENS
        )

    def perplexity(self, folder: Path) -> float:
        """Of the held-out solutions, given their questions."""
        batches = batches_for_rank(self.held_out, BATCH, 0, 1, self.tokenizer.pad_token_id or 0, 0.0)
        return math.exp(mean_loss(load(folder), batches, engine.torch.device("cpu")))

    def cut(self, source: Path, out: Path, channels: int, criterion: CriterionConfig) -> None:
        """Slice ``channels`` from every block, as a cycle does."""
        prunable = engine.PrunableModel(
            load(source),
            read_shape(source).family,
            source,
            engine.torch.device("cpu"),
            BATCH,
            self.tokenizer.pad_token_id or 0,
            self.config.calibration.prompt_weight,
        )
        sequences = self._encoded([self.records[i] for i in range(CALIBRATION_SEQUENCES)])
        scores = engine.score(prunable, criterion, engine.Removal(channels, 0), sequences, general=[], seed=0)
        plan = make_plan(scores, criterion, remove_channels=channels, alignment=64, subset_hash="", source=source)
        weights = out.with_name(out.name + ".weights") if plan.compensate != "none" else None
        if weights:
            engine.compensate(prunable, plan, sequences, weights)
        slice_checkpoint(source, plan, out, new_weights=weights)
        if weights:
            shutil.rmtree(weights)

    def recover(self, source: Path, out: Path, part: int, parts: int, steps: int) -> dict[str, Any]:
        """The stage ``recover`` on part ``part`` of the data; its metrics."""
        work = out.with_name(out.name + ".work")
        shutil.rmtree(work, ignore_errors=True)
        (work / "logs").mkdir(parents=True)
        save_config(self.config, work / "config.json")
        label = f"bench-{uuid4().hex[:8]}-{out.name}"
        spec = StageSpec(
            name="recover",
            cycle=1,
            round=0,
            device="cpu",
            attention="sdpa",
            ray_address=self.address,
            stage_id=label,
            source=source,
            parent=self.model,
            out=work / "out",
            work=work / "work",
            progress=work / "progress",
            result=work / "result",
            data=freeze(self.config, parts, work / "data").folder,
            subset=part,
            subsets=parts,
            remove_channels=64,
            remove_layers=0,
            removed_layers=0,
            steps=steps,
            alignment=64,
        )
        spec.out.mkdir()
        spec_path, log = work / "logs" / "spec.json", work / "logs" / "log"
        spec_path.write_text(spec.model_dump_json())
        env = {**cpu_env_vars(1), "RAY_ADDRESS": self.address}
        env |= {"PTL_RUN_ID": label, "PTL_STAGE_ID": label}
        if start_stage(spec_path, log, env).wait():
            raise SystemExit(f"the recovery failed; see {log}")
        spec.out.rename(out)
        metrics = json.loads(spec.result.read_text())
        shutil.rmtree(work)
        return metrics

    def run(self, index: int, arm: Arm) -> dict[str, Any]:
        """Make ``arm``, or read what it was."""
        record = self.out / f"{index}.json"
        if record.exists():
            return json.loads(record.read_text())
        started, now = time.time(), self.model
        width = read_shape(self.model).intermediate_size
        parts = max(1, len(arm.shares))
        found: dict[str, Any] = {"name": arm.name, "cut": [], "recovered": [], "tokens": 0, "steps": 0}
        for part in range(parts):
            if arm.criterion:
                sliced = self.out / f"{index}-{part}-sliced"
                shutil.rmtree(sliced, ignore_errors=True)
                self.cut(now, sliced, round(width * arm.shares[part]), arm.criterion)
                found["cut"].append(self.perplexity(sliced))
                now = sliced
            recovered = self.out / f"{index}-{part}-recovered"
            shutil.rmtree(recovered, ignore_errors=True)
            steps = self.tokens // parts // self.config.recovery[0].tokens_per_step
            metrics = self.recover(now, recovered, part, parts, steps)
            found["tokens"] += metrics["tokens"]
            found["steps"] += steps
            found["recovered"].append(self.perplexity(recovered))
            console.print(f"{arm.name}: {found}")
            now = recovered
        found["seconds"] = round(time.time() - started)
        record.write_text(json.dumps(found) + "\n")
        return found


def main(
    data: Annotated[str, typer.Option(help="jsonl with question and solution: calibration and training.")],
    test: Annotated[str, typer.Option(help="jsonl of other problems, which perplexity is measured on.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and results.")],
    model: Annotated[str, typer.Option(help="smollm2-135m, gemma3-270m, or a folder.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Training tokens of each row.")] = 65536,
    tokens_per_step: Annotated[int, typer.Option(help="Global batch.")] = 4096,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine.")] = 1e-4,
    seed: Annotated[int, typer.Option(help="Order of data.")] = 0,
    only: Annotated[list[int] | None, typer.Option(help="Only these rows, from 0.")] = None,
) -> None:
    """Perplexity after each cut and each recovery."""
    folder = folder_of(model)
    out = out.absolute() / f"{folder.name}-{tokens}-{tokens_per_step}-{learning_rate:g}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    config = parse_config(
        {
            "seed": seed,
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {
                "train": {"path": str(Path(data).absolute())},
                "validation": {"path": "testbed:validation", "rows": 128},  # nobody reads them; all of data is train
                "test": {"path": "testbed:test", "rows": 500},
                "decontaminate": "off",
            },
            "calibration": {"prompt_weight": 1.0},
            "schedule": {"channels_per_cycle": [64]},
            "recovery": [
                {
                    "cpt": {
                        "tokens_per_step": tokens_per_step,
                        "max_tokens": MAX_TOKENS,
                        "micro_batch_tokens": 2048,
                        "learning_rate": learning_rate,
                        "gradient_checkpointing": False,
                    }
                }
            ],
            "resources": {"device": "cpu", "workers_per_node": 1},
        }
    )
    work = Work(folder, config, test, tokens, out)
    judged = sum(len(s.ids) - s.prompt_tokens for s in work.held_out)
    print(
        f"{model}: perplexity on {judged} tokens of solutions; unpruned and untrained {work.perplexity(folder):.3f}\n"
    )
    with RaySession(config, "cpu") as session:
        work.address = session.address
        rows = (work.run(i, arm) for i, arm in enumerate(arms()) if not only or i in only)
        table(
            ["", "after each cut", "after each recovery", "steps", "tokens", "minutes"],
            ((row["name"], cells(row)) for row in rows),
        )


def cells(row: dict[str, Any]) -> list[str]:
    cut, recovered = (", ".join(f"{value:.2f}" for value in row[key]) for key in ("cut", "recovered"))
    return [cut, recovered, str(row["steps"]), f"{row['tokens']:.0f}", f"{row['seconds'] / 60:.1f}"]


if __name__ == "__main__":
    typer.run(main)
