"""How a question is put to the policy, everywhere, in scoring, training, rollouts and evaluation; how answers end."""

import json
from pathlib import Path
from typing import Any

QUESTION, ANSWER = "What is one and one?", "The answer is two."


def prompt_ids(tokenizer, question: str) -> list[int]:
    """Ids of the question in the model's chat template; of a base model without one, of the question and a new line."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(question + "\n")
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def opens_thinking(tokenizer) -> bool:
    """Whether the chat template itself writes ``<think>``, behind which responses begin."""
    return tokenizer.decode(prompt_ids(tokenizer, QUESTION)).rstrip().endswith("<think>")


def template_end(tokenizer) -> int | None:
    """The special token that the chat template writes behind an answer; None if there is no template or no such token.

    Raises:
        Exception: of many kinds, where the template cannot be rendered.
    """
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    _, answered, behind = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(ANSWER)
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    ids = tokenizer.encode(behind, add_special_tokens=False) if answered else []
    return next((i for i in ids if i in special), None)


def stops(tokenizer) -> set[int]:
    """Tokens at which vLLM ends a response of the model in the tokenizer's folder."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = Path(tokenizer.name_or_path) / name
        if path.is_file():
            listed: Any = json.loads(path.read_text()).get("eos_token_id")
            return found | set([listed] if isinstance(listed, int) else listed or [])
    return found


def end_of_answer(tokenizer) -> int | None:
    """The token by which a worked solution ends: the chat template's if responses stop at it, else the tokenizer's."""
    end = template_end(tokenizer)
    return end if end in stops(tokenizer) else tokenizer.eos_token_id
