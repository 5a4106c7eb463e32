"""Results of verbs: dataclasses that print themselves and are stored as JSON.

Reading a result follows the type hints of its fields: other dataclasses, lists and dictionaries of them, arrays, intervals. JSON has no NaN:
unknown numbers are null in the file. docs/results.md describes every file.
"""

import dataclasses
import io
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np


class Result:
    """Base of the dataclasses that verbs return.

    Attributes:
        FORMAT: number of the file's format. It is increased when a field is removed or changes its meaning.
        FILE: name of the file in the verb's folder.
    """

    FORMAT: ClassVar[int] = 1
    FILE: ClassVar[str] = "results.json"

    def to_json(self) -> str:
        """Return the result as the text of its file."""
        return json.dumps({"format": self.FORMAT} | plain(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the result in a file's text.

        Raises:
            ValueError: the text is not a result of this class, or has another format.
        """
        try:
            content = json.loads(text)
            if not isinstance(content, dict):
                raise ValueError(f"it holds {type(content).__name__}, and not an object")
            if (number := content.get("format", 1)) != cls.FORMAT:
                raise ValueError(f"its format is {number}, and this version of parloop reads {cls.FORMAT}")
            return build(cls, content)
        except (TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"it is not a {cls.__name__}: {error}") from error

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Return the result in a verb's folder.

        Raises:
            OSError: the folder has none.
            ValueError: as `from_json`.
        """
        result = cls.from_json((Path(folder) / cls.FILE).read_text(encoding="utf-8"))
        if "folder" in {field.name for field in dataclasses.fields(result)}:  # type: ignore[arg-type]
            result.folder = Path(folder)  # type: ignore[attr-defined]
        return result

    def shown(self) -> list[Any]:
        """Return what `rich` prints of the result, from top to bottom: tables and texts."""
        raise NotImplementedError

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from self.shown()

    def format(self, width: int = 100) -> str:
        """Return what a terminal shows, as plain text.

        Args:
            width: columns of the terminal.
        """
        from rich.console import Console

        console = Console(width=width, file=io.StringIO())
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]


def not_kept(**options: Any) -> Any:
    """Return a field that is neither written nor compared, such as the folder of a result."""
    return dataclasses.field(**options, compare=False, metadata={"kept": False})


def kept_fields(kind: Any) -> list[dataclasses.Field]:
    """Return the fields of a dataclass that are written."""
    return [field for field in dataclasses.fields(kind) if field.metadata.get("kept", True)]


def plain(value: Any) -> Any:
    """Return a value as JSON holds it."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in kept_fields(value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def build(kind: Any, content: dict[str, Any]) -> Any:
    """Rebuild a dataclass from the content that `plain` returned. Unknown fields are ignored.

    Raises:
        ValueError: a field is missing.
        TypeError: a field has another type.
    """
    if not isinstance(content, dict):
        raise TypeError(f"{content!s:.50} is not a {kind.__name__}")
    hints, values = typing.get_type_hints(kind), {}
    for field in kept_fields(kind):
        if field.name in content:
            values[field.name] = read(hints[field.name], content[field.name], field.name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"it has no {field.name}")
    return kind(**values)


def read(kind: Any, value: Any, name: str) -> Any:
    """Convert a value of JSON to the type of a hint.

    Args:
        kind: the type hint.
        value: the value.
        name: name of the field, for messages.

    Raises:
        TypeError: the value has another type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or (value is None and type(None) in inner):
        return value
    if origin in (types.UnionType, typing.Union):
        return read(next(one for one in inner if one is not type(None)), value, name)
    if origin is dict and isinstance(value, dict):
        return {key: read(inner[1], item, name) for key, item in value.items()}
    if origin in (list, tuple) and isinstance(value, list):
        return origin(read(inner[0], item, name) for item in value)
    if kind is np.ndarray and isinstance(value, list):
        array = np.array(value)
        return array.astype(float) if array.dtype == object else array  # null is NaN
    if dataclasses.is_dataclass(kind):
        return build(kind, value)
    if hasattr(kind, "_fields") and isinstance(value, list):  # a named tuple
        hints = typing.get_type_hints(kind)
        return kind(*(read(hint, item, name) for hint, item in zip(hints.values(), value, strict=True)))
    if kind is float and value is None:
        return math.nan
    known: Any = {float: (int, float), int: int, str: str, bool: bool, dict: dict, list: list}.get(origin or kind)
    if known is None or not isinstance(value, known) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} is {value!r:.50}, not {getattr(kind, '__name__', kind)}")
    if kind is float and not math.isfinite(value):
        raise TypeError(f"{name} is {value}")
    return value
