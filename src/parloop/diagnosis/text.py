"""Which text a checkpoint is looked at with, and whether it may have been trained on it.

What a checkpoint was trained on, its recipe.yaml says, and those of the checkpoints that it was made from. Text that one of them names
is used all the same, but only documents that training held out.
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
        settings: the source and what is read from it.
        held_out: only documents that training held out.
        trained_on: whether the model may have been trained on it: "no: ..." or "may be: ...", and why.
        recipe: that of the checkpoint, if there is one, and its file.
    """

    settings: CorpusSettings
    held_out: bool
    trained_on: str
    recipe: Recipe | ChatRecipe | None
    recipe_file: Path | None


def choose_text(checkpoint: str | Path, data: str | None = None, extensions: list[str] | None = None) -> Text:
    """Choose the text to look at a checkpoint with.

    Args:
        data: a source. Default: what the checkpoint's recipe trained on (of a mixture, the source with the largest share), or the
            standard library.
        extensions: which files of a folder are read, instead of the recipe's.

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
        return Text(settings, True, _told_of_task(settings.source, history, unknown), recipe, recipe_file)
    gone: list[str] = []
    named = [own] if own else []
    for file, part in parts:
        if not any(file == other for other, _ in named) and _share_files(settings, part, gone, file):
            if not named:  # as that source was read
                ways = {"source": settings.source} | ({"extensions": settings.extensions} if extensions else {})
                settings = dataclasses.replace(part, **ways)  # type: ignore[arg-type]
            named.append((file, part))
    if named:
        settings = dataclasses.replace(settings, validation_share=min(part.validation_share for _, part in named))
    talks = [
        file
        for file, past in history
        if isinstance(past, ChatRecipe)
        and _share_files(settings, CorpusSettings(source=past.chat, extensions=()), gone, file)
    ]
    return Text(settings, bool(named), _told(history, named, talks, gone, unknown), recipe, recipe_file)


def trainings(checkpoint: str | Path) -> tuple[list[tuple[Path, Recipe | ChatRecipe]], str | None]:
    """Return the recipes that a checkpoint was trained by, the last one first, with their files; and the checkpoint that the first one
    began with, if it is not known what that was trained on."""
    found: list[tuple[Path, Recipe | ChatRecipe]] = []
    place: str | None = str(checkpoint)
    while place is not None:
        folder = Path(place)
        if re.fullmatch(r"checkpoint-\d+", folder.name):  # of a run that goes on
            folder = folder.parent
        file = folder / "recipe.yaml"
        if not file.is_file() or any(file.samefile(other) for other, _ in found):
            return found, place
        recipe = load_recipe(file)
        found.append((file, recipe))
        place = recipe.model if isinstance(recipe, ChatRecipe) else recipe.init_from
    return found, None


def same_source(one: str, other: str) -> bool:
    """Whether two spellings mean the same source."""
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
    """Whether two sources have documents of the same files. Notes what is not there any more."""
    if same_source(one.source, other.source):
        return True
    if any(part.source.startswith(sources.HUB) or is_task(part.source) for part in (one, other)):
        return False
    try:
        trained = {os.path.realpath(path) for path in sources.files_read(other)}
    except SourceError:
        gone.append(f"{other.source}, which {file} names, is not there any more")
        return False
    return any(os.path.realpath(path) in trained for path in sources.files_read(one))


def _told_of_task(source: str, history: list[tuple[Path, Recipe | ChatRecipe]], unknown: str | None) -> str:
    """Say whether held-out documents of a task may have been trained on: with other options, others are held out."""
    task = task_of(source)
    doubts = [
        f"{file} names it with other options, {past.source}, and then other documents are held out"
        for file, past in history
        if isinstance(past, Recipe) and is_task(past.source)
        for trained in [task_of(past.source)]
        if trained.name == task.name and trained.content_options != task.content_options
    ]
    if not history:
        doubts.append("no recipe.yaml says what the model was trained on")
    elif unknown is not None:
        doubts.append(f"it was made from {unknown}, of which no recipe.yaml says what it was trained on")
    return f"may be: {'; '.join(doubts)}" if doubts else "no: held-out documents of a task are in no training on it"


def _told(
    history: list[tuple[Path, Recipe | ChatRecipe]],
    named: list[tuple[Path, CorpusSettings]],
    talks: list[Path],
    gone: list[str],
    unknown: str | None,
) -> str:
    """Say whether the text may have been trained on, and why."""
    doubts = [f"{file} names it as conversations" for file in talks] + gone
    if not history:
        doubts.append("no recipe.yaml says what the model was trained on")
    elif unknown is not None:
        doubts.append(f"it was made from {unknown}, of which no recipe.yaml says what it was trained on")
    known = f"other files than {history[0][0]} names (copies of these would not be noticed)" if history else ""
    if named:
        known = "only documents that training held out, by " + " and ".join(str(file) for file, _ in named)
    if not doubts:
        return f"no: {known}"
    return f"may be: {'; '.join(doubts)}" + (f". As far as known, {known}" if known and not talks else "")
