"""Settings of ``ptl score``, which makes one cut of one model without a recipe."""

from typing import Literal

from pydantic import Field, model_validator

from ptl_rl.config.data import SourceConfig
from ptl_rl.config.pruning import CalibrationConfig, CriterionConfig, check_gradients
from ptl_rl.config.section import Section


class ScoreConfig(Section):
    """What ``ptl score`` reads and how; the sections are those of a recipe."""

    data: SourceConfig = Field(description="Worked solutions or text that importance is measured on.")
    prompt_suffix: str = Field("", description="Appended to every question, e.g. the instruction to box the answer.")
    max_bad_fraction: float = Field(0.001, ge=0, le=1, description="Share of malformed rows that is dropped.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of forward passes.")
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="As in a recipe.")
    criterion: CriterionConfig = Field(CriterionConfig(), description="As in a recipe.")
    seed: int = Field(0, ge=0, description="Seed of the rows that are drawn, and of all else that is random.")

    @model_validator(mode="after")
    def _check(self) -> "ScoreConfig":
        check_gradients(self.criterion, self.calibration)
        if self.calibration.source != "corpus":
            raise ValueError("calibration.source: only a run has rollouts, those of its recoveries; set it to corpus")
        return self
