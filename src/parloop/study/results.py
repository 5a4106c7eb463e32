"""The result of a study, and its tables on a terminal."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..result import Result, not_kept
from ..statistics import Interval
from ..timing import Spread
from .arms import Arm, columns
from .task import Answers, solved_up_to


@dataclass
class CacheBytes:
    """Bytes of a cache: per token, and fixed ones, which do not grow with the text (windows and carries)."""

    per_token: float
    fixed: float


@dataclass
class Costs:
    """Costs of running an arm's model.

    Attributes:
        prompt_tokens: tokens of the prompt whose prefill is timed.
        prefill_ms: milliseconds of its prefill, batch size 1.
        decode_ms: milliseconds per token after the prompt, all loops in one pass.
        decode_pass_per_loop_ms: the same with one pass over the weights per loop.
        cache_bytes: bytes of one sequence's cache.
        peak_training_bytes: peak bytes of live tensors in a training step, weights and gradients included.
    """

    prompt_tokens: int
    prefill_ms: Spread
    decode_ms: Spread
    decode_pass_per_loop_ms: Spread
    cache_bytes: CacheBytes
    peak_training_bytes: int


@dataclass
class Row:
    """One arm: its losses over all seeds, and its costs.

    Attributes:
        arm: the settings in which its models differ from the others.
        parameters: number of parameters of one model.
        bits_per_byte: held-out loss after the last loop; for a task, bits per answer in the trained groups, worked steps included.
        difference_to_base: its loss minus the base's on the same documents and seeds.
        difference_to_best: likewise, minus the best arm's.
        bits_per_byte_after_loop: loss of every loop's state through the head, [R].
        loss_nats_per_token: held-out loss in nats per token.
        next_token_accuracy: share of tokens that the last loop ranks first.
        training_tokens: tokens of one run.
        training_flops: FLOPs of one run.
        training_seconds: seconds of one run, mean over seeds.
        training_tokens_per_second: median over seeds.
        costs: costs of the first seed's model.
        runs: names of the runs' folders, one per seed.
        loss_curves: for each run, pairs of step and training loss in nats per token.
        validation_curves: for each run, pairs of step and validation loss in nats per token.
        diagnosis: path of the first seed's diagnosis in the study's folder.
        answers: for a task, outcomes group by group; empty for text.
    """

    arm: Arm
    parameters: int
    bits_per_byte: Interval
    difference_to_base: Interval
    difference_to_best: Interval
    bits_per_byte_after_loop: list[float]
    loss_nats_per_token: float
    next_token_accuracy: float
    training_tokens: int
    training_flops: float
    training_seconds: float
    training_tokens_per_second: float
    costs: Costs
    runs: list[str]
    loss_curves: list[list[list[float]]]
    validation_curves: list[list[list[float]]]
    diagnosis: str
    answers: list[Answers] = field(default_factory=list)

    @property
    def training_flops_per_token(self) -> float:
        """FLOPs per training token."""
        return self.training_flops / self.training_tokens


@dataclass
class Verdict:
    """Recommendation of an arm: one line, and the evidence for it."""

    headline: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.headline} {self.evidence}"


@dataclass
class StudyResult(Result):
    """Models trained under one protocol, side by side.

    Attributes:
        rows: one per arm, from the cheapest to the dearest.
        base: name of the arm that the others are compared with, the cheapest.
        best: name of the arm with the lowest loss.
        chosen: name of the recommended arm.
        verdict: the recommendation.
        rule: the rule that it follows.
        match: tokens or compute.
        seeds: trainings per arm.
        documents: number of held-out documents; for a task, of instances.
        document_bytes: bytes of these documents; for a task, number of predicted tokens.
        recipe: the protocol; its loops, tokens and seed are the study's.
        corpus: source and size of the text.
        command: the command that made it.
        environment: machine and versions.
        folder: folder of the runs and the report.
    """

    FORMAT: ClassVar[int] = 2

    rows: list[Row]
    base: str
    best: str
    chosen: str
    verdict: Verdict
    rule: str
    match: str
    seeds: int
    documents: int
    document_bytes: int
    recipe: dict[str, Any]
    corpus: dict[str, Any]
    command: str
    environment: dict[str, Any]
    folder: Path | None = not_kept(default=None)

    @property
    def unit(self) -> str:
        """Unit of the losses."""
        return "bits per answer" if self.rows[0].answers else "bits per byte"

    @property
    def group_unit(self) -> str:
        """Unit of a task's groups: length, hops or level."""
        return str(self.corpus.get("unit", ""))

    def row(self, name: str) -> Row:
        """Return the row of the arm with this name.

        Raises:
            KeyError: there is none.
        """
        return {row.arm.name: row for row in self.rows}[name]

    def shown(self) -> list[Any]:
        """Return what `rich` prints of the result: tables and the verdict."""
        from rich.text import Text

        verdict = Text.assemble("\n", (self.verdict.headline, "bold"), f" {self.verdict.evidence}\n")
        return [self._gives(), *([self._answers()] if self.rows[0].answers else []), self._costs(), verdict]

    def _table(self, title: str, further: dict[str, list[str]]) -> Any:
        """Return a table of columns that distinguish the arms, and of the given ones. The chosen arm is bold."""
        from rich.table import Table
        from rich.text import Text

        table, cells = Table(title=title, title_justify="left"), columns([row.arm for row in self.rows]) | further
        for name in cells:
            table.add_column(name, justify="right", no_wrap=True)
        for row, line in zip(self.rows, zip(*cells.values())):
            table.add_row(*map(Text, line), style="bold" if row.arm.name == self.chosen else "")
        return table

    def _gives(self) -> Any:
        base, rows = self.row(self.base), self.rows
        cells = {
            "loss": [_shown(row.bits_per_byte) for row in rows],
            f"difference\nto {base.arm.label}": ["" if row is base else _shown(row.difference_to_base, "+") for row in rows],
            "read out after each loop": [", ".join(f"{bits:.2f}" for bits in row.bits_per_byte_after_loop) for row in rows],
            "answers\nright" if rows[0].answers else "next\ntoken": [
                f"{100 * row.next_token_accuracy:.1f}%" for row in rows
            ],
        }
        return self._table(f"what each loop count gives: held-out loss in {self.unit}, with 95% intervals", cells)

    def _answers(self) -> Any:
        cells = {
            f"{self.group_unit}\n{group.group}": [f"{100 * row.answers[i].correct.value:.0f}%" for row in self.rows]
            for i, group in enumerate(self.rows[0].answers)
        }
        cells["solved\nup to"] = [str(solved_up_to(row.answers) or "none") for row in self.rows]
        chances = ", ".join(f"{100 * group.chance:.0f}%" for group in self.rows[0].answers)
        return self._table(f"answers that are right (chance {chances})", cells)

    def _costs(self) -> Any:
        cells = {
            "params": [f"{row.parameters / 1e6:.2f}M" for row in self.rows],
            "train\ntok/s": [f"{row.training_tokens_per_second:,.0f}" for row in self.rows],
            "train\ns": [f"{row.training_seconds:,.0f}" for row in self.rows],
            "prefill\nms": [f"{row.costs.prefill_ms.median:.1f}" for row in self.rows],
            "decode\nms/tok": [f"{row.costs.decode_ms.median:.2f}" for row in self.rows],
            "a pass per\nloop": [f"{row.costs.decode_pass_per_loop_ms.median:.2f}" for row in self.rows],
            "cache\nB/tok": [f"{row.costs.cache_bytes.per_token:,.0f}" for row in self.rows],
            "train\nMB": [f"{row.costs.peak_training_bytes / 1e6:,.0f}" for row in self.rows],
        }
        return self._table("what it costs", cells)


def _shown(interval: Interval, sign: str = "") -> str:
    middle, low, high = interval
    return f"{middle:{sign}.3f} ±{max(high - middle, middle - low):.3f}"
