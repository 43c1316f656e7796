"""verl's checkpoints within a recovery: where a killed one goes on from, and what it ends with.

Before the last step a checkpoint holds what training goes on from; at the last one it holds the finished weights alone
(:mod:`ptl_rl.verl_patches.checkpoint`). verl could not go on from these, so a stage that finds them does not train.
The weights are handed over as second names of the same files: nothing is copied, and until the driver has journaled the
recovery and deletes the work folder, a killed stage finds there all that it needs.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
"""verl writes the step of a checkpoint into it once all else of that checkpoint is written."""


def link_or_copy(source: str, target: str) -> str:
    """Give a file a second name, or, where the file system cannot, copy it; for :func:`shutil.copytree`."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def hand_over(folder: Path, out: Path) -> None:
    """Give ``out`` the files of ``folder``, as second names of them."""
    shutil.copytree(folder, out, copy_function=link_or_copy, dirs_exist_ok=True)


@dataclass(frozen=True)
class Checkpoints:
    """Of one recovery."""

    folder: Path
    """verl's ``default_local_dir``."""
    steps: int
    """After so many, training ends."""
    part: str = ""
    """Folder of a checkpoint in which the policy is."""

    @property
    def last(self) -> Path:
        """Folder of the last step's checkpoint."""
        return self.folder / f"global_step_{self.steps}"

    @property
    def final(self) -> Path:
        """The finished weights with configuration and tokenizer, an ordinary Hugging Face checkpoint."""
        return self.last / self.part / "huggingface"

    def are_finished(self) -> bool:
        """Whether the last step's weights are there, whole.

        If not, what killed attempts have left is deleted, but for the one checkpoint that verl will go on from.
        """
        step = self._newest_whole()
        if step == self.steps and self._has_weights():
            return True
        for path in self.folder.glob("global_step_*"):
            if path.name != f"global_step_{step}":
                shutil.rmtree(path)
        return False

    def hand_over(self, out: Path) -> None:
        """Give ``out`` the finished weights.

        Raises:
            FileNotFoundError: verl has not written them.
        """
        if not self._has_weights():
            raise FileNotFoundError(f"{self.final}: verl ended without writing the recovered checkpoint")
        hand_over(self.final, out)

    def _has_weights(self) -> bool:
        return (self.final / "config.json").exists() and any(self.final.glob("*.safetensors"))

    def _newest_whole(self) -> int:
        tracker = self.folder / TRACKER
        if not tracker.exists():
            return 0
        try:
            return int(tracker.read_text())
        except ValueError:
            # Killed between emptying and filling it, as verl's RL trainer does after everything else is written.
            steps = [int(path.parent.name.rpartition("_")[2]) for path in self.folder.glob("global_step_*/data*.pt")]
            if not steps:
                tracker.unlink()
                return 0
            tracker.write_text(str(max(steps)))
            return max(steps)
