"""Training on text, or on a task."""

from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments

from ..checkpoints import load_model
from ..corpus import Corpus, collate
from ..corpus.stream import what_was_read
from ..corpus.tasks import is_task, task_of
from ..folder import check_room
from .build import branch_scale, build_model
from .callbacks import HiddenScaleWarmup
from .checkpoint import save_model
from .data import TextData
from .fit import curves, fit
from .recipe import Recipe
from .result import TrainingResult
from .run import Run, bytes_to_come, save_tokenizer
from .task_accuracy import task_accuracy
from .trainer import PLTTrainer, training_arguments


def pretrain(run: Run, recipe: Recipe, corpus: Corpus | None = None) -> TrainingResult:
    """Train a model on text, continuing where the run stands. Every process must call it.

    Args:
        run: the open run.
        recipe: its recipe.
        corpus: the prepared corpus; default: it is loaded from the cache, or prepared.

    Returns:
        the run's result; the model is in its folder.

    Raises:
        RecipeError, CheckpointError, TrainingDivergedError: as `train`.
    """
    data = TextData(run, recipe, corpus)
    if run.out is not None:
        save_tokenizer(data.tokenizer, run.out)
    model = build_model(recipe, data.tokenizer, run.state)
    if run.out is not None:
        check_room(run.output, bytes_to_come(model, recipe, recipe.steps, run.output), "training")
    arguments = training_arguments(
        recipe, run.output, recipe.steps, run.state.num_processes, ignore_data_skip=data.stream is not None
    )
    trainer = PLTTrainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=data.rows,
        eval_dataset=data.validation,
        data_collator=collate,
        processing_class=data.tokenizer,
    )
    trainer.loop_counts = recipe.loop_counts if len(recipe.loop_counts) > 1 else None
    trainer.branch_scale = branch_scale(recipe)
    trainer.stream = data.stream
    if recipe.hidden_scale_warmup_share and recipe.num_loops > 1:
        steps = max(1, round(recipe.hidden_scale_warmup_share * recipe.steps))
        trainer.add_callback(HiddenScaleWarmup(model.config, steps))
    fit(trainer, run, recipe.steps, run.label(recipe.loop_counts), data.digest)

    save_model(model, run.output)
    if data.stream is not None:
        data.stream.save(run.output)
        run.state.wait_for_everyone()
    answers = None
    if run.out is not None and is_task(recipe.source):
        answers = _answers(recipe, run.output, data.tokenizer)
    return TrainingResult(
        steps=recipe.steps,
        tokens=recipe.steps * recipe.batch_size * recipe.length,
        processes=run.state.num_processes,
        parameters=sum(p.numel() for p in model.parameters()),
        data=what_was_read(run.output) if data.stream is not None and run.out is not None else None,
        answers=answers,
        **curves(trainer, recipe.batch_size * recipe.length),
    )


def _answers(recipe: Recipe, output: Path, tokenizer: Any) -> dict[str, Any]:
    """Ask the finished model held-out questions of its task, and keep every outcome beside it."""
    outcomes = task_accuracy(load_model(output, recipe.device), task_of(recipe.source), tokenizer=tokenizer)
    kept: dict[str, Any] = outcomes.arrays()
    np.savez_compressed(output / f"evaluation-{len(outcomes.correct)}.npz", **kept)
    return outcomes.summary()
