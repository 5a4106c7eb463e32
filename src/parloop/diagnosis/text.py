"""The text that a checkpoint is diagnosed on, and whether the checkpoint may have been trained on it.

The recipe.yaml of a checkpoint, and those of the checkpoints that it was made from, name its training text. Of such text, only documents
that training held out are used.
"""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..corpus import sources
from ..corpus.corpus import CorpusSettings
from ..corpus.tasks import is_task, task_of
from ..errors import SourceError
from ..train.recipe import ChatRecipe, Recipe, load_recipe


@dataclass
class Text:
    """The text of a diagnosis.

    Attributes:
        settings: the source and how it is read.
        held_out: whether only documents that training held out are used.
        trained_on: whether the model may have been trained on the text: "no: ..." or "may be: ...", and why.
        recipe: the checkpoint's recipe, if there is one.
        recipe_file: file of this recipe.
    """

    settings: CorpusSettings
    held_out: bool
    trained_on: str
    recipe: Recipe | ChatRecipe | None
    recipe_file: Path | None


def choose_text(checkpoint: str | Path, data: str | None = None, extensions: list[str] | None = None) -> Text:
    """Choose the text to diagnose a checkpoint on.

    Args:
        checkpoint: folder or Hub name.
        data: a source. Default: the source in the checkpoint's recipe (of a mixture, the one with the largest share), or the standard
            library.
        extensions: extensions of the files to read in a folder, instead of the recipe's.

    Raises:
        SourceError: there is no such source.
        RecipeError: a recipe.yaml cannot be read.
    """
    history, unknown = trainings(checkpoint)
    recipe_file, recipe = history[0] if history else (None, None)
    parts = [
        (file, past.corpus_settings(part)) for file, past in history if isinstance(past, Recipe) for part in _by_weight(past)
    ]
    own = next((part for part in parts if data is None and part[0] == recipe_file), None)
    own = own or next((part for part in parts if data is not None and same_source(part[1].source, data)), None)
    settings = own[1] if own else CorpusSettings(source=sources.STDLIB)
    if data is not None:
        settings = dataclasses.replace(settings, source=data)
    if extensions:
        settings = dataclasses.replace(settings, extensions=tuple(extensions))

    if is_task(settings.source):
        return Text(settings, True, _trained_on_task(settings.source, history, unknown), recipe, recipe_file)
    gone: list[str] = []
    named = [own] if own else []
    for file, part in parts:
        if not any(file == other for other, _ in named) and _share_files(settings, part, gone, file):
            if not named:  # read the source as training read it
                changes = {"source": settings.source} | ({"extensions": settings.extensions} if extensions else {})
                settings = dataclasses.replace(part, **changes)  # type: ignore[arg-type]
            named.append((file, part))
    if named:
        settings = dataclasses.replace(settings, validation_share=min(part.validation_share for _, part in named))
    conversations = [
        file
        for file, past in history
        if isinstance(past, ChatRecipe)
        and _share_files(settings, CorpusSettings(source=past.chat, extensions=()), gone, file)
    ]
    return Text(settings, bool(named), _trained_on(history, named, conversations, gone, unknown), recipe, recipe_file)


def trainings(checkpoint: str | Path) -> tuple[list[tuple[Path, Recipe | ChatRecipe]], str | None]:
    """Follow a checkpoint back through its trainings.

    Returns:
        the recipes with their files, the last training first; and the checkpoint at the beginning, if its training data are not known.
    """
    found: list[tuple[Path, Recipe | ChatRecipe]] = []
    current: str | None = str(checkpoint)
    while current is not None:
        folder = Path(current)
        if re.fullmatch(r"checkpoint-\d+", folder.name):  # the run's folder holds the recipe
            folder = folder.parent
        file = folder / "recipe.yaml"
        if not file.is_file() or any(file.samefile(other) for other, _ in found):
            return found, current
        recipe = load_recipe(file)
        found.append((file, recipe))
        current = recipe.model if isinstance(recipe, ChatRecipe) else recipe.init_from
    return found, None


def same_source(one: str, other: str) -> bool:
    """Return whether two spellings mean the same source."""
    return _resolved(one) == _resolved(other)


def _resolved(source: str) -> str:
    if source in (sources.STDLIB, sources.INSTALLED):
        return source
    if source.startswith(sources.HUB):
        return source if "@" in source else f"{source}@train"
    if is_task(source):
        return task_of(source).source
    return os.path.realpath(os.path.expanduser(source))


def _by_weight(recipe: Recipe) -> list[dict]:
    return sorted(recipe.sources, key=lambda part: -part["weight"])


def _share_files(one: CorpusSettings, other: CorpusSettings, gone: list[str], file: Path) -> bool:
    """Return whether two sources have documents in the same files. Appends to `gone` a source that no longer exists."""
    if same_source(one.source, other.source):
        return True
    if any(part.source.startswith(sources.HUB) or is_task(part.source) for part in (one, other)):
        return False
    try:
        trained = {os.path.realpath(path) for path in sources.files_read(other)}
    except SourceError:
        gone.append(f"{other.source}, which {file} names, no longer exists")
        return False
    return any(os.path.realpath(path) in trained for path in sources.files_read(one))


def _trained_on_task(source: str, history: list[tuple[Path, Recipe | ChatRecipe]], unknown: str | None) -> str:
    """State whether the model may have been trained on a task's held-out documents: other options hold out other documents."""
    task = task_of(source)
    doubts = [
        f"{file} names it with other options, {past.source}, which hold out other documents"
        for file, past in history
        if isinstance(past, Recipe) and is_task(past.source)
        for trained in [task_of(past.source)]
        if trained.name == task.name and trained.content_options != task.content_options
    ]
    if not history:
        doubts.append("no recipe.yaml says what the model was trained on")
    elif unknown is not None:
        doubts.append(f"it was made from {unknown}, of which no recipe.yaml says what it was trained on")
    return f"may be: {'; '.join(doubts)}" if doubts else "no: no training on a task uses its held-out documents"


def _trained_on(
    history: list[tuple[Path, Recipe | ChatRecipe]],
    named: list[tuple[Path, CorpusSettings]],
    conversations: list[Path],
    gone: list[str],
    unknown: str | None,
) -> str:
    """State whether the model may have been trained on the text, and why."""
    doubts = [f"{file} names it as conversations" for file in conversations] + gone
    if not history:
        doubts.append("no recipe.yaml says what the model was trained on")
    elif unknown is not None:
        doubts.append(f"it was made from {unknown}, of which no recipe.yaml says what it was trained on")
    known = f"other files than {history[0][0]} names (copies of these would not be noticed)" if history else ""
    if named:
        known = "only documents that training held out, by " + " and ".join(str(file) for file, _ in named)
    if not doubts:
        return f"no: {known}"
    return f"may be: {'; '.join(doubts)}" + (f". As far as known, {known}" if known and not conversations else "")
