"""verl's SFT trainer on ready-made token ids."""

from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.sft_trainer_ray import SFTTrainer


class SequenceTrainer(SFTTrainer):
    """Reads from memory-mapped ids, so that the eight processes that verl starts for its dataset have nothing to do.

    ``config.trainer.seed`` orders the sequences.
    """

    def _build_dataloader(self) -> None:
        super()._build_dataloader()
        self.train_sampler.seed = self.config.trainer.seed
        self.train_dataloader = StatefulDataLoader(
            dataset=self.train_dataset,
            batch_size=self.train_batch_size_per_dp,
            sampler=self.train_sampler,
            collate_fn=self.collate_fn,
            num_workers=0,
            drop_last=True,
        )
