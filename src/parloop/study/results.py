"""What a study returns, and how it is shown on a terminal."""

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
    """Bytes of a cache: those of every token, and those that do not grow with the text (windows and carries)."""

    per_token: float
    fixed: float


@dataclass
class Costs:
    """What an arm's model costs to run.

    Attributes:
        prompt_tokens: of the text whose prefill is timed.
        prefill_ms: of the prompt, batch 1.
        decode_ms: per token after the prompt, all loops in one pass.
        decode_pass_per_loop_ms: the same with a pass over the weights per loop.
        cache_bytes: of one sequence.
        peak_training_bytes: most bytes of tensors alive in a training step, weights and gradients included.
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
        arm: what its models have that others have not.
        parameters: of one model.
        bits_per_byte: held-out loss after the last loop; of a task, bits per answer of the trained lengths, worked steps counted too.
        difference_to_base: its loss minus the base's on the same documents and seeds; likewise to the best's.
        bits_per_byte_after_loop: loss of every loop's state through the head, [R].
        loss_nats_per_token: the loss in another unit.
        next_token_accuracy: share of tokens that the last loop ranks first.
        training_tokens, training_flops, training_seconds: of one run; seconds are a mean over seeds.
        training_tokens_per_second: median over seeds.
        costs: of the first seed's model.
        runs: names of the runs' folders, one for each seed.
        loss_curves: of each run, pairs of step and training loss in nats per token.
        validation_curves: of each run, pairs of step and validation loss in nats per token.
        diagnosis: path of the first seed's diagnosis in the study's folder.
        answers: of a task, how many are right, group by group; empty for text.
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
        return self.training_flops / self.training_tokens


@dataclass
class Verdict:
    """Which arm to take: in one line, and why."""

    headline: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.headline} {self.evidence}"


@dataclass
class StudyResult(Result):
    """Models trained under one protocol, side by side.

    Attributes:
        rows: one for each arm, from the cheapest to the dearest.
        base: name of the arm that the others are compared with, the cheapest.
        best: name of the arm of the lowest loss.
        chosen: name of the recommended arm.
        verdict: the recommendation.
        rule: how it is found.
        match: tokens or compute.
        seeds: trainings of each arm.
        documents, document_bytes: held-out text that the losses are of; of a task instances, and what is asked for.
        recipe: the protocol; its loops, tokens and seed are the study's.
        corpus: where the text comes from, and how much there is.
        command: the command that made it.
        environment: machine and versions.
        folder: where the runs and the report are.
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
        """Of the losses."""
        return "bits per answer" if self.rows[0].answers else "bits per byte"

    @property
    def group_unit(self) -> str:
        """What a task's groups are numbers of: length, hops or level."""
        return str(self.corpus.get("unit", ""))

    def row(self, name: str) -> Row:
        """Return the row of an arm. Raises KeyError: there is none of that name."""
        return {row.arm.name: row for row in self.rows}[name]

    def shown(self) -> list[Any]:
        from rich.text import Text

        verdict = Text.assemble("\n", (self.verdict.headline, "bold"), f" {self.verdict.evidence}\n")
        return [self._gives(), *([self._answers()] if self.rows[0].answers else []), self._costs(), verdict]

    def _table(self, title: str, further: dict[str, list[str]]) -> Any:
        """Return a table: what tells the arms apart, then the given columns. The chosen arm is bold."""
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
