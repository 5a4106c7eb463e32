"""The result of a training, and how a terminal shows it."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..result import Result, not_kept


@dataclass
class TrainingResult(Result):
    """A finished run. Its folder holds the model.

    Attributes:
        steps: optimiser steps.
        tokens: in the rows of these steps, padding included.
        processes: those that finished it.
        seconds: in training steps, without validation and saving, summed over interruptions.
        tokens_per_second: of the median step, over all processes.
        loss_curve: pairs of step and training loss, in nats per token.
        validation_curve: pairs of step and validation loss, likewise.
        parameters: of the model; 0 where an older version did not count them.
        trained_parameters: those that a fine-tuning changes: of LoRA, the adapters'.
        conversations: that were read for a fine-tuning; rows: that they fill.
        left_out: reason -> conversations.
        data: of a mixture, what was read of each source.
        folder: where the model is.
    """

    FILE: ClassVar[str] = "training.json"

    steps: int
    tokens: int
    processes: int
    seconds: float
    tokens_per_second: float
    loss_curve: list[list[float]]
    validation_curve: list[list[float]]
    parameters: int = 0
    trained_parameters: int | None = None
    conversations: int | None = None
    rows: int | None = None
    left_out: dict[str, int] | None = None
    data: Any = None
    folder: Path | None = not_kept(default=None)

    def shown(self) -> list[Any]:
        from rich.text import Text

        lines = [
            f"{self.steps:,} steps, {self.tokens:,} tokens, {self.seconds:.0f} s, {self.tokens_per_second:,.0f} tokens/s, "
            f"last training loss {self.loss_curve[-1][1]:.3f}"
        ]
        if self.folder is not None:
            lines += [f"model: {self.folder}", f"next:  parloop generate {shlex.quote(str(self.folder))} 'def '"]
        return [Text("\n".join(lines), overflow="fold")]
