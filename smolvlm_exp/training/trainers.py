"""The trainers: TRL's own, on the engine and as they are, each with whole checkpoints and finite steps."""

from trl import DPOTrainer, SFTTrainer

from smolvlm_exp.engine.trainers import SharedPrefixDPOTrainer, SharedPrefixSFTTrainer
from smolvlm_exp.training.checkpointing import CheckpointMixin


class EngineDPOTrainer(CheckpointMixin, SharedPrefixDPOTrainer):
    """trainer.engine=shared"""


class StockDPOTrainer(CheckpointMixin, DPOTrainer):
    """trainer.engine=stock"""


class EngineSFTTrainer(CheckpointMixin, SharedPrefixSFTTrainer):
    """trainer.engine=shared"""


class StockSFTTrainer(CheckpointMixin, SFTTrainer):
    """trainer.engine=stock"""
