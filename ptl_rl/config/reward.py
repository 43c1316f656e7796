"""What a recipe may say of its reward."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from ptl_rl.config.section import Section
from ptl_rl.errors import expanded

SHIPPED_REWARD = "code"


def _shipped_reward() -> Path:
    found = find_spec("reward.programs.reward")
    assert found is not None and found.origin is not None
    return Path(found.origin)


def _former_place() -> Path:
    """Where the code reward stood in earlier versions; recipes may still name it."""
    return _shipped_reward().parents[1] / "code.py"


class RewardConfig(Section):
    path: str | None = Field(
        None, description="Your Python file, or 'code' for unit tests; default: 0.9 accuracy + 0.1 format."
    )
    name: str = Field("compute_score", description="The function in that file, in verl's signature.")
    call_seconds: float = Field(60, gt=0, description="A call of your own function that takes longer scores 0.")
    accuracy_weight: float = Field(0.9, ge=0, le=1, description="Reward of a right answer, by the shipped function.")
    format_weight: float = Field(0.1, ge=0, le=1, description="Reward of the right format, by the shipped function.")
    format_style: Literal["boxed", "think_boxed"] = Field(
        "boxed",
        description="The right format: a boxed answer; think_boxed: after one pair of think tags, of which the chat "
        "template may write the first.",
    )

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        if path is None or path == SHIPPED_REWARD:
            return path
        absolute = expanded(path).absolute()  # workers may run elsewhere
        if "${" in str(absolute):
            raise ValueError(f"{path}: verl takes ${{ in a path for a reference; rename the file or its folder")
        # By its name, so that a run or study goes on with another installation, which has it in another place.
        is_shipped = absolute in (_shipped_reward(), _former_place())
        return SHIPPED_REWARD if is_shipped else str(absolute)

    @property
    def file(self) -> str | None:
        """Where the function of :attr:`path` stands, in this installation."""
        return str(_shipped_reward()) if self.path == SHIPPED_REWARD else self.path
