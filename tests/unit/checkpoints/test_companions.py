"""A configuration's type of weights, under whatever names it has for it."""

import json

import pytest

from ptl_rl.checkpoints.companions import write_config


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
