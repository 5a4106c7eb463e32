"""Options that several commands have, and the fields of recipes as options."""

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from ..record import printable

Many = Parameter(consume_multiple=True, negative=())
Flag = Parameter(negative=())


def _can_be_a_folder(kind: Any, folder: Path | None) -> None:
    """Check a folder's name before there is work to lose.

    Raises:
        ValueError: it is not UTF-8, so that weights could not be written there.
    """
    if folder is None:
        return
    if printable(folder) != str(folder):
        raise ValueError(f"{printable(folder)!r} has bytes that are not UTF-8: choose another name.")
    folder.exists()  # raises OSError, which main reports, if the name is too long


Output = Annotated[Path, Parameter(validator=_can_be_a_folder)]
RECIPE = Group("Fields of the recipe, to override it", sort_key=2)
CHAT = Group("Fields of recipes for conversations", sort_key=3)


def overrides_of(*kinds: type, without: tuple[str, ...] = ()) -> type:
    """Return a class with the fields of these recipes as options, each None unless given."""
    options: dict[str, tuple] = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):
            if f.name in options or f.name in without:
                continue
            hint = list[int] if f.name == "loops" else hints[f.name]
            default = f.default_factory() if callable(f.default_factory) else f.default
            shown = f"{f.metadata['doc']} [default: {default}]"
            group = CHAT if kind.__name__ == "ChatRecipe" else RECIPE
            parameter = Parameter(help=shown, group=group, consume_multiple=True, negative=(), show_default=False)
            options[f.name] = (f.name, Annotated[hint | None, parameter], None)
    made = dataclasses.make_dataclass("Overrides", list(options.values()))
    made.__module__ = __name__  # cyclopts treats classes of the standard library as plain values
    return made


def given(overrides: Any) -> dict[str, Any]:
    """Return the fields that were given as options."""
    values = {name: value for name, value in vars(overrides).items() if value is not None}
    if len(values.get("loops", ())) == 1:
        values["loops"] = values["loops"][0]
    return values
