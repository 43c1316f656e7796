"""Pre-train the demo model from nothing on two CPU cores: ``python benchmarks/pretrain_testbed.py OUT``.

The shipped checkpoints came from this script; it is kept runnable so that anyone can make one again, larger, or for
another family.
"""

import itertools
import json
import math
import random
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from ptl_rl.families import FAMILIES
from ptl_rl.pruning.masking import skipped
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.testbed import programs, word_problems
from ptl_rl.testbed.problem import EASY, LEVELS, Problem
from ptl_rl.testbed.tiny_models import tiny_model
from ptl_rl.testbed.tokenizer import build_tokenizer
from reward.programs.reward import code_reward

HARD = tuple(level for level in LEVELS if level not in EASY)
LONGEST_ANSWER = 160
"""Tokens."""
QUESTION_WEIGHT = 0.1
"""Of a token of the question in the loss. Its numbers are drawn at random: most of its loss cannot be learned."""

JUMPS = {4: (0.0, 0.38), 5: (0.05, 0.65)}
"""Level to the lowest and highest share of its solutions, by template, that are the answer alone in pre-training.

Text on the web is no more careful. An answer without its steps is mostly wrong when the model gives it, so that it can
do more than it does, and reinforcement has something to find: an arithmetic slip is too rare and too varied a thing to
learn from the rewards of a few thousand answers.
"""

Kind = Literal["words", "programs"]
STREAMS: dict[Kind, Callable[[str, int, Collection[int]], Iterator[Problem]]] = {
    "words": word_problems.problems,
    "programs": programs.problems,
}
"""What a model can be trained on."""


def is_right(kind: Kind, problem: Problem, text: str) -> bool:
    """Whether a response ends in the right box, or its program, run in a confined process, passes the tests."""
    if kind == "programs":
        return code_reward(text, problem.answer) == 1.0
    return text.endswith(f"\\boxed{{{problem.answer}}}")


def encode(tokenizer, problem: Problem) -> tuple[list[int], int]:
    """Token ids of prompt, solution and end token, and the prompt's length in tokens."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    return prompt + tokenizer.encode(problem.solution) + [tokenizer.eos_token_id], len(prompt)


def jump_share(problem: Problem) -> float:
    """How often the answer to such a word problem stands alone in pre-training: evenly spread over the templates."""
    low, high = JUMPS.get(problem.level, (0.0, 0.0))
    templates = list(word_problems.TEMPLATES)
    return low + (high - low) * templates.index(problem.template) / (len(templates) - 1)


def batches(
    tokenizer, batch_size: int, seed: int, kind: Kind, hard_share: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input_ids_BT, weights_BT): 1 for a token of the answer, QUESTION_WEIGHT before it, 0 for padding.

    ``hard_share`` of the problems are of :data:`HARD` levels; some of their solutions are the answer alone, by
    :data:`JUMPS`.
    """

    def written(problem: Problem) -> Problem:
        if kind == "words" and rng.random() < jump_share(problem):
            return replace(problem, solution=problem.solution.rsplit("\n", 1)[1])
        return problem

    easy, hard = (STREAMS[kind]("pretrain", seed, levels) for levels in (EASY, HARD))
    rng = random.Random(seed)
    while True:
        # Sixteen batches are sorted by length together, so that little is padded.
        drawn = (next(hard if rng.random() < hard_share else easy) for _ in range(batch_size * 16))
        window = [encode(tokenizer, written(p)) for p in drawn]
        window.sort(key=lambda row: len(row[0]))
        groups = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            width = len(group[-1][0])
            ids_BT = torch.full((len(group), width), tokenizer.pad_token_id)
            weights_BT = torch.zeros(len(group), width)
            for row, (ids, length) in enumerate(group):
                ids_BT[row, : len(ids)] = torch.tensor(ids)
                weights_BT[row, :length], weights_BT[row, length : len(ids)] = QUESTION_WEIGHT, 1
            yield ids_BT, weights_BT


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, then cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def answers(model, tokenizer, problems: list[Problem], samples: int = 0) -> list[list[str]]:
    """Responses to every problem: one, greedy, or so many sampled at temperature 1."""
    found: list[list[str]] = []
    for start in range(0, len(problems), 50):
        part = problems[start : start + 50]
        prompts = [encode(tokenizer, p) for p in part]
        longest = max(length for _, length in prompts)
        ids_BT = torch.full((len(part), longest), tokenizer.pad_token_id)
        for row, (ids, length) in enumerate(prompts):
            ids_BT[row, longest - length :] = torch.tensor(ids[:length])
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": samples}
        out_BT = model.generate(
            ids_BT,
            attention_mask=(ids_BT != tokenizer.pad_token_id).long(),
            max_new_tokens=LONGEST_ANSWER,
            **(sampling if samples else {"do_sample": False}),
        )
        texts = tokenizer.batch_decode(out_BT[:, longest:], skip_special_tokens=True)
        each = max(1, samples)
        found += [texts[i : i + each] for i in range(0, len(texts), each)]
    return found


def greedy_accuracy(
    model, tokenizer, split: str, count: int, kind: Kind = "words", levels: Collection[int] = EASY
) -> float:
    """The share of ``count`` problems of a split that are right, greedily."""
    problems = list(itertools.islice(STREAMS[kind](split, 0, levels), count))
    responses = answers(model, tokenizer, problems)
    return sum(is_right(kind, p, text) for p, (text,) in zip(problems, responses, strict=True)) / count


def accuracies(model, tokenizer, kind: Kind, split: str, level: int, count: int) -> dict[str, float]:
    """Share of ``count`` problems of a level that are right greedily; of half of them sampled, and once in eight."""
    problems = list(itertools.islice(STREAMS[kind](split, 0, [level]), count))
    greedy, sampled = answers(model, tokenizer, problems), answers(model, tokenizer, problems[: count // 2], samples=8)

    def right(responses: list[list[str]]) -> list[list[bool]]:
        pairs = zip(problems, responses, strict=False)
        return [[is_right(kind, problem, text) for text in texts] for problem, texts in pairs]

    of_greedy, of_sampled = right(greedy), right(sampled)
    return {
        "greedy": sum(map(any, of_greedy)) / count,
        "pass@1": sum(map(sum, of_sampled)) / (8 * len(of_sampled)),
        "pass@8": sum(map(any, of_sampled)) / len(of_sampled),
    }


@torch.no_grad()
def add_blocks(model, layers: int):
    """``model`` grown to ``layers`` blocks, of which those at the end pass their input on at first.

    Raises:
        ValueError: it has as many already.
    """
    before = model.config.num_hidden_layers
    if before >= layers:
        raise ValueError(f"the model has {before} blocks, {layers} are asked for")
    fields = model.config.to_dict() | {"num_hidden_layers": layers}
    fields.pop("layer_types", None)  # one entry per block; the config works it out anew
    larger = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
    larger.load_state_dict(model.state_dict(), strict=False)
    for block in larger.model.layers[before:]:
        if hasattr(block, "pre_feedforward_layernorm"):
            # Gemma 2 and 3 norm what both halves add, and scale it by one plus the weight.
            block.post_attention_layernorm.weight.fill_(-1)
            block.post_feedforward_layernorm.weight.fill_(-1)
        else:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return larger


def train(
    model,
    stream: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    peak_lr: float,
    *,
    block_drop: float = 0.0,
    seed: int = 0,
    autocast: bool = False,
) -> float:
    """Train ``model`` in place; returns the last step's loss on answers, blocks left out or not.

    The matrices of the blocks learn by Muon, everything else by AdamW. With as many steps the loss on answers is half
    of what AdamW alone comes to.

    Args:
        stream: gives (input_ids_BT, weights_BT).
        block_drop: share of steps in which one block, drawn at random, passes its input on. Few blocks have nothing to
            spare; where each is missing at times, one can go for good at a cost that training makes up for.
    """
    blocks = list(model.model.layers.parameters())
    matrices, vectors = [p for p in blocks if p.ndim == 2], [p for p in model.parameters() if p.ndim == 1]
    inside = {id(p) for p in blocks}
    embeddings = [p for p in model.parameters() if p.ndim == 2 and id(p) not in inside]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=peak_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": embeddings, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=peak_lr,
            betas=(0.9, 0.98),
        ),
    ]
    family, rng, loss = FAMILIES[model.config.model_type], random.Random(seed), 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task, started = bar.add_task("pre-training", total=steps), time.time()
        for step in range(steps):
            ids_BT, weights_BT = next(stream)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = learning_rate(step, steps, peak_lr)
            dropped = [rng.randrange(model.config.num_hidden_layers)] if rng.random() < block_drop else []
            with skipped(model, family, dropped), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits_BTV = model(input_ids=ids_BT).logits.float()
            targets, weights = ids_BT[:, 1:].flatten(), weights_BT[:, 1:].flatten()
            each = cross_entropy(logits_BTV[:, :-1].flatten(0, 1), targets, reduction="none")
            ((each * weights).sum() / weights.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            loss = each[weights == 1].mean().item()
            bar.update(task, advance=1, description=f"loss {loss:.3f}")
            if step % 100 == 99:
                bar.print(f"step {step + 1} loss {loss:.4f} {time.time() - started:.0f} s")
    return loss


def history(folder: Path) -> dict[str, Any]:
    """How a checkpoint came about: this script's record, or what ``ptl slice`` cut it from, as far as is known."""
    if (folder / "pretraining.json").exists():
        return json.loads((folder / "pretraining.json").read_text())
    if not (folder / "plan.json").exists():
        return {"folder": folder.name}
    plan = PruningPlan.load(folder / "plan.json")
    cut = {"intermediate_size": plan.intermediate_size, "layers": plan.num_hidden_layers}
    return {"sliced_to": cut, "continued_from": history(Path(plan.source))}


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the Hugging Face checkpoint.")],
    family: Annotated[str, typer.Option(help="qwen2, llama, qwen3, gemma2 or gemma3.")] = "qwen2",
    kind: Annotated[Kind, typer.Option(help="What it learns: word problems, or to write programs.")] = "words",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 3000,
    batch_size: Annotated[int, typer.Option(min=1, help="Problems per step.")] = 64,
    peak_lr: Annotated[float, typer.Option(min=0, help="Peak learning rate, of Muon and of AdamW.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights and problems.")] = 0,
    intermediate_size: Annotated[int, typer.Option(min=1, help="FFN channels per block.")] = 640,
    layers: Annotated[int, typer.Option(min=1, help="Blocks.")] = 4,
    block_drop: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of steps that leave one block out, so that each can be done without at some cost."
        ),
    ] = 0.0,
    hard_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of problems of levels 4 and 5; the others are of 1 to 3.")
    ] = 0.25,
    dtype: Annotated[str, typer.Option(help="Type of the saved weights: bfloat16 or float32.")] = "bfloat16",
    autocast: Annotated[bool, typer.Option(help="Matrix products in bfloat16: faster where the CPU has AMX.")] = True,
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="Continue from a checkpoint of this script, its family and sizes; more blocks if --layers is more."
        ),
    ] = None,
) -> None:
    """Pre-train a tiny model on the pre-training split and save it, with its accuracy by level on validation."""
    tokenizer = build_tokenizer(stream=STREAMS[kind]("pretrain", 1234, LEVELS))
    if start_from and not (start_from / "config.json").exists():
        raise typer.BadParameter(f"{start_from} is no checkpoint: it has no config.json")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model(family, seed=seed, intermediate_size=intermediate_size, num_hidden_layers=layers, **ids)
    if start_from:
        continued_from = history(start_from)
        model = AutoModelForCausalLM.from_pretrained(start_from, dtype=torch.float32)
        if model.config.num_hidden_layers < layers:
            model = add_blocks(model, layers)
    stream, started = batches(tokenizer, batch_size, seed, kind, hard_share), time.time()
    loss = train(model, stream, steps, peak_lr, block_drop=block_drop, seed=seed, autocast=autocast)
    seconds = time.time() - started
    # Rounded as they are saved, so that the accuracy is that of the saved weights.
    model = model.to(getattr(torch, dtype)).float().eval()
    model.to(getattr(torch, dtype)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    model = model.float()
    by_level = {level: accuracies(model, tokenizer, kind, "validation", level, 200) for level in LEVELS}
    record = {
        "family": model.config.model_type,
        "kind": kind,
        "steps": steps,
        "batch_size": batch_size,
        "peak_lr": peak_lr,
        "seed": seed,
        "intermediate_size": model.config.intermediate_size,
        "layers": model.config.num_hidden_layers,
        "block_drop": block_drop,
        "hard_share": hard_share,
        "jumps": JUMPS if kind == "words" else None,
        "autocast": autocast,
        "seconds": round(seconds),
        "final_loss": loss,
        "accuracy_by_level_validation_200": by_level,
    }
    if start_from:
        record["continued_from"] = continued_from
    (out / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    typer.run(main)
