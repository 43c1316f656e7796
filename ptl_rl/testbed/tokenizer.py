"""A small byte-level BPE tokenizer trained on generated problems, with a chat template.

Transformers builds the tokenizer class of a ``qwen2`` model from its ``model_type``, which is byte-level BPE whatever
``tokenizer.json`` says, so the test bed uses exactly that class for every family.
"""

import itertools
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from ptl_rl.testbed import word_problems
from ptl_rl.testbed.problem import LEVELS, Problem

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2's own split pattern: single digits, words with their leading space, runs of punctuation.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(
    vocab_size: int = VOCAB_SIZE, sample_problems: int = 4000, stream: Iterable[Problem] | None = None
) -> Qwen2Tokenizer:
    """Train the tokenizer on the first ``sample_problems``; deterministic. ``len(tokenizer) == vocab_size``.

    Args:
        stream: default: word problems of the pre-training split.
    """
    from tokenizers import Regex

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stream = word_problems.problems("pretrain", 1234, LEVELS) if stream is None else stream
    texts = [p.question + "\n" + p.solution for p in itertools.islice(stream, sample_problems)]
    raw.train_from_iterator(["user\n", "assistant\n", *texts], trainer=trainer)
    import json

    model = json.loads(raw.to_str())["model"]
    vocab = dict(model["vocab"])
    for token in (PAD, START, END):
        vocab[token] = len(vocab)
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,
        additional_special_tokens=[START],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
