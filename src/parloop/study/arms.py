"""The arms of a study: the settings in which its models differ."""

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

# Fields that every arm shares: the data and its rows; the study sets the loop counts and seeds itself.
SHARED = {field.name for field in dataclasses.fields(CorpusSettings)} | {"source", "mixture", "loops", "seed", "init_from"}


@dataclass(frozen=True)
class Change:
    """A recipe field that a study sweeps over, and an arm's value of it."""

    name: str
    value: Any

    def __str__(self) -> str:
        return f"{self.name} {self.value}"


def _differs(column: str, label: str, folder: str, **options: Any) -> Any:
    """Make a field of an arm.

    Args:
        column: its title in tables; empty if another column shows it.
        label: its part of an arm's label; {} is the value.
        folder: its part of the names of runs' folders.
        options: options of `dataclasses.field`. Every field but the first has a default; labels and folders omit a field at its default.
    """
    return dataclasses.field(**options, metadata={"column": column, "label": label, "folder": folder})


@dataclass(frozen=True)
class Arm:
    """One kind of model of a study. A field is a field of the recipe, or `recipe` translates it into one.

    To compare along another axis, add a field: tables then show a column for it once two arms differ in it, labels, folders and `arm` in
    results.json contain it, and figures draw one line for all arms that differ only in their loop count.

    `changes` are changes of recipe fields, from a study's sweep: each is a column, and a part of labels and folders.

    Controls have one loop and spend the cost of more loops otherwise: on `layers` times the layers, each with weights of its own, or on as
    many training tokens as the compute of `compute_of` loops buys.
    """

    loops: int = _differs("R", "R = {}", "r{}")
    layers: int = _differs("", "{} times the layers", "x{}", default=1)
    compute_of: int = _differs("", "the training compute of R = {}", "c{}", default=0)
    changes: tuple[Change, ...] = _differs("", "", "", default=())

    @property
    def is_control(self) -> bool:
        """Whether the arm is only compared with, and never recommended."""
        return self.layers > 1 or self.compute_of > 0

    @property
    def control(self) -> str:
        """Value of the option --control that adds this arm: deep 2. Empty if it is no control."""
        if not self.is_control:
            return ""
        return f"deep {self.layers}" if self.layers > 1 else f"compute {self.compute_of}"

    @property
    def place(self) -> int:
        """Position on the loop-count axis of figures: a control stands at the loop count that it is the control of."""
        return self.compute_of or self.loops * self.layers

    @property
    def label(self) -> str:
        """Name of the arm in texts: R = 2."""
        return ", ".join(self._parts("label"))

    @property
    def name(self) -> str:
        """Beginning of the names of its runs' folders: r2."""
        return "-".join(self._parts("folder"))

    @property
    def line(self) -> str:
        """Name of the figure's line that the arm is a point of; empty if there is only one line."""
        if self.is_control:
            name = "R times the layers instead" if self.layers > 1 else "one loop, as much training compute"
            return ", ".join([name, *map(str, self.changes)])
        return ", ".join(self._parts("label")[1:])

    def recipe(self, recipe: Recipe, **changes: Any) -> Recipe:
        """Return the protocol's recipe for this arm, with further changes."""
        layers = recipe.num_hidden_layers * self.layers
        swept = {change.name: change.value for change in self.changes}
        layers = swept.pop("num_hidden_layers", recipe.num_hidden_layers) * self.layers
        return dataclasses.replace(recipe, loops=self.loops, num_hidden_layers=layers, **swept | changes)

    def _parts(self, kind: str) -> list[str]:
        fields = [field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        parts = [field.metadata[kind].format(getattr(self, field.name)) for field in fields if field.name != "changes"]
        return parts + [str(change) if kind == "label" else f"{change.name}={change.value}" for change in self.changes]


def columns(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """Return the columns of a table that distinguish the arms: title -> one cell per arm. The loop count is always among
    them."""
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
    """Return the lines of figures: name -> indices of the arms on it, by loop count."""
    found: dict[str, list[int]] = {}
    for index, arm in sorted(enumerate(arms), key=lambda entry: entry[1].place):
        found.setdefault(arm.line, []).append(index)
    return found


def combinations(sweep: Sequence[str], recipe: Recipe) -> list[tuple[Change, ...]]:
    """Return every combination of a sweep's values.

    Args:
        sweep: name and values of each recipe field, as in learning_rate=1e-3,3e-3.
        recipe: the protocol, which every value must fit.

    Raises:
        RecipeError: an entry has another form; its field is unknown, named twice, or shared by all arms; the recipe refuses a value.
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
        return value  # the recipe checks it
