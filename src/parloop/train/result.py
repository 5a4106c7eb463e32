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
        steps: number of optimizer steps.
        tokens: number of tokens in the rows of these steps, padding included.
        processes: number of processes that finished the run.
        seconds: time in training steps, without validation and saving, summed over interruptions.
        tokens_per_second: throughput of the median step, over all processes.
        loss_curve: pairs of step and training loss, in nats per token.
        validation_curve: pairs of step and validation loss, in nats per token.
        parameters: number of the model's parameters; 0 where an older version did not count them.
        trained_parameters: number of parameters that fine-tuning changes; for LoRA, the adapters'.
        conversations: number of conversations read for fine-tuning.
        rows: number of rows that they fill.
        left_out: reason -> number of conversations.
        data: for a mixture, what was read from each source.
        reasoning_cut: number of conversations whose reasoning was cut.
        answers: for a task, the share of correct answers to held-out questions, group by group.
        folder: folder of the model.
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
    reasoning_cut: int | None = None
    answers: dict[str, Any] | None = None
    folder: Path | None = not_kept(default=None)

    def shown(self) -> list[Any]:
        """Return what `rich` prints of the result."""
        from rich.text import Text

        lines = [
            f"{self.steps:,} steps, {self.tokens:,} tokens, {self.seconds:.0f} s, {self.tokens_per_second:,.0f} tokens/s, "
            f"last training loss {self.loss_curve[-1][1]:.3f}"
        ]
        if self.folder is not None:
            task = f"study {self.answers['source']}" if self.answers else ""
            lines += [
                f"model: {self.folder}",
                f"next:  parloop {task}" if task else f"next:  parloop generate {shlex.quote(str(self.folder))} 'def '",
            ]
        return [*([self._answers()] if self.answers else []), Text("\n".join(lines), overflow="fold")]

    def _answers(self) -> Any:
        from rich.table import Table

        assert self.answers is not None
        table = Table(title=f"{self.answers['source']}: held-out answers that are right", title_justify="left")
        for name in (self.answers["unit"], "right", "chance", "all of a document", "nats each"):
            table.add_column(name, justify="right")
        for row in self.answers["groups"]:
            middle, low, high = row["correct"]
            half = "" if low is None else f" ±{100 * max(high - middle, middle - low):.1f}"
            right = f"{100 * middle:.1f}%{half}"
            exact, nats = f"{100 * row['exact'][0]:.1f}%", f"{row['nll'][0]:.3f}"
            table.add_row(str(row["group"]), right, f"{100 * row['chance']:.1f}%", exact, nats)
        return table
