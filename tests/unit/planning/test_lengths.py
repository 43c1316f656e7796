"""How many tokens a model reads at once, and what of a recipe is longer."""

import pytest

from ptl_rl.config.recipe import parse_config
from ptl_rl.planning.lengths import length_notes, positions


@pytest.mark.parametrize(
    ("scaling", "most"),
    [
        ({}, 2048),
        ({"rope_scaling": None}, 2048),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 2048),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, 4096),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 4096),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 4096),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 2048),  # whose positions are those after it
        ({"max_position_embeddings": "many", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, None),
        ({"max_position_embeddings": None}, None),
    ],
)
def test_positions_with_a_rope_that_is_stretched(scaling, most):
    assert positions({"max_position_embeddings": 2048} | scaling) == most


@pytest.mark.parametrize(("recover_only", "named"), [(False, ["calibration", "recovery"]), (True, ["recovery"])])
def test_longer_texts_than_the_model_reads_are_a_note(recover_only, named):
    schedule = {"recover_only": True} if recover_only else {"channels_per_cycle": [16], "alignment": 16}
    recovery = [{"cpt": {"max_tokens": 4096}}, {"cpt": {"max_tokens": 1024}}, {"grpo": {}}]
    values = {"schedule": schedule, "recovery": recovery, "calibration": {"max_tokens": 4096}}
    notes = length_notes(parse_config(values), {"max_position_embeddings": 2048})
    assert [note.partition(";")[0] for note in notes] == [
        f"{name}.max_tokens 4096 is more than the 2048 tokens that the model can read at once" for name in named
    ]
    assert length_notes(parse_config(values), {"max_position_embeddings": 4096}) == []
