"""A run: its recipe, its folder from the first file to the last, and its progress.

The folder holds recipe.yaml, corpus.json (which documents), the tokenizer and, for a mixture, validation rows; checkpoint-N folders
while it runs; and in the end the model and training.json. Running the same recipe again, on any number of processes, continues an
interrupted run from its last complete checkpoint, with the same data order and random numbers, and leaves a finished run alone.
"""

import contextlib
import dataclasses
import glob
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from ..corpus import Corpus
from ..corpus.stream import places_in
from ..errors import OutputError, RecipeError
from ..folder import Kind, OutputFolder, claimed, delete, disk_errors
from ..record import write_json, write_text
from .checkpoint import checkpoints_of
from .recipe import ChatRecipe, Recipe, RunSettings
from .result import TrainingResult
from .sharding import first_process_first

TRAINED_ON = "corpus.json"  # digest of the training data, written when training begins
RUN = Kind(
    "a run",
    files=r"recipe\.yaml|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja|"
    r"README\.md",
    later=r"README\.md",
    made=r"corpus\.json|training\.json|config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
    r"checkpoint-\d+|runs|adapter|validation|conversations|stream-\d+\.json|diagnosis\.json|evaluation-\d+\.npz|.*\.partial(\.npz)?",
    known=lambda folder: (folder / "recipe.yaml").is_file() and has_begun(folder),
    over=False,  # files that a user edits during a run stay as they are
)
LEFT_OVER = "left-over.partial"  # names of files that a finished run must still delete
GOES_ON = "it continues from its last complete checkpoint"
FREE_TO_CHANGE = {  # do not change what is trained
    "device", "log_every", "save_every", "keep_checkpoints", "compile", "gradient_checkpointing", "gradient_accumulation", "gather",
    "replicas",
}  # fmt: skip


@dataclass
class Run:
    """An open run.

    Attributes:
        recipe: its recipe.
        output: its folder.
        out: the folder as claimed by the first process; None on the others, and if the run is finished.
        state: this process among those that train.
        console: where progress is printed.
        on_step: called after every step with its number and loss; None: a progress bar.
    """

    recipe: Recipe | ChatRecipe
    output: Path
    out: OutputFolder | None
    state: PartialState
    console: Console
    on_step: Callable[[int, float], None] | None = None

    @property
    def done(self) -> bool:
        """Whether the run is finished."""
        return (self.output / TrainingResult.FILE).is_file()

    def label(self, counts: list[int]) -> str:
        """Return the text beside the progress bar: folder and loop counts."""
        return f"{self.output.name}: R = {' or '.join(map(str, counts))}"


@contextlib.contextmanager
def opened_run(
    recipe: Recipe | ChatRecipe,
    output: Path,
    state: PartialState,
    fresh: bool,
    console: Console,
    on_step: Callable[[int, float], None] | None = None,
    corpus: Corpus | None = None,
) -> Iterator[Run]:
    """Open the run in a folder. The first process claims the folder while it trains. Every process must call it.

    Args:
        recipe: the run's recipe.
        output: its folder.
        state: this process among those that train.
        fresh: delete what is in the folder and start over.
        console: where progress is printed.
        on_step: called after every step with its number and loss; None: a progress bar.
        corpus: the prepared corpus that it will train on, if there is one already.

    Raises:
        RecipeError, OutputError: as `train`.
    """
    with contextlib.ExitStack() as stack:
        run = Run(recipe, output, None, state, console, on_step)
        stack.enter_context(disk_errors(output, GOES_ON))  # on the other processes
        with first_process_first(state):
            if state.is_main_process:
                _keep_inputs(recipe, output)
                if fresh or not run.done:
                    run.out = stack.enter_context(claimed(output, RUN, going_on=GOES_ON))
                    open_run(recipe, run.out, fresh)
                elif differ := _differences(recipe, output):
                    raise _another_recipe(output, differ)
                if corpus is not None:
                    same_text(corpus.summary, output)
        yield run


def open_run(recipe: Recipe | ChatRecipe, out: OutputFolder, fresh: bool) -> None:
    """Check that the run in the folder is this recipe's, or make it so.

    The recipe of a run that has not begun to train can be changed: its prepared data are made again.

    Raises:
        RecipeError: the folder holds another recipe's run.
        OutputError: the folder holds something other than a run, which would be deleted.
    """
    path = out.path / "recipe.yaml"
    if fresh:
        _delete_run(out)
    if path.exists():
        differ = _differences(recipe, out.path)
        if differ and has_begun(out.path):
            raise _another_recipe(out.path, differ)
        if differ:
            _delete_run(out)
        elif _fields_of(type(recipe), path) == dataclasses.asdict(recipe.placed()) or not out.owns("recipe.yaml"):
            return
    out.write("recipe.yaml", recipe.placed().to_yaml())


def _differences(recipe: Recipe | ChatRecipe, output: Path) -> dict[str, tuple[Any, Any]]:
    """Return the fields that determine what is trained and differ from the folder's recipe: name -> (there, here)."""
    before, now = _fields_of(type(recipe), output / "recipe.yaml"), dataclasses.asdict(recipe.placed())
    return {
        name: (before.get(name), now[name]) for name in now if now[name] != before.get(name) and name not in FREE_TO_CHANGE
    }


def _another_recipe(output: Path, differ: dict[str, tuple[Any, Any]]) -> RecipeError:
    shown = ", ".join(f"{name} {before!r} -> {now!r}" for name, (before, now) in differ.items())
    return RecipeError(
        f"output {str(output)!r} holds a run of another recipe ({shown}): choose another output, or start over with --fresh."
    )


def _fields_of(kind: type[RunSettings], path: Path) -> dict[str, Any]:
    try:
        return dataclasses.asdict(kind.load(path).placed())
    except RecipeError as error:
        raise RecipeError(f"the folder holds a run of another kind or version ({error}): choose another output.") from error


def save_tokenizer(tokenizer: Any, out: OutputFolder) -> None:
    """Write the tokenizer, once: a chat template that is put into the folder later is kept."""
    if not (out.path / "tokenizer_config.json").exists():  # the last file that is written
        out.write_files(tokenizer.save_pretrained)


def close_run(output: Path, result: TrainingResult) -> None:
    """Write the result, which marks the run as finished, and delete the files that only resuming needs."""
    left = [*checkpoints_of(output), output / "validation", output / "conversations", *places_in(output)]
    write_json(output / LEFT_OVER, [path.name for path in left])
    write_text(output / result.FILE, result.to_json())
    clear_left_over(output)


def clear_left_over(output: Path) -> None:
    """Delete the files that a finished run needed for resuming, if close_run was killed before it had done so."""
    left_over = output / LEFT_OVER
    if left_over.exists():
        for name in json.loads(left_over.read_text(encoding="utf-8")):
            delete(output / name)
        left_over.unlink()


def has_begun(output: Path) -> bool:
    """Return whether the run in a folder has begun to train."""
    return (output / TRAINED_ON).exists() or (output / TrainingResult.FILE).exists()


def _keep_inputs(recipe: Recipe | ChatRecipe, output: Path) -> None:
    """Check that the output folder holds none of the run's inputs, which it would overwrite, or --fresh delete.

    Raises:
        RecipeError: it holds one.
    """
    read: dict[str, str | None]
    if isinstance(recipe, ChatRecipe):
        read = {"model": recipe.model, "chat": recipe.chat}
    else:
        read = {"init_from": recipe.init_from, "tokenizer": recipe.tokenizer}
        read |= {f"source {entry['source']!r}": entry["source"] for entry in recipe.sources}
    for name, given in read.items():
        # For a glob, the folder before its first wildcard.
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(os.path.expanduser(given or "")).parts)
        there = Path(*fixed) if given else None
        if there is not None and there.exists() and there.resolve().is_relative_to(output.resolve()):
            raise RecipeError(f"output {str(output)!r} holds what is read ({name}): choose another output.")


def _delete_run(out: OutputFolder) -> None:
    if Path.cwd().resolve().is_relative_to(out.path.resolve()):
        raise OutputError(
            f"output {str(out.path)!r} holds the folder that this runs in, which is not deleted: choose another output."
        )
    out.clear()


def bytes_to_come(model: Any, settings: RunSettings, steps: int, output: Path, weight_bytes: int = 4) -> float:
    """Return the bytes that a run's checkpoints and final model will still need, beyond those already written."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    checkpoint = 3 * 4 * trained + 2**22  # weights and both moments, in float32; tokenizer and other small files
    made = math.ceil(steps / settings.save_every)
    kept, there = min(settings.keep_checkpoints, made), len(checkpoints_of(output))
    most = kept + (made > kept)  # an older one is deleted when a new one is complete
    return max((most - there) * checkpoint, (kept - there) * checkpoint + weight_bytes * whole)


def same_text(summary: dict[str, Any], output: Path) -> None:
    """Check that a run's training data are those that it began with.

    Raises:
        RecipeError: they have changed.
    """
    path = output / TRAINED_ON
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["digest"] != summary["digest"]:
        raise RecipeError(
            f"source {summary['source']!r} has changed since the run in {str(output)!r} began, and losses on different "
            f"text do not compare: start over with --fresh, or choose another --output."
        )
