"""What is written beside a model's weights: its files as they are, and its configuration."""

import json

import pytest

from ptl_rl.checkpoints.companions import copy_companions, write_config


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, {"dtype": "float32", "torch_dtype": "float32"}),
        ({}, {"dtype": "float32"}),
    ],
)
def test_no_name_keeps_another_type(named, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "_attn_implementation": "sdpa", **named}))
    (tmp_path / "out").mkdir()
    write_config(tmp_path, tmp_path / "out", "float32")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"hidden_size": 8, **expected}


OF_THE_MODEL = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "sentencepiece.bpe.model",
)


@pytest.mark.parametrize("name", OF_THE_MODEL)
def test_a_file_of_the_model_is_copied_or_goes(name, tmp_path):
    source, out, last = tmp_path / "source", tmp_path / "out", tmp_path / "last"
    for folder in (source / "tokenizer_parts", out, last):
        folder.mkdir(parents=True)
    for other in ("config.json", "model.safetensors", "rollouts.jsonl"):
        (source / other).write_text("of the run alone")
    (out / name).write_text("as transformers writes it")
    (out / "config.json").write_text("{}")
    (source / name).write_bytes(b"as it was\r\n")
    copy_companions(source, out)
    assert (out / name).read_bytes() == b"as it was\r\n" and (out / "config.json").read_text() == "{}"
    assert {path.name for path in out.iterdir()} == {name, "config.json"}
    copy_companions(last, out)  # which has no such file
    assert [path.name for path in out.iterdir()] == ["config.json"]
