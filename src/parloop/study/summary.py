"""From the runs of a study to its result: intervals, differences and the recommended arm."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ..corpus import Corpus
from ..diagnosis.results import CheckpointDiagnosis
from ..record import environment
from ..statistics import RULE, bits_per_byte, choose, paired_difference, resample_weights
from ..train.recipe import Recipe
from .arms import Arm
from .results import Costs, Row, StudyResult, Verdict
from .runs import Run
from .task import SOLVED, TaskCorpus, answers_of, solved_up_to


def summarize(
    recipe: Recipe,
    corpus: Corpus | TaskCorpus,
    runs: list[Run],
    costs: dict[Arm, Costs],
    match: str,
    command: str,
    folder: Path,
) -> StudyResult:
    """Return the study's result.

    Args:
        recipe: the protocol.
        corpus: the corpus or task that the runs were trained on.
        runs: trained and evaluated runs of all arms and seeds.
        costs: costs of every arm, from the cheapest to the dearest.
        match: tokens or compute.
        command: the command that the report names.
        folder: the study's folder.
    """
    arms = list(costs)
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in arms}
    byte_counts, seeds = runs[0].evaluation.bytes, len(by_arm[arms[0]])
    weights = resample_weights(len(byte_counts), seeds, np.random.default_rng(0))
    nll = {arm: np.stack([run.evaluation.nll for run in by_arm[arm]]) for arm in arms}  # [seeds, documents, R]
    final = {arm: values[:, :, -1] for arm, values in nll.items()}
    losses = {arm: bits_per_byte(final[arm], byte_counts, weights) for arm in arms}
    candidates = [arm for arm in arms if not arm.is_control]
    base, best = candidates[0], min(candidates, key=lambda arm: losses[arm].value)
    to_base, to_best = (
        {arm: paired_difference(final[arm], final[other], byte_counts, weights) for arm in arms} for other in (base, best)
    )
    rows = []
    for arm, own in by_arm.items():
        tokens = sum(int(run.evaluation.tokens.sum()) for run in own)
        after = [bits_per_byte(nll[arm][:, :, r], byte_counts, weights).value for r in range(nll[arm].shape[-1])]
        rows.append(
            Row(
                arm=arm,
                parameters=own[0].training.parameters,
                bits_per_byte=losses[arm],
                difference_to_base=to_base[arm],
                difference_to_best=to_best[arm],
                bits_per_byte_after_loop=after,
                loss_nats_per_token=float(final[arm].sum() / tokens),
                next_token_accuracy=float(sum(run.evaluation.correct.sum() for run in own) / tokens),
                training_tokens=own[0].training.tokens,
                training_flops=own[0].flops,
                training_seconds=float(np.mean([run.training.seconds for run in own])),
                training_tokens_per_second=float(np.median([run.training.tokens_per_second for run in own])),
                costs=costs[arm],
                runs=[run.name for run in own],
                loss_curves=[_pairs(run.training.loss_curve) for run in own],
                validation_curves=[_pairs(run.training.validation_curve) for run in own],
                diagnosis=f"{own[0].name}/{CheckpointDiagnosis.FILE}",
                answers=answers_of([run.answers for run in own if run.answers is not None]) if own[0].answers else [],
            )
        )
    chosen = choose({arm: losses[arm].value for arm in candidates}, to_best)
    picked = {row.arm: row for row in rows}
    return StudyResult(
        rows=rows,
        base=base.name,
        best=best.name,
        chosen=chosen.name,
        verdict=verdict(rows, picked[base], picked[best], picked[chosen], match, seeds, corpus.summary.get("unit", "")),
        rule=RULE,
        match=match,
        seeds=seeds,
        documents=len(byte_counts),
        document_bytes=int(byte_counts.sum()),
        recipe=dataclasses.asdict(recipe),
        corpus=corpus.summary,
        command=command,
        environment=environment(),
        folder=folder,
    )


def verdict(rows: list[Row], base: Row, best: Row, chosen: Row, match: str, seeds: int, task_unit: str = "") -> Verdict:
    """Return the recommendation, its evidence and its limits, in plain sentences.

    Args:
        rows: all arms.
        base: the arm that the others are compared with.
        best: the arm with the lowest loss.
        chosen: the recommended arm.
        match: tokens or compute.
        seeds: trainings per arm.
        task_unit: unit of a task's groups.
    """
    name, loss = chosen.arm.label, chosen.bits_per_byte.value
    unit = "bits per answer" if chosen.answers else "bits per byte"
    if len(rows) == 1:
        return Verdict(
            "Nothing was compared.",
            f"{name} is the only loop count of this study; it has {loss:.3f} {unit}. To find out which count pays, name several, "
            f"for instance --loops 1 2 3.",
        )
    matched = "the same training tokens" if match == "tokens" else "the same training compute"
    if chosen is not best:
        gap = chosen.difference_to_best
        text = (
            f"{best.arm.label} has the lowest loss ({best.bits_per_byte.value:.3f} {unit}), but {name} is "
            f"within the paired 95% interval of it ({gap.low:+.3f} to {gap.high:+.3f}) and is cheaper. "
        )
    else:
        text = f"It has the lowest loss ({loss:.3f} {unit}), and nothing cheaper comes within its paired 95% interval. "
    if chosen is not base:
        change = chosen.difference_to_base
        flops = chosen.training_flops_per_token / base.training_flops_per_token
        text += (
            f"Against {base.arm.label} it changes the loss by {change.value:+.3f} {unit} ({change.low:+.3f} to {change.high:+.3f}) "
            f"with {matched}; a training token costs {flops:.2f} times the FLOPs, a decode step "
            f"{chosen.costs.decode_ms.median / base.costs.decode_ms.median:.2f} times the time. "
        )
    else:
        text += f"More loops did not help here with {matched}. "
    if chosen.answers:
        text += _of_task(rows, task_unit)
    text += _of_controls(rows, unit)
    if match == "tokens":
        text += (
            "Equal tokens favour more loops, which spend more compute on each token: with unlimited fresh data and a fixed "
            "compute budget the plain model may still win (--match compute tests it). "
        )
    if seeds == 1:
        text += (
            "With one seed the intervals cover the choice of documents, not the luck of training (--seeds 3 covers both). "
        )
    text += (
        "Models this small, trained this briefly, on this corpus say which way it goes here, not what a 7B model would do."
    )
    return Verdict(f"Take {name}.", text)


def _of_task(rows: list[Row], unit: str) -> str:
    """State up to which group every loop count solves the task."""
    solved = [(row.arm.label, solved_up_to(row.answers)) for row in rows if not row.arm.is_control]
    if not any(group for _, group in solved):
        return f"No loop count has {SOLVED:.0%} of even the easiest answers right: train longer before one is chosen. "
    reached = "; ".join(f"{label}: " + ("nothing" if group is None else f"up to {unit} {group}") for label, group in solved)
    return f"At least {SOLVED:.0%} of the answers are right with {reached}. "


def _of_controls(rows: list[Row], unit: str) -> str:
    """State how many layers the loops are worth, and whether training longer does as well."""
    by_arm, text = {row.arm: row for row in rows}, ""
    for row in rows:
        if row.arm.is_control or row.arm.loops == 1:
            continue
        alike = [other for other in rows if other.arm.layers > 1 and other.arm.changes == row.arm.changes]
        deep = sorted(alike, key=lambda other: other.arm.layers)
        if deep:
            reached = [other.arm.layers for other in deep if row.bits_per_byte.value <= other.bits_per_byte.value]
            worth = max(reached, default=1)
            text += f"{row.arm.label} does at least as well as {worth} time{'s' if worth > 1 else ''} the layers, each with its own weights"
            text += (
                "; "
                if worth >= deep[-1].arm.layers
                else f", not as well as {min(o.arm.layers for o in deep if o.arm.layers > worth)}; "
            )
        longer = by_arm.get(Arm(loops=1, compute_of=row.arm.loops, changes=row.arm.changes))
        if longer is not None:
            text += (
                f"one loop with the training compute of {row.arm.label} has {longer.bits_per_byte.value:.3f} {unit}, these loops "
                f"{row.bits_per_byte.value:.3f}; "
            )
    return text[:1].upper() + text[1:].removesuffix("; ") + ". " if text else ""


def _pairs(curve: Any) -> list[list[float]]:
    return [list(point) for point in curve]
