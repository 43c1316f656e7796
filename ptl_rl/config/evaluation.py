"""Settings of ``ptl eval``, which measures one model without a recipe."""

from typing import Literal

from pydantic import Field

from ptl_rl.config.section import Section


class EvalConfig(Section):
    """What ``ptl eval`` is told, beside the model."""

    tasks: list[str]
    data: dict[str, str] = Field({}, description="By task: a file, a saved folder, testbed:SPLIT or hub:NAME.")
    limit: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_model_tokens: int | None = Field(None, ge=8)
    prompt_suffix: str = ""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    tensor_parallel_size: int = Field(1, ge=1)
    batch_size: int = Field(128, ge=1)
    seed: int = Field(0, ge=0)
    trust_remote_code: bool = False
