"""Every criterion on one model: what is left after one cut, without recovery.

``python benchmarks/criteria.py perplexity smollm2-135m --data gsm8k_train.jsonl --general english.jsonl`` measures the
perplexity on held-out rows of the data after removing channels and blocks; ``python benchmarks/criteria.py demo`` the
demo model's greedy accuracy, over seeds. Both print one markdown table.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from pretrain_testbed import greedy_accuracy
from real_models import folder_of
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl_rl.config import CHANNEL_CRITERIA, ContrastConfig, CriterionConfig, FieldMap, SourceConfig
from ptl_rl.data.corpora import Record, load_corpus
from ptl_rl.data.encoding import Sequence, encode_sequences
from ptl_rl.families import read_shape
from ptl_rl.pruning import engine
from ptl_rl.pruning.choose.choice import Scores, make_plan
from ptl_rl.pruning.score.calibration import batches_for_rank
from ptl_rl.pruning.score.streaming import mean_loss
from ptl_rl.pruning.slice.slicing import slice_checkpoint
from ptl_rl.testbed import CHECKPOINT_DIR

app = typer.Typer(add_completion=False, help=__doc__)
console = Console(stderr=True)
BATCH, RIDGE = 8, 1e-3
SHARES = (0.125, 0.25, 0.5)
LARGEST = 0.75
"""Share of the channels that the order of removal is worked out for."""
BLOCKS = (1, 2, 4)
LAYER_CRITERIA = ("block_influence", "cosine", "leave_one_out")
Ridge = Annotated[float, typer.Option(help="Of compensation and obs.")]


@dataclass(frozen=True)
class Way:
    """A criterion with or without compensation."""

    criterion: CriterionConfig
    sensitivity: bool = False

    @property
    def name(self) -> str:
        tokens = ", sensitivity" if self.sensitivity else ""
        return self.criterion.channels + tokens + (" + least squares" if self.criterion.compensate != "none" else "")


def channel_ways(general: str | None, ridge: float, sensitivity: bool) -> Iterator[Way]:
    """All criteria, each plain and compensated; the released rule only where there is general text."""
    for channels in CHANNEL_CRITERIA:
        contrast = None
        if channels == "ptl_reference":
            if general is None:
                continue
            contrast = ContrastConfig(data=SourceConfig(path=general, fields=FieldMap(text="text")))
        for compensate in ("none", "least_squares"):
            criterion = CriterionConfig(channels=channels, compensate=compensate, contrast=contrast, ridge=ridge)
            yield Way(criterion)
            if sensitivity and channels in ("obs", "rms_contribution"):
                yield Way(criterion, sensitivity=True)


class Bench:
    """One model, its calibration sequences, and how much is left of it after a cut."""

    def __init__(
        self, folder: Path, sequences: list[Sequence], general: list[Sequence], measure: Callable, prompt_weight: float
    ) -> None:
        self.folder, self.sequences, self.general, self.measure = folder, sequences, general, measure
        self.shape, self.prompt_weight = read_shape(folder), prompt_weight
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = load(folder)
        self._scores: dict[tuple, Scores] = {}

    def prunable(self) -> engine.PrunableModel:
        return engine.PrunableModel(
            model=self.model,
            family=self.shape.family,
            source=self.folder,
            device=torch.device("cpu"),
            batch_size=BATCH,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            prompt_weight=self.prompt_weight,
        )

    def scores(self, way: Way, cut: engine.Removal, seed: int) -> Scores:
        """As :func:`engine.score` gives them; where a smaller cut removes a part of what a larger one does, once."""
        criterion = way.criterion
        if cut.layers or criterion.is_ptl_reference:
            general = self.general if criterion.contrast else []
            return engine.score(self.prunable(), criterion, cut, self.sequences, general=general, seed=seed)
        key = (criterion.channels, way.sensitivity, seed)
        if key not in self._scores:
            largest = engine.Removal(round(self.shape.intermediate_size * LARGEST), 0)
            options = {"sensitivity": way.sensitivity, "seed": seed}
            self._scores[key] = engine.score(self.prunable(), criterion, largest, self.sequences, general=[], **options)
        return self._scores[key]

    def after(self, way: Way, cut: engine.Removal, seed: int) -> float:
        """What is measured once ``cut`` is made."""
        plan = make_plan(
            self.scores(way, cut, seed),
            way.criterion,
            remove_channels=cut.channels,
            alignment=1,
            subset_hash="",
            source=self.folder,
        )
        with tempfile.TemporaryDirectory() as out:
            new_weights = Path(out, "new_weights") if plan.compensate != "none" else None
            if new_weights:
                engine.compensate(self.prunable(), plan, self.sequences, new_weights, sensitivity=way.sensitivity)
            sliced = Path(out, "sliced")
            slice_checkpoint(self.folder, plan, sliced, new_weights=new_weights)
            return self.measure(load(sliced))


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def table(head: list[str], rows: Iterator[tuple[str, list[str]]]) -> None:
    """Print a markdown table row by row, as the rows come."""
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
    for name, cells in rows:
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


def sequences_of(tokenizer, records: Iterable[Record], tokens: int, max_tokens: int) -> list[Sequence]:
    """The first records that make up ``tokens`` tokens: question, line break, solution, no chat template."""
    found: list[Sequence] = []
    total = 0
    for record in records:
        if total >= tokens:
            break
        ids = tokenizer.encode(f"{record.question}\n{record.solution}" if record.question else record.solution)
        found.append(Sequence(ids[:max_tokens], 0))
        total += len(found[-1].ids)
    return found


def split(path: str, text: str | None, tokenizer, tokens: int, held_out: int, max_tokens: int):
    """Calibration and held-out sequences of one file, from different rows."""
    source = SourceConfig(path=path, fields=FieldMap(text=text) if text else None)
    records = load_corpus(source, seed=0, max_bad_fraction=0.01)
    evaluated = sequences_of(tokenizer, records, held_out, max_tokens)
    return sequences_of(tokenizer, records[len(evaluated) :], tokens, max_tokens), evaluated


@app.command()
def perplexity(
    model: Annotated[str, typer.Argument(help="smollm2-135m, gemma3-270m, or a folder.")],
    data: Annotated[str, typer.Option(help="jsonl with question and solution, or with the column --text.")],
    general: Annotated[str | None, typer.Option(help="jsonl with the column text, for ptl_reference.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of plain text in --data.")] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    held_out: Annotated[int, typer.Option(help="Tokens that perplexity is measured on.")] = 32768,
    max_tokens: Annotated[int, typer.Option(help="Longest sequence.")] = 512,
    prompt_weight: Annotated[float, typer.Option(help="How much a question's token counts in calibration.")] = 1.0,
    ridge: Ridge = RIDGE,
    only: Annotated[list[str] | None, typer.Option(help="Only these criteria, of channels and of blocks.")] = None,
    sensitivity: Annotated[bool, typer.Option(help="Also weigh tokens by sensitivity.")] = False,
    compensated: Annotated[bool, typer.Option(help="Only with least squares.")] = False,
) -> None:
    """Perplexity after one cut of channels, and after removing blocks."""
    folder = folder_of(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, evaluated = split(data, text, tokenizer, tokens, held_out, max_tokens)
    of_general: list[Sequence] = []
    if general is not None:
        of_general, _ = split(general, "text", tokenizer, 10**9, 0, 128)

    def measure(sliced) -> float:
        # Every token of the text counts, questions too.
        batches = batches_for_rank(evaluated, BATCH, 0, 1, tokenizer.pad_token_id or 0, 1.0)
        return float(torch.tensor(mean_loss(sliced, batches, torch.device("cpu"))).exp())

    bench = Bench(folder, calibration, of_general, measure, prompt_weight)
    read, judged = (sum(len(s.ids) for s in part) for part in (calibration, evaluated))
    print(f"{model}: {read} calibration tokens, perplexity on {judged} others; {torch.get_num_threads()} threads")
    print(f"unpruned: {measure(bench.model):.3f}\n", flush=True)
    width = bench.shape.intermediate_size
    cuts = [engine.Removal(round(width * share), 0) for share in SHARES]
    ways = [
        way
        for way in channel_ways(general, ridge, sensitivity)
        if (not only or way.criterion.channels in only) and not (compensated and way.criterion.compensate == "none")
    ]
    if ways:
        table(
            ["channels", *(f"{share:.1%} removed" for share in SHARES)],
            ((way.name, [timed(bench, way, cut) for cut in cuts]) for way in ways),
        )
    of_blocks = [layers for layers in LAYER_CRITERIA if not only or layers in only]
    if of_blocks:
        print()
        table(["blocks", *(f"{count} removed" for count in BLOCKS)], block_rows(bench, of_blocks, compensated))


def block_rows(bench: Bench, of_blocks: list[str], compensated: bool) -> Iterator[tuple[str, list[str]]]:
    """The layer criteria, each plain and compensated; one greedy order of removal serves all counts."""
    for layers in of_blocks:
        for compensate in ("least_squares",) if compensated else ("none", "least_squares"):
            criterion = CriterionConfig(channels="magnitude", layers=layers, layer_sequences=16, compensate=compensate)
            started = time.monotonic()
            order = engine.score(
                bench.prunable(), criterion, engine.Removal(0, max(BLOCKS)), bench.sequences, general=[]
            ).layer_order
            console.print(f"{layers}, {compensate}: {order} in {time.monotonic() - started:.0f} s")
            found = []
            for count in BLOCKS:
                explicit = CriterionConfig(
                    channels="magnitude", layers="explicit", layer_ids=order[:count], compensate=compensate
                )
                found.append(timed(bench, Way(explicit), engine.Removal(0, count)))
            yield layers + (" + least squares" if compensate != "none" else ""), found


def timed(bench: Bench, way: Way, cut: engine.Removal) -> str:
    started = time.monotonic()
    found = bench.after(way, cut, seed=0)
    console.print(f"{way.name}, {cut}: {found:.3f} in {time.monotonic() - started:.0f} s")
    return f"{found:.2f}" if found < 1e4 else f"{found:.1e}"


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(help="How many calibration sets, of different problems.")] = 5,
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 512,
    count: Annotated[int, typer.Option(help="Test problems.")] = 500,
    general: Annotated[str | None, typer.Option(help="jsonl with the column text, for ptl_reference.")] = None,
    prompt_weight: Annotated[float, typer.Option(help="How much a question's token counts in calibration.")] = 0.2,
    ridge: Ridge = RIDGE,
    only: Annotated[list[str] | None, typer.Option(help="Only these criteria.")] = None,
    compensated: Annotated[bool, typer.Option(help="Only with least squares.")] = False,
) -> None:
    """Greedy accuracy of the shipped model after one cut: mean and range over seeds."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT_DIR)
    of_general = split(general, "text", tokenizer, 10**9, 0, 128)[0] if general else []

    def measure(model) -> float:
        return greedy_accuracy(model, tokenizer, "test", count)

    benches = []
    for seed in range(seeds):
        records = load_corpus(SourceConfig(path="testbed:rl", rows=sequences), seed)
        encoded = encode_sequences(tokenizer, [r.question for r in records], [r.solution for r in records], 160)
        benches.append(Bench(CHECKPOINT_DIR, encoded, of_general, measure, prompt_weight))
    print(f"unpruned: {measure(benches[0].model):.1%}\n", flush=True)
    shares = (0.25, 0.5, 0.75)
    width = benches[0].shape.intermediate_size

    def rows() -> Iterator[tuple[str, list[str]]]:
        for way in channel_ways(general, ridge, sensitivity=True):
            if (only and way.criterion.channels not in only) or (compensated and way.criterion.compensate == "none"):
                continue
            cells = []
            for share in shares:
                cut = engine.Removal(round(width * share), 0)
                found = [bench.after(way, cut, seed) for seed, bench in enumerate(benches)]
                console.print(f"{way.name}, {share:.0%}: {found}")
                cells.append(f"{sum(found) / len(found):.1%} ({min(found):.1%}-{max(found):.1%})")
            yield way.name, cells

    table(["channels", *(f"{share:.0%} removed" for share in shares)], rows())


if __name__ == "__main__":
    app()
