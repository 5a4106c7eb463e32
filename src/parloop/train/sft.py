"""TRL's SFT trainer for PLTs, in a module of its own because it imports TRL."""

from typing import Any

from trl import SFTTrainer

from .trainer import LoopedTraining


class PLTSFTTrainer(LoopedTraining, SFTTrainer):
    """Fine-tunes a PLT."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: TRL would overwrite a README.md in the folder at every checkpoint."""
