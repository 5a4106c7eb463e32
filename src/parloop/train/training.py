"""The verb `train`: run a recipe, on text or conversations, into a folder, in one process or in as many as a launcher starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from ..card import CARD
from ..checkpoints import check_weights, load_config
from ..corpus import Corpus
from ..errors import RecipeError, SourceError
from .card import card_of_run
from .recipe import ChatRecipe, Recipe, load_recipe
from .result import TrainingResult
from .run import clear_left_over, close_run, opened_run
from .sharding import start_processes


def train(
    recipe: Recipe | ChatRecipe | str | Path,
    output: str | Path | None = None,
    *,
    changes: dict[str, Any] | None = None,
    corpus: Corpus | None = None,
    console: Console | None = None,
    on_step: Callable[[int, float], None] | None = None,
    fresh: bool = False,
) -> TrainingResult:
    """Run a recipe into a folder, or continue it there. On several processes, all of them call it.

    Args:
        recipe: a recipe, the name of a shipped one, or a file.
        output: the folder. Default: runs/train/RECIPE-rR.
        changes: new values for fields of a recipe that is given by name or file.
        corpus: the prepared corpus for training on text; default: it is loaded from the cache, or prepared.
        console: where progress is printed; default: the standard error.
        on_step: called after every step with its number and loss; default: a progress bar on `console`.
        fresh: delete what is in the folder and start over.

    Returns:
        the result. training.json in the folder holds the same.

    Raises:
        RecipeError: the folder holds a run of another recipe or on other text, or an input of this one; there is no such device; the
            text is too short for a step; the processes cannot share a step evenly; recipe and checkpoint do not fit; for
            conversations, TRL or peft is not installed.
        SourceError: there is no text or no conversation, or the checkpoint has no chat template.
        OutputError: the folder cannot be written, holds something other than a run, or another command works in it.
        CheckpointError: the checkpoint to continue cannot be read.
        TrainingDivergedError: the loss is not a number, or far above its start.
    """
    changes = changes or {}
    if isinstance(recipe, (str, Path)):
        name, recipe = str(recipe), load_recipe(recipe, **changes)
        output = default_folder(name, recipe) if output is None else output
        try:
            return _train(recipe, Path(output), corpus, console, on_step, fresh)
        except SourceError as error:
            if changes.keys() & {"source", "chat"}:
                raise
            raise SourceError(f"{error} (recipe {name!r})") from error
    if output is None or changes:
        raise RecipeError(
            "a recipe object needs an output folder, and is changed with dataclasses.replace, not with `changes`."
        )
    return _train(recipe, Path(output), corpus, console, on_step, fresh)


def default_folder(name: str, recipe: Recipe | ChatRecipe) -> Path:
    """Return runs/train/RECIPE, followed by the loop counts if the recipe has some."""
    counts = recipe.loop_counts or []
    return Path("runs/train", Path(name).stem + ("-r" + "-".join(map(str, counts)) if counts else ""))


def _train(
    recipe: Recipe | ChatRecipe,
    output: Path,
    corpus: Corpus | None,
    console: Console | None,
    on_step: Callable[[int, float], None] | None,
    fresh: bool,
) -> TrainingResult:
    # Refuse what cannot be trained before anything is written or deleted.
    if isinstance(recipe, ChatRecipe):
        from . import finetune

        finetune.check(recipe)
    elif recipe.init_from is not None:
        check_weights(recipe.init_from)
    state = start_processes(recipe)
    console = console or Console(stderr=True, quiet=not state.is_main_process)
    with opened_run(recipe, output, state, fresh, console, on_step, corpus) as run:
        if run.done:
            if state.is_main_process:
                clear_left_over(output)
            try:
                return TrainingResult.load(output)
            except ValueError as error:
                raise RecipeError(
                    f"{TrainingResult.FILE} in {str(output)!r} cannot be read ({error}): start over with --fresh."
                ) from error
        if isinstance(recipe, ChatRecipe):
            result = finetune.finetune(run, recipe)
        else:
            from .pretrain import pretrain

            result = pretrain(run, recipe, corpus)
        result.folder = output
        if run.out is not None:
            config, losses = load_config(output), (result.loss_curve, result.validation_curve)
            run.out.offer(CARD, card_of_run(output.absolute().name, recipe, config, *losses, result.parameters))
            close_run(output, result)
        state.wait_for_everyone()
        return result
