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

from ptl_rl.families import FAMILIES, read_shape
from ptl_rl.pruning.calibration import Collector, batches_for_rank, encode_sequences
from ptl_rl.pruning.criteria import rms_contribution
from ptl_rl.pruning.plan import PruningPlan, choose
from ptl_rl.pruning.slicing import slice_checkpoint
from ptl_rl.testbed import CHECKPOINT_DIR
from ptl_rl.testbed.pretrain import greedy_accuracy
from ptl_rl.testbed.word_problems import problems


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


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


def cut(folder: Path, model, tokenizer, share: float, out: Path) -> None:
    """Slice ``share`` of all channels away at once, by ``rms_contribution`` on 256 problems of the RL split."""
    shape = read_shape(folder)
    sample = list(itertools.islice(problems("rl", 0), 256))
    sequences = encode_sequences(tokenizer, [p.question for p in sample], [p.solution for p in sample], 160)
    collector = Collector(model, FAMILIES[shape.family.model_type], shape.intermediate_size, torch.device("cpu"))
    with torch.no_grad(), collector.attached():
        for ids_BT, mask_BT in batches_for_rank(sequences, 32, 0, 1, tokenizer.pad_token_id):
            collector.start_batch(mask_BT)
            model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=1)
    statistics = collector.reduce()
    channels, layers = choose(
        rms_contribution(statistics),
        torch.ones(shape.num_hidden_layers),
        remove_channels=round(shape.intermediate_size * share),
        remove_layers=0,
    )
    plan = PruningPlan(
        keep_channels=channels,
        keep_layers=layers,
        source_intermediate_size=shape.intermediate_size,
        alignment=1,
        channel_criterion="rms_contribution",
        layer_criterion="none",
        subset_hash="",
        source=str(folder),
    )
    slice_checkpoint(folder, plan, out)


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")] = CHECKPOINT_DIR,
    count: Annotated[int, typer.Option(help="Test problems.")] = 500,
) -> None:
    """Print greedy and sampled accuracy, then greedy accuracy after one cut without recovery."""
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), load(checkpoint)
    print(f"greedy, {count} test problems: {greedy_accuracy(model, tokenizer, 'test', count):.1%}", flush=True)
    print(f"sampled at temperature 1, 64 problems x 8: {sampled_accuracy(model, tokenizer, 64, 8):.1%}", flush=True)
    for share in (0.25, 0.5, 0.625, 0.75):
        with tempfile.TemporaryDirectory() as folder:
            cut(checkpoint, model, tokenizer, share, Path(folder))
            accuracy = greedy_accuracy(load(Path(folder)), tokenizer, "test", count)
            print(f"{share:.1%} of all channels cut at once, unrecovered: {accuracy:.1%}", flush=True)


if __name__ == "__main__":
    typer.run(main)
