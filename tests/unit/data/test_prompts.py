"""How the policy is asked, and where its answers end."""

import json

import pytest
from tokenizers.processors import TemplateProcessing

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


def test_a_template_that_refuses_answers(load):
    questions = "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}x{% endfor %}"
    tokenizer = load(template=questions)
    assert template_end(tokenizer) is None and tokenizer.decode([end_of_answer(tokenizer)]) == END


def test_a_template_that_leaves_answers_out(load):
    """The special token that begins a question ends nothing."""
    asked = "{% for m in messages if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}\n{% endfor %}"
    tokenizer = load(template=asked)
    assert template_end(tokenizer) is None and tokenizer.decode([end_of_answer(tokenizer)]) == END


def test_a_tokenizer_that_begins_every_text_with_a_token(load):
    tokenizer = load()
    first = (PAD, tokenizer.convert_tokens_to_ids(PAD))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{PAD} $A", special_tokens=[first])
    assert tokenizer.decode([template_end(tokenizer)]) == END
    question, text = encode_sequences(tokenizer, ["2 + 2?", ""], ["It is 4.", "Plain."], 100)
    assert tokenizer.decode(question.ids[question.prompt_tokens :]) == f"It is 4.{END}"
    assert tokenizer.decode(text.ids) == f"{PAD}Plain."


def test_what_is_longer_is_cut(load):
    tokenizer = load()
    (whole,) = encode_sequences(tokenizer, ["2 + 2?"], ["It is 4."], 100)
    for most in (len(whole.ids) - 1, whole.prompt_tokens - 1):
        (cut,) = encode_sequences(tokenizer, ["2 + 2?"], ["It is 4."], most)
        assert cut.ids == whole.ids[:most] and cut.prompt_tokens == min(most, whole.prompt_tokens)


@pytest.mark.parametrize(
    ("files", "listed"),
    [
        ({"generation_config.json": 7}, {7}),
        ({"generation_config.json": [7, 8]}, {7, 8}),
        ({"generation_config.json": None, "config.json": 9}, set()),  # which vLLM does not read then
        ({"generation_config.json": [7], "config.json": 9}, {7}),
        ({"config.json": [9, 10]}, {9, 10}),
        ({}, set()),
    ],
)
def test_where_responses_stop(load, tmp_path, files, listed):
    tokenizer = load()
    for name, end in files.items():
        (tmp_path / name).write_text(json.dumps({"eos_token_id": end}))
    assert stops(tokenizer) == {tokenizer.eos_token_id} | listed
    tokenizer.eos_token = None
    assert stops(tokenizer) == listed


def test_a_tokenizer_that_ends_nothing(load):
    tokenizer = load(template=None)
    tokenizer.eos_token = None
    (sequence,) = encode_sequences(tokenizer, ["2 + 2?"], ["4"], 100)
    assert tokenizer.decode(sequence.ids) == "2 + 2?\n4" and stops(tokenizer) == set()


def test_templates_that_open_the_thinking(load):
    assert not opens_thinking(load())
    assert opens_thinking(load(CHAT_TEMPLATE.replace("assistant\n{%", "assistant\n<think>\n{%")))
