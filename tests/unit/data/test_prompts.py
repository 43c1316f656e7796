"""How the policy is asked, and where its answers end."""

import json

import pytest

from ptl_rl.data.encoding import encode_sequences
from ptl_rl.data.prompts import end_of_answer, opens_thinking, stops, template_end
from ptl_rl.testbed.tokenizer import CHAT_TEMPLATE, END, PAD


@pytest.fixture
def load(tokenizer, tmp_path):
    """Save the tokenizer changed, with a generation configuration beside it, and load it as a run does."""
    from transformers import AutoTokenizer

    def saved(template=CHAT_TEMPLATE, eos=END, listed=None):
        tokenizer.save_pretrained(tmp_path)
        made = AutoTokenizer.from_pretrained(tmp_path)
        made.eos_token, made.chat_template = eos, template
        (tmp_path / "chat_template.jinja").unlink()
        made.save_pretrained(tmp_path)
        if listed is not None:
            values = {"eos_token_id": [tokenizer.convert_tokens_to_ids(token) for token in listed]}
            (tmp_path / "generation_config.json").write_text(json.dumps(values))
        return AutoTokenizer.from_pretrained(tmp_path)

    return saved


@pytest.mark.parametrize(
    ("eos", "listed", "end"),
    [
        (END, None, END),
        (PAD, [PAD, END], END),  # as an instruct model has it: responses stop at the template's token, too
        (PAD, [PAD], PAD),  # as a base model has it, whose template nobody taught it
        (PAD, None, PAD),
    ],
)
def test_a_solution_ends_as_the_template_does_where_responses_stop_there(load, eos, listed, end):
    tokenizer = load(eos=eos, listed=listed)
    wanted = tokenizer.convert_tokens_to_ids(end)
    assert tokenizer.decode([template_end(tokenizer)]) == END
    assert end_of_answer(tokenizer) == wanted and wanted in stops(tokenizer)
    question, text = encode_sequences(tokenizer, ["2 + 2?", ""], ["It is 4.", "Plain."], 100)
    assert question.ids[-1] == wanted and question.ids.count(wanted) == (2 if end == END else 1)
    assert tokenizer.decode(text.ids) == "Plain."


def test_without_a_template_or_with_one_that_ends_in_words(load):
    assert template_end(load(template=None)) is None
    wordy = load(template="{% for m in messages %}{{ m['content'] }}\nOver.\n{% endfor %}")
    assert template_end(wordy) is None and wordy.decode([end_of_answer(wordy)]) == END


def test_a_tokenizer_that_ends_nothing(load):
    tokenizer = load(template=None)
    tokenizer.eos_token = None
    (sequence,) = encode_sequences(tokenizer, ["2 + 2?"], ["4"], 100)
    assert tokenizer.decode(sequence.ids) == "2 + 2?\n4" and stops(tokenizer) == set()


def test_templates_that_open_the_thinking(load):
    assert not opens_thinking(load())
    assert opens_thinking(load(CHAT_TEMPLATE.replace("assistant\n{%", "assistant\n<think>\n{%")))
