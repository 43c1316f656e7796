"""Whether rewards still teach: GRPO learns from a prompt only where its answers earned different ones. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field


def learnable_fraction(rewards: Iterable[tuple[str, float]]) -> float:
    """Share of prompts whose answers earned different rewards.

    Args:
        rewards: of every answer: which prompt it is to, and what it earned.
    """
    of_prompt: dict[str, set[float]] = {}
    for prompt, reward in rewards:
        of_prompt.setdefault(prompt, set()).add(round(reward, 6))
    return sum(len(found) > 1 for found in of_prompt.values()) / len(of_prompt)


@dataclass
class Learnable:
    """What the last steps' rewards have taught."""

    least: float
    """Share of a step's prompts below which it counts as one that taught nothing."""
    patience: int
    """Such steps, one after the other, after which rewards teach nothing any more."""
    below: list[tuple[float, float]] = field(default_factory=list)
    """Share and mean reward of the latest such steps."""

    def saw(self, share: float, reward: float) -> None:
        """Take in a step's share of prompts and its mean reward."""
        self.below = [*self.below, (share, reward)] if share < self.least else []

    def begin_anew(self) -> None:
        """The policy is another one now: it was cut."""
        self.below = []

    @property
    def why(self) -> str | None:
        """Why rewards teach nothing any more; None while they do."""
        if len(self.below) < self.patience:
            return None
        latest = self.below[-self.patience :]
        most, mean = max(share for share, _ in latest), sum(reward for _, reward in latest) / len(latest)
        steps = f"{self.patience} steps" if self.patience > 1 else "a step"
        return (
            f"rewards teach nothing any more: in {steps} at most {most:.1%} of the prompts had answers "
            f"with different rewards (min_learnable_fraction {self.least:g}); answers earned {mean:.3g} on average"
        )
