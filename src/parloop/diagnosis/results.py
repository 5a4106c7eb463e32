"""The result of a diagnosis, and its tables on a terminal."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..result import Result, not_kept
from .diagnosis import Diagnosis
from .lenses import LENSES
from .verdict import Verdict


@dataclass
class TokenView:
    """Every loop's predictions on a piece of text, see `tokens.token_view`.

    Attributes:
        document: the document, and which of its tokens these are.
        first: text of the first token, which is not predicted.
        view: one entry for each later token.
    """

    document: str
    first: str
    view: list[dict[str, Any]]


@dataclass
class CheckpointDiagnosis(Result):
    """Diagnosis of one checkpoint on one text.

    Attributes:
        checkpoint: folder or Hub name.
        diagnosis: values of every lens.
        sample_hash: hash of the samples' tokens; equal for checkpoints that were diagnosed on the same ones.
        verdict: the advice.
        tokens: predictions on a piece of the text, token by token.
        settings: loop counts, sizes, text, device, versions.
    """

    FILE: ClassVar[str] = "diagnosis.json"

    checkpoint: str
    diagnosis: Diagnosis
    sample_hash: str
    verdict: Verdict
    tokens: TokenView
    settings: dict[str, Any]

    def shown(self) -> list[Any]:
        """Return what `rich` prints of the diagnosis."""
        from rich.text import Text

        text = f"{self.settings['data']}: trained on this text? {self.settings['trained_on_this_text']}."
        verdict = Text.assemble((self.verdict.headline, "bold"), f" {self.verdict.sureness}\n")
        return [self._table(), Text(text), verdict]

    def _table(self) -> Any:
        """Return a table of the lenses with 95% intervals, one column per loop."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(f"{self.checkpoint}: what each loop adds and costs"), title_justify="left")
        table.add_column("lens (unit)")
        for loop in range(1, self.diagnosis.loops + 1):
            table.add_column(f"loop {loop}", justify="right", no_wrap=True)
        for name, values in self.diagnosis.summary().items():
            if any(value is not None for value in values):
                table.add_row(f"{LENSES[name].title} ({LENSES[name].unit})", *map(_short, values))
        return table


@dataclass
class DiagnosisResult(Result):
    """Diagnoses of several checkpoints, side by side.

    Attributes:
        command: the command that made it.
        checkpoints: their diagnoses, in the given order.
        folder: folder of the report.
    """

    command: str
    checkpoints: list[CheckpointDiagnosis]
    folder: Path | None = not_kept(default=None)

    def shown(self) -> list[Any]:
        """Return what `rich` prints of the diagnoses."""
        return [part for checkpoint in self.checkpoints for part in checkpoint.shown()]

    def labels(self) -> list[str]:
        """Return the checkpoints' names in reports: the loop count, with the checkpoint's name if several have the same."""
        counts = [one.diagnosis.loops for one in self.checkpoints]
        names = [
            f"R = {n}" if counts.count(n) == 1 else f"{Path(one.checkpoint).name} (R = {n})"
            for n, one in zip(counts, self.checkpoints)
        ]
        return names if len(set(names)) == len(names) else [f"{name} [{i}]" for i, name in enumerate(names, 1)]

    def rows(self) -> list[list[Any]]:
        """Return the rows of lenses.csv."""
        lines: list[list[Any]] = [["checkpoint", "lens", "unit", "loop", "mean", "low", "high"]]
        for one in self.checkpoints:
            for lens, loops in one.diagnosis.summary().items():
                for loop, interval in enumerate(loops, 1):
                    if interval is not None:
                        lines.append([one.checkpoint, lens, LENSES[lens].unit, loop, *interval])
        return lines


def _short(value: list[float] | None) -> str:
    if value is None:
        return ""
    mean, low, high = value
    return f"{mean:.3g}" if low is None else f"{mean:.3g} ±{max(high - mean, mean - low):.1g}"
