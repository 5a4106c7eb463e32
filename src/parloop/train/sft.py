"""TRL's SFT trainer for PLTs. Apart, since importing it needs TRL."""

from typing import Any

from trl import SFTTrainer

from .trainer import LoopedTraining


class PLTSFTTrainer(LoopedTraining, SFTTrainer):
    """Fine-tunes a PLT."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: with every checkpoint TRL would write its own over a README.md that is in the folder."""
