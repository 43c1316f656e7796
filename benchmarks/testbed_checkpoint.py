"""What the shipped checkpoint can do: greedy and sampled accuracy, and what is left after cutting channels at once.

``python benchmarks/testbed_checkpoint.py`` prints the figures of the model card (a few minutes on two cores).
"""

import itertools
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl_rl.families import read_shape
from ptl_rl.pruning.calibration import Collector, batches_for_rank, encode_sequences, stream
from ptl_rl.pruning.compensation import least_squares, obs_importance
from ptl_rl.pruning.criteria import CHANNEL_CRITERIA
from ptl_rl.pruning.moments import SecondMoments
from ptl_rl.pruning.plan import PruningPlan, choose
from ptl_rl.pruning.slicing import save_compensated, slice_weights, write_companions
from ptl_rl.testbed import CHECKPOINT_DIR
from ptl_rl.testbed.pretrain import greedy_accuracy
from ptl_rl.testbed.word_problems import problems

RIDGE = 1e-3
WAYS = (
    ("activation", False, 1.0),
    ("rms_contribution", False, 1.0),
    ("rms_contribution", False, 0.2),
    ("rms_contribution", True, 1.0),
    ("rms_contribution", True, 0.2),
    ("obs", True, 1.0),
    ("obs", True, 0.2),
    ("rms_contribution", False, None),
    ("rms_contribution", True, None),
    ("obs", True, None),
)
"""Criterion, compensation, and how much a token of the question counts; None: tokens count by sensitivity."""


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def sampled_accuracy(model, tokenizer, prompts: int, samples: int) -> float:
    """Mean accuracy at temperature 1 over ``samples`` answers to each of ``prompts`` problems of the RL split."""
    right = 0
    torch.manual_seed(0)
    for problem in itertools.islice(problems("rl", 0), prompts):
        message = [{"role": "user", "content": problem.question}]
        prompt = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out_BT = model.generate(
            **prompt, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=72, num_return_sequences=samples
        )
        texts = tokenizer.batch_decode(out_BT[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.endswith(f"\\boxed{{{problem.answer}}}") for text in texts)
    return right / (prompts * samples)


class Scores:
    """Statistics of 512 problems of the RL split, from one forward pass."""

    def __init__(self, folder: Path, model, tokenizer, prompt_weight: float | None) -> None:
        shape = read_shape(folder)
        sample = list(itertools.islice(problems("rl", 0), 512))
        sequences = encode_sequences(tokenizer, [p.question for p in sample], [p.solution for p in sample], 160)
        cpu = torch.device("cpu")
        collector = Collector(model, shape.family, shape.intermediate_size, cpu)
        self.moments = SecondMoments(model, shape.family, shape.intermediate_size, cpu)
        batches = batches_for_rank(sequences, 32, 0, 1, tokenizer.pad_token_id, prompt_weight or 0.0)
        stream(model, shape.family, batches, [collector, self.moments], cpu, sensitivity=prompt_weight is None)
        self.statistics = collector.reduce()


def cut(folder: Path, model, scores: Scores, criterion: str, compensate: bool, remove: int, out: Path) -> None:
    """Slice ``remove`` channels of every block away at once."""
    shape = read_shape(folder)
    blocks = model.get_submodule(shape.family.layers).children()
    weights = [block.get_parameter("mlp.down_proj.weight").detach() for block in blocks]
    if criterion == "obs":
        moments = scores.moments.own_CC
        importance = [obs_importance(w, moments[i], remove, RIDGE) for i, w in enumerate(weights)]
        importance_LC = torch.stack(importance)
    else:
        importance_LC = CHANNEL_CRITERIA[criterion](scores.statistics)
    channels, layers = choose(importance_LC, torch.ones(len(weights)), remove_channels=remove, remove_layers=0)
    plan = PruningPlan(
        keep_channels=channels,
        keep_layers=layers,
        source_intermediate_size=shape.intermediate_size,
        alignment=1,
        channel_criterion=criterion,
        layer_criterion="none",
        compensate="least_squares" if compensate else "none",
        ridge=RIDGE,
        subset_hash="",
        source=str(folder),
    )
    compensated = None
    if compensate:
        compensated = out / "compensated"
        for layer, weight in enumerate(weights):
            fit = least_squares(weight, scores.moments.own_CC[layer], channels[layer], RIDGE)
            save_compensated(compensated, layer, fit.weight_HK)
    write_companions(folder, plan, out, slice_weights(folder, plan, out, compensated=compensated))


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")] = CHECKPOINT_DIR,
    count: Annotated[int, typer.Option(help="Test problems.")] = 500,
) -> None:
    """Print greedy and sampled accuracy, then greedy accuracy after one cut without recovery."""
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), load(checkpoint)
    print(f"greedy, {count} test problems: {greedy_accuracy(model, tokenizer, 'test', count):.1%}", flush=True)
    print(f"sampled at temperature 1, 64 problems x 8: {sampled_accuracy(model, tokenizer, 64, 8):.1%}", flush=True)
    shares = (0.25, 0.5, 0.625, 0.75)
    print("greedy after one cut, unrecovered | " + " | ".join(f"{share:.1%} of all channels" for share in shares))
    width = model.config.intermediate_size
    for criterion, compensate, prompt_weight in WAYS:
        scores = Scores(checkpoint, model, tokenizer, prompt_weight)
        found = []
        for share in shares:
            with tempfile.TemporaryDirectory() as folder:
                cut(checkpoint, model, scores, criterion, compensate, round(width * share), Path(folder))
                found.append(f"{greedy_accuracy(load(Path(folder)), tokenizer, 'test', count):.1%}")
        tokens = "sensitivity" if prompt_weight is None else f"prompt weight {prompt_weight:g}"
        name = f"{criterion}, {'least squares' if compensate else 'plain'}, {tokens}"
        print(f"{name} | " + " | ".join(found), flush=True)


if __name__ == "__main__":
    typer.run(main)
