"""The runs of a study: one per arm and seed, each in its own folder, trained, evaluated and diagnosed."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID

from ..checkpoints import load_model
from ..corpus import Corpus
from ..diagnosis.checkpoint import diagnose_checkpoint
from ..diagnosis.results import CheckpointDiagnosis
from ..errors import RecipeError
from ..model.flops import training_flops_per_token
from ..record import write_text
from ..report.terminal import progress_bars
from ..train.evaluate import Evaluation, evaluate_documents
from ..train.recipe import Recipe
from ..train.result import TrainingResult
from ..train.task_accuracy import TaskAccuracy, task_accuracy
from ..train.training import train
from .arms import Arm
from .jobs import side_by_side
from .task import TaskCorpus

INSTANCES = 256  # held-out questions of every group of a task
LENS_SAMPLES = 32  # for the report's section on what each loop adds; parloop diagnose takes more


@dataclass
class Run:
    """One training.

    Attributes:
        arm: its arm.
        seed: its seed.
        recipe: the protocol for this arm and seed.
        flops: FLOPs of the whole training.
        first: whether this is the arm's first seed, whose model is timed and diagnosed.
        training: the result of `train`, set by `train_all`.
        evaluation: held-out losses, set by `train_all`.
        answers: outcomes on held-out questions of a task, set by `train_all`.
    """

    arm: Arm
    seed: int
    recipe: Recipe
    flops: float
    first: bool
    training: TrainingResult = field(init=False)
    evaluation: Evaluation = field(init=False)
    answers: TaskAccuracy | None = None

    @property
    def name(self) -> str:
        """Name of the run's folder in the study's folder."""
        return f"{self.arm.name}-seed{self.seed}"


def plan(recipe: Recipe, corpus: Corpus | TaskCorpus, arms: list[Arm], seeds: int, match: str) -> list[Run]:
    """Return the runs in order: seed by seed, and within a seed from the cheapest arm to the most expensive.

    Raises:
        RecipeError: match is compute, so all arms have the same compute already, and one of them is the control compute.
    """
    if match == "compute" and any(arm.compute_of for arm in arms):
        raise RecipeError(
            "all loop counts have the same training compute with match=compute: leave the control compute out."
        )
    recipes = {arm: arm.recipe(recipe) for arm in arms}
    cost = {
        arm: training_flops_per_token(own.plt_config(corpus.tokenizer), own.length, arm.loops)
        for arm, own in recipes.items()
    }
    mean = sum(cost.values()) / len(cost)
    runs = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        for arm in sorted(arms, key=lambda arm: cost[arm]):
            compute = cost[arm] if match == "tokens" else mean  # FLOPs per token, for the recipe's number of tokens
            if arm.compute_of:
                own = recipes[arm]
                compute = training_flops_per_token(own.plt_config(corpus.tokenizer), own.length, arm.compute_of)
            tokens = round(recipes[arm].tokens * compute / cost[arm])
            own = dataclasses.replace(recipes[arm], seed=seed, tokens=tokens)
            flops = cost[arm] * own.steps * own.batch_size * own.length
            runs.append(Run(arm, seed, own, flops, seed == recipe.seed))
    return runs


def train_all(
    runs: list[Run],
    output: Path,
    corpus: Corpus | TaskCorpus,
    document_chars: int,
    console: Console,
    fresh: bool,
    jobs: int = 1,
) -> None:
    """Train, evaluate and diagnose every run in its own folder. Finished runs are kept.

    Args:
        jobs: number of concurrent runs.
    """
    work = partial(finish, output=output, corpus=corpus, document_chars=document_chars, fresh=fresh)
    with progress_bars(console) as progress:
        bars = Bars(progress, runs)
        if jobs > 1:
            finished = side_by_side(work, runs, jobs, bars.show, console)
            for run, other in zip(runs, finished):
                vars(run).update(vars(other))
        else:
            for number, run in enumerate(runs):
                work(run, console=console, on_step=partial(bars.show, number))


def finish(
    run: Run,
    output: Path,
    corpus: Corpus | TaskCorpus,
    document_chars: int,
    fresh: bool,
    console: Console,
    on_step: Callable[[int, float], None],
) -> Run:
    """Train and evaluate a run, diagnose it if it is the first of its arm, and return it with the results."""
    on_step(0, float("nan"))
    prepared = corpus if isinstance(corpus, Corpus) else None
    run.training = train(run.recipe, output / run.name, corpus=prepared, console=console, on_step=on_step, fresh=fresh)
    on_step(run.recipe.steps, run.training.loss_curve[-1][1])
    look_at(run, output / run.name, corpus, document_chars, console)
    return run


class Bars:
    """A progress bar for the study, and one for every run that has begun."""

    def __init__(self, progress: Progress, runs: list[Run]):
        self.progress, self.runs = progress, runs
        self.whole = progress.add_task("study", total=sum(run.flops for run in runs), loss="")
        self.tasks: dict[int, TaskID] = {}
        self.steps = [0] * len(runs)

    def show(self, number: int, step: int, loss: float) -> None:
        """Update the bars: run `number` is at this step. An unknown loss is NaN."""
        run = self.runs[number]
        if number not in self.tasks:
            seed = "" if self.runs[-1].first else f", seed {run.seed}"
            label = f"run {number + 1} of {len(self.runs)}: {run.arm.label}{seed}"
            self.tasks[number] = self.progress.add_task(label, total=run.recipe.steps, loss="")
        self.steps[number] = step
        done = sum(own.flops * steps / own.recipe.steps for own, steps in zip(self.runs, self.steps))
        self.progress.update(self.whole, completed=done)
        self.progress.update(self.tasks[number], completed=step)
        if loss == loss:
            self.progress.update(self.tasks[number], loss=f"loss {loss:.3f}")


def look_at(run: Run, folder: Path, corpus: Corpus | TaskCorpus, document_chars: int, console: Console) -> None:
    """Evaluate a trained run on every validation document, or on held-out questions of a task; diagnose the arm's first run.

    The checkpoint is loaded once, and not at all if the folder holds both results. Documents come from the corpus, not from its source.
    """
    kept = document_chars if isinstance(corpus, Corpus) else INSTANCES
    losses, diagnosis = folder / f"evaluation-{kept}.npz", folder / CheckpointDiagnosis.FILE
    evaluated, looked_at = losses.exists(), diagnosis.exists() or not run.first
    model = None if evaluated and looked_at else load_model(folder, run.recipe.device)
    if not evaluated:
        scratch = losses.with_suffix(".partial.npz")
        if isinstance(corpus, Corpus):
            texts = list(corpus.validation["text"])
            evaluation = evaluate_documents(model, corpus.tokenizer, texts, run.recipe.length, max_chars=document_chars)
            np.savez_compressed(scratch, **vars(evaluation))
        else:
            answers = task_accuracy(model, corpus.task, instances=INSTANCES, tokenizer=corpus.tokenizer)
            np.savez_compressed(scratch, **answers.arrays())  # type: ignore[arg-type]
        os.replace(scratch, losses)
    if isinstance(corpus, Corpus):
        run.evaluation = Evaluation(**np.load(losses))
    else:
        run.answers = TaskAccuracy.of(corpus.task, np.load(losses))
        run.evaluation = run.answers.evaluation
    if not looked_at:
        held_out = None
        if isinstance(corpus, Corpus):
            held_out = zip(corpus.validation["name"], corpus.validation["text"])
        record = diagnose_checkpoint(
            folder, model=model, samples=LENS_SAMPLES, batch_size=8, held_out=held_out, console=console,
            on_batch=lambda samples: None,
        )  # fmt: skip
        write_text(diagnosis, record.to_json())
