"""The arms of a study: what one model has that the others have not."""

import dataclasses
import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..corpus import CorpusSettings
from ..errors import RecipeError
from ..train.recipe import Recipe

# Fields that every arm shares: what is read, and in which rows; the study sets the loop counts and seeds itself.
SHARED = {field.name for field in dataclasses.fields(CorpusSettings)} | {"source", "mixture", "loops", "seed", "init_from"}


@dataclass(frozen=True)
class Change:
    """A field of the recipe that a study sweeps over, and an arm's value of it."""

    name: str
    value: Any

    def __str__(self) -> str:
        return f"{self.name} {self.value}"


def _differs(column: str, label: str, folder: str, **options: Any) -> Any:
    """Make a field of an arm.

    Args:
        column: its title in tables; empty where another column tells it.
        label: its part of an arm's label; {} is the value.
        folder: its part of the names of runs' folders.
        options: of `dataclasses.field`, a default for every field but the first: an arm at its default does not name the field.
    """
    return dataclasses.field(**options, metadata={"column": column, "label": label, "folder": folder})


@dataclass(frozen=True)
class Arm:
    """One kind of model of a study. A field is a field of the recipe, or else `recipe` says what it changes there.

    A further field is one more column in every table once two arms differ in it, one more part of labels and folders, and a part of
    `arm` in results.json; figures draw a line for all arms that differ in their loop count only.

    `changes` are of fields of the recipe, which a study sweeps over: each is a column, and a part of labels and folders.

    Controls have one loop, and what more loops cost spent otherwise: `layers` times the layers, each with weights of its own, or as many
    training tokens as the compute of `compute_of` loops buys.
    """

    loops: int = _differs("R", "R = {}", "r{}")
    layers: int = _differs("", "{} times the layers", "x{}", default=1)
    compute_of: int = _differs("", "the training compute of R = {}", "c{}", default=0)
    changes: tuple[Change, ...] = _differs("", "", "", default=())

    @property
    def is_control(self) -> bool:
        """Whether it is there to be compared with, and not to be chosen."""
        return self.layers > 1 or self.compute_of > 0

    @property
    def control(self) -> str:
        """What it is the control of, as the option --control names it: deep 2."""
        if not self.is_control:
            return ""
        return f"deep {self.layers}" if self.layers > 1 else f"compute {self.compute_of}"

    @property
    def place(self) -> int:
        """Where it stands in figures against the loop count: a control stands with the loop count that it is the control of."""
        return self.compute_of or self.loops * self.layers

    @property
    def label(self) -> str:
        """What the arm is called in texts: R = 2."""
        return ", ".join(self._parts("label"))

    @property
    def name(self) -> str:
        """What its runs' folders begin with: r2."""
        return "-".join(self._parts("folder"))

    @property
    def line(self) -> str:
        """What a line of a figure is called, which has a point for each loop count; empty if it is the only one."""
        if self.is_control:
            name = "R times the layers instead" if self.layers > 1 else "one loop, as much training compute"
            return ", ".join([name, *map(str, self.changes)])
        return ", ".join(self._parts("label")[1:])

    def recipe(self, recipe: Recipe, **changes: Any) -> Recipe:
        """Return the protocol's recipe for this arm, and with further changes."""
        layers = recipe.num_hidden_layers * self.layers
        swept = {change.name: change.value for change in self.changes}
        layers = swept.pop("num_hidden_layers", recipe.num_hidden_layers) * self.layers
        return dataclasses.replace(recipe, loops=self.loops, num_hidden_layers=layers, **swept | changes)

    def _parts(self, kind: str) -> list[str]:
        fields = [field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        parts = [field.metadata[kind].format(getattr(self, field.name)) for field in fields if field.name != "changes"]
        return parts + [str(change) if kind == "label" else f"{change.name}={change.value}" for change in self.changes]


def columns(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """Return the columns of a table that tell the arms apart: title -> a cell for every arm. The loop count is always one."""
    shown = {}
    for number, field in enumerate(dataclasses.fields(Arm)):
        cells = [str(getattr(arm, field.name)) for arm in arms]
        if number == 0 or (len(set(cells)) > 1 and field.metadata["column"]):
            shown[field.metadata["column"]] = cells
    for name in dict.fromkeys(change.name for arm in arms for change in arm.changes):
        values = [{change.name: str(change.value) for change in arm.changes}.get(name, "") for arm in arms]
        if len(set(values)) > 1:
            shown[name.replace("_", "\n")] = values
    return shown | ({"control": [arm.control for arm in arms]} if any(arm.is_control for arm in arms) else {})


def lines(arms: Sequence[Arm]) -> dict[str, list[int]]:
    """Return what figures draw a line for: its name -> places of the arms in it, by loop count."""
    found: dict[str, list[int]] = {}
    for place, arm in sorted(enumerate(arms), key=lambda entry: entry[1].place):
        found.setdefault(arm.line, []).append(place)
    return found


def combinations(sweep: Sequence[str], recipe: Recipe) -> list[tuple[Change, ...]]:
    """Return every combination of the values that a sweep names.

    Args:
        sweep: of each field of the recipe its name and values, learning_rate=1e-3,3e-3.
        recipe: the protocol, with which every value must go.

    Raises:
        RecipeError: no such form, a field that is unknown, named twice, or shared by all arms, a value that the recipe refuses.
    """
    known = [field.name for field in dataclasses.fields(Recipe) if field.name not in SHARED]
    swept: dict[str, list[Change]] = {}
    for text in sweep:
        given, _, values = text.partition("=")
        name = given.replace("-", "_")
        if not values or name in swept:
            raise RecipeError(f"sweep {text!r} must be FIELD=VALUE,VALUE with each field once: learning_rate=1e-3,3e-3.")
        if name in SHARED:
            raise RecipeError(f"sweep {text!r}: all models of a study have the same {name}. Make a study for each value.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see the fields of the recipe in --help."
            raise RecipeError(f"sweep {text!r}: a recipe has no field {name!r}; {hint}")
        settled = []
        for value in values.split(","):
            changes: dict[str, Any] = {name: _parsed(value)}
            changed = dataclasses.replace(recipe, **changes)
            settled.append(Change(name, getattr(changed, name)))
        swept[name] = list(dict.fromkeys(settled))
    return list(itertools.product(*swept.values()))


def _parsed(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value  # the recipe says what it may be
