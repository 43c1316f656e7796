"""Records as token ids: question plus chain of thought as the policy sees them in RL, or plain text."""

from dataclasses import dataclass

from ptl_rl.data.prompts import end_of_answer, prompt_ids


@dataclass(frozen=True)
class Sequence:
    """Question plus chain of thought, or plain text, as token ids."""

    ids: list[int]
    prompt_tokens: int
    """How many of the ids belong to the prompt."""
    weight: float = 1.0
    """How much the sequence counts beside others: 1 for a worked solution, its reward for a rollout."""


def encode_sequences(
    tokenizer, questions: list[str], solutions: list[str], max_tokens: int, weights: list[float] | None = None
) -> list[Sequence]:
    """Question plus chain of thought, as in RL, cut at ``max_tokens``; plain text where the question is empty.

    Args:
        weights: of the sequences; all 1 if None.
    """
    sequences = []
    last = end_of_answer(tokenizer)
    end = [] if last is None else [last]
    for question, solution, weight in zip(questions, solutions, weights or [1.0] * len(questions), strict=True):
        if question:
            prompt = prompt_ids(tokenizer, question)
            ids = prompt + tokenizer.encode(solution, add_special_tokens=False) + end
        else:
            prompt, ids = [], tokenizer.encode(solution)
        sequences.append(Sequence(ids[:max_tokens], min(len(prompt), max_tokens), weight))
    return sequences
