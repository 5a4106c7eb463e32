"""TRL's SFT trainer for PLTs. Apart, since importing it needs TRL."""

from trl import SFTTrainer

from .trainer import LoopedTraining


class PLTSFTTrainer(LoopedTraining, SFTTrainer):
    """Fine-tunes a PLT."""
