"""The name of the cache argument: `cache` from transformers 5.24 on, `past_key_values` before.

The model's code uses `cache`, and callers may use either name. Where the library passes or reads a cache (generate(), masks,
checkpointed layers, fields of outputs), the name is that of the installed version, CACHE.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"

F = TypeVar("F", bound=Callable)


def takes_cache(function: F) -> F:
    """Allow `past_key_values` as another name of a function's argument `cache`.

    Its signature shows the installed version's name, since generate() refuses arguments that forward() does not show.

    Raises:
        ValueError: a call passes a cache under both names.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop("past_key_values", None)
        if given is not None:
            if kwargs.get("cache") is not None:
                raise ValueError(
                    "Both cache and past_key_values hold a cache: they name the same argument, pass one of them."
                )
            kwargs["cache"] = given
        return function(*args, **kwargs)

    names = {"cache": CACHE}
    shown = [parameter.replace(name=names.get(name, name)) for name, parameter in signature.parameters.items()]
    call.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
