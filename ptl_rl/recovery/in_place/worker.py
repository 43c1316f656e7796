"""verl's workers, that of policy and rollouts and that of supervised training, which can cut the policy where it is."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import TrainingWorker

from ptl_rl.data.encoding import Sequence, encode_sequences
from ptl_rl.families import read_shape
from ptl_rl.models import load_tokenizer
from ptl_rl.pruning.live import LiveModel, NoCutFits, cut_live
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.texts import Texts
from ptl_rl.pruning.slice.slicing import config_changes
from ptl_rl.pruning.slice.training_state import names_in_order, sliced_state
from ptl_rl.recovery.rl.worker import PolicyWorker, WritesPolicy
from ptl_rl.stage import StageContext

SIGN_SECONDS = 5


def falling_after(step: int, steps: int, before: Callable[[int], float]) -> Callable[[int], float]:
    """A factor of the learning rate: ``before``, times half a cosine that falls from ``step`` on, to 0 at ``steps``.

    A plain function, so that torch's ``LambdaLR`` saves and loads as it would with ``before``.
    """

    def factor(done: int) -> float:
        share = min(1.0, max(0.0, (done - step) / max(1, steps - step)))
        return before(done) * 0.5 * (1 + math.cos(math.pi * share))

    return factor


class Cutting(WritesPolicy):
    """What both have; runs on every rank, and its methods are collective."""

    rank: int

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def check_can_slice(self) -> None:
        """Raise :class:`ptl_rl.pruning.slice.training_state.UnknownOptimizer` where :meth:`write_sliced` would."""
        names_in_order(self.policy.module, self.policy.optimizer)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def decay_after(self, step: int, steps: int) -> None:
        """Let the learning rate fall to 0 from after so many optimizer steps to the last of them."""
        scheduler = self.policy.lr_scheduler
        scheduler.lr_lambdas = [falling_after(step, steps, before) for before in scheduler.lr_lambdas]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def cut(
        self,
        context: StageContext,
        rollouts: list[Sequence],
        texts: Texts,
        general: Texts,
        made: list[PruningPlan],
        sliced: int,
        channels: int,
        layers: int,
        subset_hash: str,
        max_damage: float | None = None,
    ) -> tuple[PruningPlan | None, dict[str, Any]]:
        """Score the policy on rollouts and texts, zero what matters least, and let what stays take over.

        Args:
            channels: that every block loses.
            layers: blocks that go.
            made: plans of the cuts that were made before.
            sliced: so many of these are sliced off already, the others are zero.
            max_damage: most that the loss may rise by, in nats a token: as many channels go as stay below it.

        Returns:
            The cut's plan, and what the journal is to say of it; no plan and why, where no cut does so little damage.
        """
        config, spec, engine = context.config, context.spec, self.policy
        tokenizer = load_tokenizer(spec.source, config.model.trust_remote_code)
        longest = config.calibration.max_tokens
        read = [Sequence(s.ids[:longest], min(s.prompt_tokens, longest), s.weight) for s in rollouts]
        read += encode_sequences(tokenizer, texts.questions, texts.solutions, longest, texts.weights)
        with engine.eval_mode(), torch.random.fork_rng():
            live = LiveModel(
                model=engine.module,
                family=read_shape(spec.source).family,
                source=spec.source,
                device=torch.device(spec.device),
                batch_size=config.calibration.batch_size,
                pad_token_id=tokenizer.pad_token_id or 0,
                prompt_weight=config.calibration.prompt_weight,
                moments_gib=config.calibration.moments_gib,
                progress=self._sign_of_life(context),
            )
            try:
                found = cut_live(
                    live,
                    engine.optimizer,
                    config.criterion,
                    read,
                    made[sliced:],
                    remove_channels=channels,
                    remove_layers=layers,
                    layers_before=sum(len(plan.layer_order) for plan in made[:sliced]),
                    alignment=spec.alignment,
                    general=encode_sequences(tokenizer, general.questions, general.solutions, longest, general.weights),
                    sensitivity=config.calibration.token_weights == "sensitivity",
                    seed=context.seed + len(made),
                    subset_hash=subset_hash,
                    max_damage=max_damage,
                )
            except NoCutFits as error:
                return None, {"why": str(error)}
        return found.plan, {
            "intermediate_size": found.plan.intermediate_size,
            "num_hidden_layers": found.plan.num_hidden_layers,
            "loss_before": found.loss_before,
            "loss_after": found.loss,
            "output_error_plain": found.losses.channels_plain,
            "output_error": found.losses.channels,
            "stream_error": found.losses.stream,
            "calibration_sequences": len(read),
            "calibration_rollouts": len(rollouts),
            "tried": found.tried,
            "score_seconds": found.score_seconds,
            "compensate_seconds": found.compensate_seconds,
            "notes": found.plan.notes,
        }

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def write_sliced(self, context: StageContext, plan: PruningPlan, folder: Path, old: Path, new: Path) -> None:
        """Write the sliced policy, and a checkpoint of it from which verl goes on where this training stands.

        Args:
            plan: of the shapes that the policy has; what it leaves out is zero.
            folder: of the model as an ordinary Hugging Face checkpoint; exists and is empty.
            old: verl's checkpoint of this step, of which schedule and random state are taken.
            new: folder of the sliced one; exists and is empty.
        """
        engine, source = self.policy, context.spec.source
        with engine.eval_mode():
            family = read_shape(source).family
            state = sliced_state(engine.module, engine.optimizer, family, plan, torch.device(context.spec.device))
            manager, suffix = engine.checkpoint_manager, f"world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"
            torch.save(state.model, new / f"model_{suffix}")
            torch.save(state.optimizer, new / f"optim_{suffix}")
            shutil.copy2(old / f"extra_state_{suffix}", new)
            manager.write_sliced_weights(state.model, folder, config_changes(source, plan))

    def _sign_of_life(self, context: StageContext) -> Callable[[], None]:
        """For the driver's watchdog: a cut takes longer than a step, and makes none. Rank 0 tells it now and then."""
        told = time.monotonic()

        def tell() -> None:
            nonlocal told
            if self.rank == 0 and time.monotonic() - told > SIGN_SECONDS:
                told = time.monotonic()
                context.report(-1, -1)

        return tell


class PruningActor(Cutting, PolicyWorker):
    """verl's worker of policy and rollouts."""


class PruningTrainer(Cutting, TrainingWorker):
    """verl's worker of supervised training."""

    @property
    def policy(self) -> Any:
        return self.engine
