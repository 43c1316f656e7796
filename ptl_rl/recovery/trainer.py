"""verl's SFT trainer on ready-made token ids."""

from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.sft_trainer_ray import SFTTrainer

from ptl_rl.recovery.parent import ParentLoss, ask_for_logits


class SequenceTrainer(SFTTrainer):
    """Reads from memory-mapped ids, so that the eight processes that verl starts for its dataset have nothing to do.

    ``config.trainer.seed`` orders the sequences.

    Args:
        parent_loss: takes the place of verl's loss.
    """

    def __init__(self, config, parent_loss: ParentLoss | None = None) -> None:
        self.parent_loss = parent_loss
        super().__init__(config)
        # verl counts a step's tokens on this device, in the stage's own process: on a head node without GPUs, too.
        self.device_name = "cpu"
        if self.resume_global_step and self.resume_global_step % self.steps_per_epoch == 0:
            # The state that was loaded is at its epoch's end, from where verl would read the next one: nothing at all.
            self.train_dataloader = self.ckpt_handler.train_dataloader = self._loader()

    def _build_dataloader(self) -> None:
        super()._build_dataloader()
        self.train_sampler.seed = self.config.trainer.seed
        self.train_dataloader = self._loader()

    def _loader(self) -> StatefulDataLoader:
        return StatefulDataLoader(
            dataset=self.train_dataset,
            batch_size=self.train_batch_size_per_dp,
            sampler=self.train_sampler,
            collate_fn=self.collate_fn,
            num_workers=0,
            drop_last=True,
        )

    def _build_engine(self) -> None:
        super()._build_engine()
        if self.parent_loss is not None:
            self.training_client.set_loss_fn(loss_fn=self.parent_loss)

    def _get_batch_seqlens(self, data):
        if self.parent_loss is not None:
            ask_for_logits(data)  # the one place between verl's making a batch and its sending it
        return super()._get_batch_seqlens(data)
