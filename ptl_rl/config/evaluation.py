"""Settings of ``ptl eval``, which measures one model without a recipe."""

from typing import Literal

from pydantic import Field

from ptl_rl.config.section import Section


class EvalConfig(Section):
    """What ``ptl eval`` is told, beside the model."""

    tasks: list[str] = Field(description="Names of tasks, e.g. gsm8k, math500, mbpp.")
    data: dict[str, str] = Field(
        {}, description="Questions by task: a file, a saved folder, testbed:SPLIT or hub:NAME."
    )
    limit: int | None = Field(None, ge=1, description="Problems of each task, the first so many; default: all.")
    max_tokens: int | None = Field(None, ge=1, description="Longest response, in tokens; default: the task's own.")
    max_model_tokens: int | None = Field(
        None, ge=8, description="Longest prompt and response together, in tokens; default: what the model can read."
    )
    prompt_suffix: str = Field("", description="Appended to zero-shot questions, as data.prompt_suffix.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of forward passes; auto: bfloat16 on GPUs, float32 on CPUs."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share the model.")
    batch_size: int = Field(128, ge=1, description="Concurrent sequences in vLLM.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap; generation is greedy.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
