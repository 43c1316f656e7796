"""What the shipped checkpoint can do: greedy and sampled accuracy, and what is left after cutting channels at once.

``python benchmarks/testbed_checkpoint.py`` prints the figures of the model card (a few minutes on two cores).
"""

import itertools
from pathlib import Path
from typing import Annotated

import torch
import typer
from criteria import Bench, Way, load
from pretrain_testbed import greedy_accuracy
from transformers import AutoTokenizer

from ptl_rl.config import CriterionConfig
from ptl_rl.data.encoding import encode_sequences
from ptl_rl.pruning.engine import Removal
from ptl_rl.testbed import CHECKPOINT_DIR
from ptl_rl.testbed.word_problems import problems

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


def bench_of(folder: Path, tokenizer, count: int, prompt_weight: float | None) -> Bench:
    """Cuts are made from 512 problems of the RL split."""
    sample = list(itertools.islice(problems("rl", 0), 512))
    sequences = encode_sequences(tokenizer, [p.question for p in sample], [p.solution for p in sample], 160)
    return Bench(
        folder, sequences, [], lambda model: greedy_accuracy(model, tokenizer, "test", count), prompt_weight or 0.0
    )


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
        bench = bench_of(checkpoint, tokenizer, count, prompt_weight)
        way = Way(
            CriterionConfig(channels=criterion, compensate="least_squares" if compensate else "none"),
            sensitivity=prompt_weight is None,
        )
        found = [f"{bench.after(way, Removal(round(width * share), 0), seed=0):.1%}" for share in shares]
        tokens = "sensitivity" if prompt_weight is None else f"prompt weight {prompt_weight:g}"
        name = f"{criterion}, {'least squares' if compensate else 'plain'}, {tokens}"
        print(f"{name} | " + " | ".join(found), flush=True)


if __name__ == "__main__":
    typer.run(main)
