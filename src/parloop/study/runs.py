"""The runs of a study: an arm and a seed each, in a folder of its own, trained, evaluated and looked at."""

import dataclasses
import os
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
from .task import TaskCorpus

INSTANCES = 256  # held-out questions of every group of a task
LENS_SAMPLES = 32  # for the report's chapter on what each loop adds; parloop diagnose takes more


@dataclass
class Run:
    """One training.

    Attributes:
        arm, seed: whose it is.
        recipe: the protocol for them.
        flops: of the whole training.
        first: whether it is the arm's first seed, which is timed and looked at through the lenses.
        training: what `train` returned, and evaluation: its losses; both are there once `train_all` is through.
        answers: to the held-out questions of a task, likewise.
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
        """The run's folder in the study's."""
        return f"{self.arm.name}-seed{self.seed}"


def plan(recipe: Recipe, corpus: Corpus | TaskCorpus, arms: list[Arm], seeds: int, match: str) -> list[Run]:
    """Return the runs in order, seed by seed, and of a seed from the cheapest arm to the dearest.

    Raises:
        RecipeError: all arms have the same compute already, and one is its control.
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
            compute = cost[arm] if match == "tokens" else mean  # FLOPs of as many tokens as the recipe says
            if arm.compute_of:
                own = recipes[arm]
                compute = training_flops_per_token(own.plt_config(corpus.tokenizer), own.length, arm.compute_of)
            tokens = round(recipes[arm].tokens * compute / cost[arm])
            own = dataclasses.replace(recipes[arm], seed=seed, tokens=tokens)
            flops = cost[arm] * own.steps * own.batch_size * own.length
            runs.append(Run(arm, seed, own, flops, seed == recipe.seed))
    return runs


def train_all(
    runs: list[Run], output: Path, corpus: Corpus | TaskCorpus, document_chars: int, console: Console, fresh: bool
) -> None:
    """Train, evaluate and diagnose every run in a folder of its own. What is there already is kept."""
    with progress_bars(console) as progress:
        whole = progress.add_task("study", total=sum(run.flops for run in runs), loss="")
        for number, run in enumerate(runs, 1):
            label = f"run {number} of {len(runs)}: {run.arm.label}" + ("" if runs[-1].first else f", seed {run.seed}")
            task = progress.add_task(label, total=run.recipe.steps, loss="")
            on_step = partial(_show, progress, task, whole, progress.tasks[whole].completed, run)
            prepared = corpus if isinstance(corpus, Corpus) else None
            run.training = train(
                run.recipe, output / run.name, corpus=prepared, console=console, on_step=on_step, fresh=fresh
            )
            on_step(run.recipe.steps, run.training.loss_curve[-1][1])
            look_at(run, output / run.name, corpus, document_chars, console)


def _show(progress: Progress, task: TaskID, whole: TaskID, before: float, run: Run, step: int, loss: float) -> None:
    """Move the bars of a run and of the study, which stood at `before` when the run began."""
    progress.update(task, completed=step)
    progress.update(whole, completed=before + step * run.flops / run.recipe.steps)
    if loss == loss:
        progress.update(task, loss=f"loss {loss:.3f}")


def look_at(run: Run, folder: Path, corpus: Corpus | TaskCorpus, document_chars: int, console: Console) -> None:
    """Evaluate a trained run on every validation document, or on held-out questions of a task, and diagnose it if it is the arm's first.

    The checkpoint is loaded once, and not at all if the folder holds both; the corpus has the documents, so its source is not read.
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
